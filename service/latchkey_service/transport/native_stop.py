"""How a server of the `native` transport closes, without waiting for the event loop's own threads.

The library (0.5.0) closes its Rust part in a thread of the event loop. All of those may be busy
with work that hangs, such as DNS look-ups, and a graceful stop would wait for that work.
"""

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor

# `from pygrpc_native import aio` makes the package's lazy attributes (0.5.0) recurse endlessly.
import pygrpc_native.aio

__all__ = ["Closable"]


class Closable(pygrpc_native.aio.Server):
    """The library's server, with a replacement for the end of its `stop`."""

    async def close(self) -> None:
        """Cancel the calls in progress, and close all connections. Later calls wait for the first.

        The library ends calls that arrive meanwhile.
        """
        if self._stopping:
            await self._terminated.wait()
            return
        self._stopping = True
        tasks = [call.task for call in self._calls.values() if call.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._fallback is not None:
            await self._fallback.stop(0)
        await self.close_front()
        if self._fallback_dir is not None:
            shutil.rmtree(self._fallback_dir, ignore_errors=True)
        self._terminated.set()

    async def close_front(self) -> None:
        """Close the Rust part, in a separate thread, because it waits for its own threads.

        Does nothing if the part is closed already.
        """
        if self._front is None:
            return
        closer = ThreadPoolExecutor(1, "native close")
        try:
            await asyncio.get_running_loop().run_in_executor(closer, self._front.close)
        finally:
            closer.shutdown(wait=False)

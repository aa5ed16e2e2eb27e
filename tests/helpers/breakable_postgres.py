"""An embedded Postgres that a test may stop, kill, freeze, and bring back."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
from latchkey_service.postgres.embedded_cluster import EmbeddedPostgres

from tests.helpers.waiting import eventually

__all__ = ["BreakablePostgres"]


class BreakablePostgres:
    """An embedded Postgres that a test may stop, kill, freeze, and bring back.

    Slow operations do not block the event loop, in which the server under test runs. The exception
    is `start`, which must run on the main thread.
    """

    def __init__(self, data_dir: Path) -> None:
        self._postgres = EmbeddedPostgres(data_dir)
        self._data_dir = data_dir
        self._frozen: list[psutil.Process] = []

    @property
    def log_path(self) -> Path:
        return self._data_dir / "postgres.log"

    def start(self) -> str:
        return self._postgres.start()

    async def stop(self) -> None:
        await asyncio.to_thread(self._postgres.stop)

    async def kill(self) -> None:
        """SIGKILL the postmaster, and wait until its children have noticed and ended."""
        assert self._postgres.pid is not None
        children = psutil.Process(self._postgres.pid).children(recursive=True)
        os.kill(self._postgres.pid, signal.SIGKILL)
        await eventually(lambda: self._postgres.poll() is not None, "the postmaster is dead")
        await eventually(lambda: not psutil.wait_procs(children, 0)[1], "its children have ended")

    async def crash(self) -> None:
        """SIGKILL all of its processes at once, as in a power failure: none writes anything."""
        await self.freeze()
        for process in self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._frozen = []
        await eventually(lambda: self._postgres.poll() is not None, "the postmaster is dead")

    async def freeze(self) -> None:
        """SIGSTOP the postmaster, so that it starts no more children, and then the children."""
        assert self._postgres.pid is not None
        postmaster = psutil.Process(self._postgres.pid)
        postmaster.suspend()
        self._frozen = [postmaster]
        for child in postmaster.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.suspend()
                self._frozen.append(child)

    def configure(self, lines: str) -> None:
        """Apply these settings on top of the existing ones, instead of those of the last call."""
        (path,) = self._data_dir.rglob("postgresql.auto.conf")
        path.write_text(f"{lines}\n")
        assert self._postgres.pid is not None
        os.kill(self._postgres.pid, signal.SIGHUP)

    def thaw(self) -> None:
        """SIGCONT all frozen processes."""
        for process in reversed(self._frozen):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self._frozen = []

    @contextlib.asynccontextmanager
    async def broken_by(self, fault: str) -> AsyncIterator[Callable[[], None]]:
        """Break it; the yielded function restores it, and so does the end of the block."""
        try:
            await {"stopped": self.stop, "killed": self.kill, "frozen": self.freeze}[fault]()
            yield self.bring_back
        finally:
            self.bring_back()

    def bring_back(self) -> None:
        self.thaw()
        self.start()

    def close(self) -> None:
        self.thaw()
        self._postgres.stop()

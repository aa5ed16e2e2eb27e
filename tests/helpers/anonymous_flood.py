"""A client without a credential that calls as often as it can. Runs as a separate process.

`python -m tests.helpers.anonymous_flood ADDRESS CONNECTIONS CALLS SECONDS PATH [CA_FILE]` keeps
CALLS calls open on each of its connections, and prints how many were answered. With a CA file it
uses TLS. It opens connections again that the server closes.
"""

import asyncio
import contextlib
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import raw_http2 as http2
from tests.helpers.repository import ROOT

__all__ = ["flooding"]

# After that many calls a connection has used a part of its stream numbers; it opens another.
CALLS_MAX = 100_000
AGAIN_SECONDS = 0.05


@contextlib.contextmanager
def flooding(
    address: str,
    *,
    connections: int,
    calls: int = 100,
    seconds: float = 60.0,
    path: str = "/latchkey.v1.TokenService/Verify",
    ca: Path | None = None,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run the flood, for at most `seconds`."""
    arguments = [address, str(connections), str(calls), str(seconds), path]
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments, *([] if ca is None else [str(ca)])],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


class _Flood(asyncio.Protocol):
    """One connection."""

    def __init__(self, block: bytes, data: bytes, calls: int) -> None:
        self._block, self._data, self._calls = block, data, calls
        self._stream = 1
        self._buffer = b""
        self.answered = 0
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(http2.PREFACE + http2.Frame(http2.SETTINGS, 0, 0).encoded())
        transport.write(b"".join(self._call() for _ in range(self._calls)))

    def _call(self) -> bytes:
        stream, self._stream = self._stream, self._stream + 2
        head = http2.Frame(http2.HEADERS, http2.END_HEADERS, stream, self._block)
        return (
            head.encoded() + http2.Frame(http2.DATA, http2.END_STREAM, stream, self._data).encoded()
        )

    def data_received(self, data: bytes) -> None:
        frames, self._buffer = http2.received(self._buffer + data)
        out = []
        for got in frames:
            if got.kind == http2.SETTINGS and not got.flags & http2.ACK:
                out.append(http2.Frame(http2.SETTINGS, http2.ACK, 0).encoded())
            elif got.kind == http2.PING and not got.flags & http2.ACK:
                out.append(http2.Frame(http2.PING, http2.ACK, 0, got.payload).encoded())
            elif got.kind == http2.HEADERS and got.flags & http2.END_STREAM:
                self.answered += 1
                out.append(self._call())
            elif got.kind == http2.GOAWAY:
                self._transport.abort()
                return
        if self._stream > 2 * CALLS_MAX:
            self._transport.abort()
            return
        # The bytes that the server may send on the connection.
        if data:
            size = struct.pack(">I", len(data))
            out.append(http2.Frame(http2.WINDOW_UPDATE, 0, 0, size).encoded())
        self._transport.write(b"".join(out))

    def connection_lost(self, _error: Exception | None) -> None:
        self.lost.set_result(None)


async def _run(
    address: str, connections: int, calls: int, seconds: float, path: str, ca: Path | None
) -> int:
    host, _, port = address.rpartition(":")
    block, data = http2.headers(path), http2.message(b"")
    context = None
    if ca is not None:
        context = ssl.create_default_context(cafile=ca)
        context.set_alpn_protocols(["h2"])
    end = time.monotonic() + seconds
    answered = 0

    async def keep_connected() -> None:
        nonlocal answered
        loop = asyncio.get_running_loop()
        while time.monotonic() < end:
            try:
                transport, flood = await loop.create_connection(
                    lambda: _Flood(block, data, calls), host, int(port), ssl=context
                )
            except OSError:
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(loop.time() + end - time.monotonic()):
                    await flood.lost
            transport.abort()
            answered += flood.answered
            await asyncio.sleep(AGAIN_SECONDS)

    await asyncio.gather(*(keep_connected() for _ in range(connections)))
    return answered


def main(arguments: list[str]) -> None:
    address, connections, calls, seconds, path, *ca = arguments
    answered = asyncio.run(
        _run(
            address,
            int(connections),
            int(calls),
            float(seconds),
            path,
            Path(ca[0]) if ca else None,
        )
    )
    print(answered, flush=True)  # noqa: T201 - read by `flooding`'s user


if __name__ == "__main__":
    main(sys.argv[1:])

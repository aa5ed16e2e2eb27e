"""An HTTP/2 client that does only what a test tells it, including what no client should do.

Frames are written by hand (RFC 9113 §4.1, §6). Headers in answers are not decoded, because the
tests check whether and how a connection ends, and not its last message.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from typing import NamedTuple

from tests.helpers.waiting import WAIT_SECONDS

__all__ = ["Connection", "Frame", "connected", "header_block", "message"]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_HEADER_LIST_SIZE = 3, 4, 6
REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM = 7, 8, 11
WINDOW_DEFAULT, WINDOW_MAX = 65_535, 2**31 - 1


class Frame(NamedTuple):
    """One received frame."""

    kind: int
    flags: int
    stream: int
    payload: bytes


class Connection:
    """One connection. Reads only when asked to: until then the kernel holds the received bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._stream = -1
        self.settings: dict[int, int] = {}
        """The settings that the server has announced."""

    async def open(self, settings: dict[int, int] | None = None) -> None:
        """Send the preface with these settings, and wait for the server's. From then on `frames`
        answers the server's pings."""
        self.write(PREFACE)
        payload = b"".join(struct.pack(">HI", *item) for item in (settings or {}).items())
        self.send(SETTINGS, 0, 0, payload)
        await self.until(SETTINGS)

    def write(self, data: bytes) -> None:
        """Send any bytes. Does not wait."""
        self._writer.write(data)

    def send(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        """Send a frame. Does not wait."""
        self.write(frame(kind, flags, stream, payload))

    async def drain(self) -> None:
        """Wait until most of the sent bytes are on their way."""
        await self._writer.drain()

    def grant(self, stream: int, size: int) -> None:
        """Let the server send this many more bytes, on a stream or, with 0, on the whole
        connection."""
        self.send(WINDOW_UPDATE, 0, stream, struct.pack(">I", size))

    def begin(self, block: bytes) -> int:
        """Begin a call with these headers; return its stream."""
        self._stream += 2
        self.send(HEADERS, END_HEADERS, self._stream, block)
        return self._stream

    def call(self, path: str, data: bytes) -> int:
        """Make a whole call with a serialised message; return its stream."""
        stream = self.begin(header_block(path))
        self.send(DATA, END_STREAM, stream, message(data))
        return stream

    async def frames(self, *, answer_pings: bool = True) -> AsyncIterator[Frame]:
        """Yield the received frames, until the server has closed the connection in any way."""
        while True:
            try:
                head = await self._reader.readexactly(9)
                high, low, kind, flags, stream = struct.unpack(">BHBBI", head)
                payload = await self._reader.readexactly(high << 16 | low)
            except (asyncio.IncompleteReadError, OSError):
                return
            if kind == SETTINGS and not flags & ACK:
                self.settings |= dict(struct.iter_unpack(">HI", payload))
                self.send(SETTINGS, ACK, 0)
            elif kind == PING and not flags & ACK and answer_pings:
                self.send(PING, ACK, 0, payload)
            yield Frame(kind, flags, stream, payload)

    async def until(self, kind: int, stream: int | None = None) -> Frame:
        """Return the next frame of a kind. Fails if the connection ends first or time runs out."""
        async with asyncio.timeout(WAIT_SECONDS):
            async for got in self.frames():
                if got.kind == kind and stream in (None, got.stream):
                    return got
        raise AssertionError(f"the connection was closed before a frame of type {kind}")

    async def closed(self, *, answer_pings: bool = True) -> list[Frame]:
        """Read until the server closes the connection; return the frames before that."""
        async with asyncio.timeout(WAIT_SECONDS):
            return [got async for got in self.frames(answer_pings=answer_pings)]

    def abort(self) -> None:
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def connected(
    address: str,
    *,
    tls: ssl.SSLContext | None = None,
    receive_buffer: int | None = None,
) -> AsyncIterator[Connection]:
    """Connect to HOST:PORT or unix:PATH, and send nothing yet.

    With a `receive_buffer`, in bytes, the kernel holds no more than about that many unread
    bytes.
    """
    if address.startswith("unix:"):
        own = socket.socket(socket.AF_UNIX)
        target: object = address.removeprefix("unix:")
    else:
        own = socket.socket()
        host, _, port = address.rpartition(":")
        target = (host, int(port))
    own.setblocking(False)
    if receive_buffer is not None:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(own, target)  # type: ignore[arg-type]  # or a path
    reader, writer = await asyncio.open_connection(
        sock=own, ssl=tls, server_hostname="localhost" if tls else None, limit=1 << 16
    )
    connection = Connection(reader, writer)
    try:
        yield connection
    finally:
        connection.abort()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return the bytes of a frame."""
    size = len(payload)
    return struct.pack(">BHBBI", size >> 16, size & 0xFFFF, kind, flags, stream) + payload


def message(data: bytes, *, compressed: bool = False) -> bytes:
    """Return a gRPC message: its prefix, and the serialised data."""
    return struct.pack(">BI", compressed, len(data)) + data


def header_block(path: str, *more: tuple[str, str]) -> bytes:
    """Return the headers of a gRPC call, without entries for the server's dynamic table.

    RFC 7541 §6.1, §6.2.2, appendix A.
    """
    block = b"\x83\x86" + b"\x04" + _text(path) + b"\x01" + _text("latchkey")
    named = (("content-type", "application/grpc"), ("te", "trailers"), *more)
    return block + b"".join(b"\x00" + _text(name) + _text(value) for name, value in named)


def _text(value: str) -> bytes:
    """Return an uncompressed string in HPACK (RFC 7541 §5.1, §5.2)."""
    data = value.encode("ascii")
    size = len(data)
    if size < 127:
        return bytes([size]) + data
    out, size = bytearray([127]), size - 127
    while size >= 128:
        out.append(size % 128 | 128)
        size //= 128
    return bytes([*out, size]) + data

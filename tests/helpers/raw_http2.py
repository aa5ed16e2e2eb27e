"""An HTTP/2 client that sends exactly the frames of a test, including invalid ones.

h2 and hyperframe reject most of the frames that these tests have to send, so frames are bytes here
(RFC 9113 §4.1, §6). The header blocks are hpack's.
"""

import asyncio
import contextlib
import functools
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from typing import NamedTuple

import hpack

from tests.helpers.waiting import WAIT_SECONDS

__all__ = ["Connection", "Frame", "connected", "headers", "message", "received"]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE = range(6)
PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(6, 10)
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITISED = 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 1, 2, 3, 4
REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM = 7, 8, 11
WINDOW_DEFAULT, WINDOW_MAX = 65_535, 2**31 - 1
# Length (24 bits), type, flags, stream.
HEAD = struct.Struct(">BHBBI")


class Frame(NamedTuple):
    """A frame as sent over the wire. With `length` None, the header has the payload's real
    length."""

    kind: int
    flags: int
    stream: int
    payload: bytes = b""
    length: int | None = None

    def encoded(self) -> bytes:
        length = len(self.payload) if self.length is None else self.length
        head = HEAD.pack(length >> 16 & 0xFF, length & 0xFFFF, self.kind, self.flags, self.stream)
        return head + self.payload


def received(buffer: bytes) -> tuple[list[Frame], bytes]:
    """Return the complete frames of the received bytes, and the rest."""
    frames = []
    while len(buffer) >= HEAD.size:
        high, low, kind, flags, stream = HEAD.unpack_from(buffer)
        end = HEAD.size + (high << 16 | low)
        if len(buffer) < end:
            break
        frames.append(Frame(kind, flags, stream, buffer[HEAD.size : end]))
        buffer = buffer[end:]
    return frames, buffer


@functools.lru_cache(maxsize=64)
def headers(
    path: str, *more: tuple[str, str], authority: str = "localhost", huffman: bool = False
) -> bytes:
    """Return the header block of a call, for a connection on which every block is from here."""
    fields = [
        *((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", authority)),
        *(("content-type", "application/grpc"), ("te", "trailers")),
        *more,
    ]
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
    return bytes(hpack.Encoder().encode(encoded, huffman=huffman))


def message(data: bytes, compressed: int = 0) -> bytes:
    """Return a gRPC message: its prefix, and the serialised data."""
    return struct.pack(">BI", compressed, len(data)) + data


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
        self.write(Frame(kind, flags, stream, payload).encoded())

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
        self._stream += 2
        frames = (
            Frame(HEADERS, END_HEADERS, self._stream, headers(path)),
            Frame(DATA, END_STREAM, self._stream, message(data)),
        )
        # Together: each write is a system call.
        self.write(b"".join(frame.encoded() for frame in frames))
        return self._stream

    async def frames(self, *, answer_pings: bool = True) -> AsyncIterator[Frame]:
        """Yield the received frames, until the server has closed the connection in any way."""
        while True:
            try:
                head = await self._reader.readexactly(HEAD.size)
                rest = await self._reader.readexactly(int.from_bytes(head[:3]))
            except (asyncio.IncompleteReadError, OSError):
                return
            ((got,), _) = received(head + rest)
            if got.kind == SETTINGS and not got.flags & ACK:
                self.settings |= dict(struct.iter_unpack(">HI", got.payload))
                self.send(SETTINGS, ACK, 0)
            elif got.kind == PING and not got.flags & ACK and answer_pings:
                self.send(PING, ACK, 0, got.payload)
            yield got

    async def exchange(self, *sent: Frame) -> list[Frame]:
        """Send the preface and these frames; return the frames up to the end of a stream or of the
        connection."""
        self.write(PREFACE + b"".join(frame.encoded() for frame in sent))
        answers = []
        async with asyncio.timeout(WAIT_SECONDS):
            async for got in self.frames():
                answers.append(got)
                if got.kind in (RST_STREAM, GOAWAY) or (
                    got.kind == HEADERS and got.flags & END_STREAM
                ):
                    break
        return answers

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

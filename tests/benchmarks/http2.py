"""The part of HTTP/2 that a client needs if it knows the answers, as bytes; used by both loads."""

import socket
import struct
from collections.abc import Mapping

__all__ = [
    "ACK",
    "CANCEL",
    "CONTINUATION",
    "DATA",
    "DATA_FRAME",
    "END_HEADERS",
    "END_STREAM",
    "FRAME",
    "GOAWAY",
    "HEADERS",
    "HEADER_TABLE_SIZE",
    "MAX_CONCURRENT_STREAMS",
    "PADDED",
    "PRIORITY",
    "RST_STREAM",
    "SETTINGS",
    "SILENCE_SECONDS_MAX",
    "WINDOW_UPDATE",
    "Connection",
    "LoadError",
    "frame",
    "header_blocks",
]

# A server that is silent for this long is broken; the run must not wait for it.
SILENCE_SECONDS_MAX = 10.0

# RFC 9113 §3.4, §6, §6.5.2, §7.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
CONTINUATION = 9
ACK = END_STREAM = 0x1
END_HEADERS, PADDED, PRIORITY = 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 1, 2, 3, 4
CANCEL = 8
WINDOW_DEFAULT, WINDOW_MAX = 65_535, 2**31 - 1
# How much is returned to the server's window at a time.
WINDOW_STEP = 1 << 28

# Frame header: length (24 bits), type, flags, stream. The second one continues with gRPC's prefix
# of a message: uncompressed, length.
FRAME = struct.Struct(">BHBBI")
DATA_FRAME = struct.Struct(">BHBBIBI")


class LoadError(Exception):
    """The server does not behave as the load requires; the message says how."""


class Connection:
    """The common part of the loads' connections. Each load adds the calls."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), SILENCE_SECONDS_MAX)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The server's settings, with their defaults.
        self._settings = {INITIAL_WINDOW_SIZE: WINDOW_DEFAULT}
        self._send_window = WINDOW_DEFAULT
        self._received = 0

    def close(self) -> None:
        """Close it, whatever is in progress."""
        self._socket.close()

    def _greet(self, more: Mapping[int, int] | None = None) -> None:
        """Send the client's settings, including those in `more` (by number), and open the window
        wide."""
        settings = {ENABLE_PUSH: 0, INITIAL_WINDOW_SIZE: WINDOW_MAX} | dict(more or {})
        self._socket.sendall(
            PREFACE
            + frame(
                SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in settings.items())
            )
            + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW_MAX - WINDOW_DEFAULT))
        )

    def _control(
        self, kind: int, flags: int, stream: int, payload: bytes, out: list[bytes]
    ) -> None:
        """Handle a frame that belongs to no call; append the answer to `out`."""
        if kind == SETTINGS and not flags & ACK:
            self._settings |= dict(struct.iter_unpack(">HI", payload))
            if self._settings[INITIAL_WINDOW_SIZE] < WINDOW_DEFAULT:
                # Each request is sent whole, and none is larger than this.
                raise LoadError("the server's window for a call is smaller than is usual")
            if self._settings.get(HEADER_TABLE_SIZE, 4096) < 4096:
                raise LoadError("the server's header table is smaller than is usual")
            out.append(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            out.append(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE and stream == 0:
            self._send_window += int.from_bytes(payload, "big")
        elif kind == GOAWAY:
            raise LoadError(f"the server said GOAWAY, code {int.from_bytes(payload[4:8], 'big')}")

    def _give_back(self, out: list[bytes]) -> None:
        """Return received bytes to the server's window from time to time."""
        if self._received > WINDOW_STEP:
            out.append(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._received)))
            self._received = 0


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return a frame."""
    size = len(payload)
    return FRAME.pack(size >> 16, size & 0xFFFF, kind, flags, stream) + payload


def header_blocks(authority: str, path: str, timeout: str = "") -> tuple[bytes, bytes]:
    """Return the headers of a connection's first call, and those of each later one.

    The first call adds them to the server's table, as gRPC's own clients do, and later ones refer
    to them by number. `timeout` is the calls' deadline in gRPC's notation, such as 250m for 250 ms.
    RFC 7541 §6.1, §6.2.1, appendix A.
    """

    def text(value: str) -> bytes:
        data = value.encode("ascii")
        if len(data) > 126:
            raise ValueError("a longer header needs a longer length")
        return bytes([len(data)]) + data

    method_and_scheme = b"\x83\x86"
    remembered = [
        b"\x44" + text(path),
        b"\x41" + text(authority),
        b"\x5f" + text("application/grpc"),
        b"\x40" + text("te") + text("trailers"),
    ]
    if timeout:
        remembered.append(b"\x40" + text("grpc-timeout") + text(timeout))
    # Numbered from 62 on, the newest first.
    numbers = range(0x80 | 61 + len(remembered), 0x80 | 61, -1)
    return method_and_scheme + b"".join(remembered), method_and_scheme + bytes(numbers)

"""Hostile peers: connections with many calls, from an address of the caller's choice.

All bytes are made before, so a flood costs its own process little.
"""

import contextlib
import socket
import ssl
import struct
from collections.abc import Sequence

from tests.helpers import raw_http2 as http2

__all__ = ["Peer", "calls"]

SECONDS_MAX = 5.0
_LARGEST_FRAME = 16_384


def calls(path: str, count: int, data: bytes | None = None, *more: tuple[str, str]) -> bytes:
    """Return a connection's first bytes: settings, and `count` calls.

    With `data`, each call has this message. Without, none of them ends.
    """
    parts = [http2.PREFACE, http2.Frame(http2.SETTINGS, 0, 0).encoded()]
    block = http2.headers(path, *more)
    for number in range(count):
        stream = 2 * number + 1
        parts.append(http2.Frame(http2.HEADERS, http2.END_HEADERS, stream, block).encoded())
        if data is not None:
            message = http2.message(data)
            for start in range(0, len(message), _LARGEST_FRAME):
                piece = message[start : start + _LARGEST_FRAME]
                flags = http2.END_STREAM if start + _LARGEST_FRAME >= len(message) else 0
                parts.append(http2.Frame(http2.DATA, flags, stream, piece).encoded())
    return b"".join(parts)


class Peer:
    """A connection to HOST:PORT."""

    def __init__(
        self, address: str, source: str = "127.0.0.1", tls: ssl.SSLContext | None = None
    ) -> None:
        host, _, port = address.rpartition(":")
        own = socket.create_connection((host, int(port)), SECONDS_MAX, (source, 0))
        self.socket = own if tls is None else tls.wrap_socket(own, server_hostname="localhost")
        self.socket.settimeout(SECONDS_MAX)

    def send(self, data: bytes) -> bool:
        """Send bytes. Return whether the server took them."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def is_open(self) -> bool:
        """Return whether the server has not closed the connection. Reads what it has sent."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(1 << 16):
                pass
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            return False
        finally:
            self.socket.settimeout(SECONDS_MAX)
        return False

    def grant(self, size: int) -> None:
        """Let the server send more bytes on the connection."""
        self.send(http2.Frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", size)).encoded())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()


def open_count(peers: Sequence[Peer]) -> int:
    """Return how many of the connections are open."""
    return sum(peer.is_open() for peer in peers)

"""What `native` has no options for: how many connections it takes, and of which kind it lets go.

Its sockets are files of this process, so that they can be looked at and shut down from here: it
then finds them closed, as if by the client. Linux only. Nothing is done for a call, and little for
a connection: files are counted often, and looked at closely when there are many, or rarely.
"""

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from latchkey_service.log import logger
from latchkey_service.transport import Limits

__all__ = ["ConnectionGuard"]

FILES: Final = "/proc/self/fd"
# Between two counts, at least. What comes above the limit may stay this long.
COUNT_SECONDS: Final = 0.1
# A close look at tens of thousands of files takes some tens of milliseconds of a thread beside
# the event loop, but of the same interpreter: this bounds it to a twentieth of the time.
REST_FACTOR: Final = 20.0
# One to list with, one to hold a socket by, and some for others who are quicker to take them.
SPARE_FILES: Final = 8
# Under attack, one line says it for so long.
TELL_SECONDS: Final = 10.0
# RFC 9113 §3.4: what every client begins with.
PREFACE_BYTES: Final = 24
# In struct tcp_info of Linux, after bytes_acked.
_BYTES_RECEIVED: Final = struct.Struct("=128xQ")


@dataclass(slots=True)
class _Seen:
    """A socket: whether it is a connection to the listener, since when it is known, and whether its
    client has spoken."""

    ours: bool
    since: float
    spoken: bool


class ConnectionGuard:
    """Keeps the limits of one listener of this process, at `address` (HOST:PORT or unix:PATH).

    To be made once the listener is bound, and before it accepts.
    """

    def __init__(self, address: str, limits: Limits) -> None:
        self._connections_max = limits.connections_max
        self._handshake = limits.handshake
        unix = address.startswith("unix:")
        self._families = {socket.AF_UNIX} if unix else {socket.AF_INET, socket.AF_INET6}
        # A path, or a port: the kernel gives that of a listener to no connection that goes out.
        self._name = address.removeprefix("unix:") if unix else address.rpartition(":")[2]
        # By inode, the oldest first.
        self._seen: dict[int, _Seen] = {}
        self._told = -TELL_SECONDS
        self._cut = {"too_many": 0, "silent": 0}
        if sys.platform == "linux":
            self._bound_unread(round(limits.keepalive_timeout * 1_000))

    async def run(self) -> None:
        """Keep the limits. Ends when cancelled."""
        if sys.platform != "linux":
            logger().warning("connections are not counted on this system")
            return
        looked = -self._handshake
        rest = 0.0
        # Given away when there is no other file left to look with.
        spare = _spare()
        try:
            while True:
                await asyncio.sleep(max(COUNT_SECONDS, rest))
                now = time.monotonic()
                try:
                    # There are no more connections than files.
                    many = _open_files() > self._connections_max
                    if not many and now - looked < self._handshake / 2:
                        continue
                    await asyncio.to_thread(self.look)
                    spare = spare or _spare()
                except OSError as error:
                    logger().error("connections cannot be looked at", error=error.strerror)
                    _close(spare)
                    continue
                looked = time.monotonic()
                rest = REST_FACTOR * (looked - now)
                self._tell()
        finally:
            _close(spare)

    def look(self) -> None:
        """Look at all connections, and end those that are too many or say nothing."""
        now = time.monotonic()
        files = dict(_sockets())
        # By inode: the number of a file that is closed is another's at once.
        self._seen = {inode: seen for inode, seen in self._seen.items() if inode in files}
        for inode, end in _own(files, [inode for inode in files if inode not in self._seen]):
            ours = self._is_ours(end)
            # Who is on this machine may be slow: 120 s, by `native` itself.
            spoken = not ours or end.family == socket.AF_UNIX
            self._seen[inode] = _Seen(ours, now, spoken)
        connections = [inode for inode, seen in self._seen.items() if seen.ours]
        # The newest, as a server that refuses them would.
        for _, end in _own(files, connections[self._connections_max :]):
            self._end(end, "too_many")
        unspoken = [inode for inode, seen in self._seen.items() if not seen.spoken]
        for inode, end in _own(files, unspoken):
            seen = self._seen[inode]
            seen.spoken = _bytes_received(end) >= PREFACE_BYTES
            if not seen.spoken and now - seen.since >= self._handshake:
                self._end(end, "silent")

    def _bound_unread(self, timeout_ms: int) -> None:
        """Have the kernel end who takes nothing of what was sent to him: his window stays at zero,
        or his cable is cut. grpcio does so too; `native` asks only who is silent.

        Connections inherit it from the listener.
        """
        files = dict(_sockets())
        for _, end in _own(files, files):
            if end.family != socket.AF_UNIX and self._has_name(end) and _accepts(end):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)

    def _is_ours(self, end: socket.socket) -> bool:
        """Tell whether it is a connection that came in at the address."""
        return self._has_name(end) and not _accepts(end)

    def _has_name(self, end: socket.socket) -> bool:
        if end.family not in self._families:
            return False
        name = end.getsockname()
        return self._name == (name if end.family == socket.AF_UNIX else str(name[1]))

    def _end(self, end: socket.socket, reason: str) -> None:
        self._cut[reason] += 1
        with contextlib.suppress(OSError):  # its client was quicker
            end.shutdown(socket.SHUT_RDWR)

    def _tell(self) -> None:
        if any(self._cut.values()) and time.monotonic() - self._told >= TELL_SECONDS:
            logger().warning("connections ended", **self._cut, limit=self._connections_max)
            self._told = time.monotonic()
            self._cut = dict.fromkeys(self._cut, 0)


def _sockets() -> Iterator[tuple[int, int]]:
    """Yield inode and number of each socket of this process."""
    for name in os.listdir(FILES):  # noqa: PTH208 - no Path for each
        with contextlib.suppress(OSError):  # closed meanwhile
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield status.st_ino, int(name)


def _own(files: dict[int, int], inodes: Iterable[int]) -> Iterator[tuple[int, socket.socket]]:
    """Yield those that are still there, each by a number that is nobody else's until the next.

    `native` may close its own number at any moment, and the kernel give that to a connection to
    the database.
    """
    for inode in inodes:
        try:
            file = os.dup(files[inode])
        except OSError as error:
            if error.errno == errno.EBADF:
                continue
            raise
        if os.fstat(file).st_ino != inode:
            os.close(file)
            continue
        with socket.socket(fileno=file) as end:
            yield inode, end


def _accepts(end: socket.socket) -> bool:
    return bool(end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _open_files() -> int:
    # Linux counts them by itself from 6.2 on.
    return os.stat(FILES).st_size or len(os.listdir(FILES))  # noqa: PTH116, PTH208 - no Path


def _spare() -> list[int]:
    return [os.open(os.devnull, os.O_RDONLY) for _ in range(SPARE_FILES)]


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())


def _bytes_received(end: socket.socket) -> int:
    info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
    # An older kernel's is shorter; it tells less, and nobody is ended.
    return _BYTES_RECEIVED.unpack(info)[0] if len(info) == _BYTES_RECEIVED.size else PREFACE_BYTES

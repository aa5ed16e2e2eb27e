"""Lets go of connections that the transports would keep: too many, and those that do not go on.

Sockets are files of this process, whoever made them, so that they can be looked at and shut down
from here: their owner then finds them closed, as if by the client. Nothing is done for a call, and
little for a connection: files are counted often, and looked at closely when there are many, or
every few seconds. Linux only.
"""

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
import stat
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple

from latchkey_service.log import logger
from latchkey_service.transport import Limits

__all__ = ["ConnectionGuard"]

FILES: Final = "/proc/self/fd"
# Between two counts, at least. What comes above the limit may stay this long.
COUNT_SECONDS: Final = 0.1
# A close look at ten thousand connections takes a tenth of a second of a thread beside the event
# loop, but of the same interpreter: this bounds it to a twentieth of the time.
REST_FACTOR: Final = 20.0
# One to list with, one to hold a socket by, and some for others who are quicker to take them.
SPARE_FILES: Final = 8
# Under attack, one line says it for so long.
TELL_SECONDS: Final = 10.0
_FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
# RFC 9113 §3.4: what every client begins with.
PREFACE_BYTES: Final = 24
# struct tcp_info of Linux: unacked segments, bytes acked and received, bytes not sent yet.
_TCP_INFO: Final = struct.Struct("=24xI92xQQ8xI")


@dataclass(slots=True)
class _Seen:
    """A socket as it was at the last look. `listener` is None for one that is none of ours."""

    listener: "_Listener | None"
    since: float
    acked: int = 0
    stuck_since: float | None = None


class _Listener(NamedTuple):
    """An address: families, a port or a path, and a host beside a port."""

    families: tuple[socket.AddressFamily, ...]
    name: str
    host: str = ""

    def distance(self, local: str) -> int:
        """Return how unlike its host is to a connection's own address: 0 for the same."""
        here = ipaddress.ip_address(local.partition("%")[0])
        try:
            return 0 if ipaddress.ip_address(self.host) in {here, _unmapped(here)} else 2
        except ValueError:
            return 1  # a name, of whatever address


class ConnectionGuard:
    """Keeps the limits of the listeners of this process, at `addresses` (HOST:PORT, unix:PATH)."""

    def __init__(self, addresses: Sequence[str], limits: Limits) -> None:
        self._limits = limits
        # By port: the kernel gives that of a listener to no connection that goes out.
        self._listeners = [
            _Listener((socket.AF_UNIX,), address.removeprefix("unix:"))
            if address.startswith("unix:")
            else _tcp_listener(address)
            for address in addresses
        ]
        self._look_seconds = min(limits.handshake, limits.keepalive_timeout) / 2
        # By inode, the oldest first.
        self._seen: dict[int, _Seen] = {}
        # Files that are given away when no other is left.
        self._spare: list[int] = []
        self._told = -TELL_SECONDS
        self._ended = Counter[str]()

    async def run(self) -> None:
        """Keep the limits. Ends when cancelled."""
        if sys.platform != "linux":
            logger().warning("connections are not counted on this system")
            return
        looked = -self._look_seconds
        connections = files_then = 0
        rest = 0.0
        # A thread of its own: those of the event loop may all be taken for long, by host names that
        # are looked up.
        looking = ThreadPoolExecutor(1, "guard")
        loop = asyncio.get_running_loop()
        try:
            self._take_spare_files()
            while True:
                await asyncio.sleep(max(COUNT_SECONDS, rest))
                now = time.monotonic()
                # As if each file that was opened since were a connection.
                files = _open_files()
                many = connections + files - files_then > self._limits.connections_max
                if not many and now - looked < self._look_seconds:
                    continue
                try:
                    connections = await loop.run_in_executor(looking, self._look_for_certain)
                except OSError as error:
                    logger().error("connections cannot be looked at", error=error.strerror)
                files_then = files
                looked = time.monotonic()
                rest = REST_FACTOR * (looked - now)
                self._tell()
        finally:
            looking.shutdown(wait=False)
            self._give_spare_files()

    def _look_for_certain(self) -> int:
        try:
            connections = self.look()
        except OSError:
            # No file is left to look with: a flood came faster than the last look.
            self._give_spare_files()
            connections = self.look()
        self._take_spare_files()
        return connections

    def _take_spare_files(self) -> None:
        while len(self._spare) < SPARE_FILES:
            self._spare.append(os.open(os.devnull, os.O_RDONLY))

    def _give_spare_files(self) -> None:
        while self._spare:
            os.close(self._spare.pop())

    def look(self) -> int:
        """Look at all connections, and end those that are too many or do not go on.

        Returns how many there were, of the listener that has most. Takes some 10 µs for each.
        """
        now = time.monotonic()
        files = dict(_sockets())
        # By inode: the number of a file that is closed is another's at once.
        self._seen = {inode: seen for inode, seen in self._seen.items() if inode in files}
        for inode, end in _own(files, [inode for inode in files if inode not in self._seen]):
            self._seen[inode] = _Seen(self._listener_of(end), now)
        connections: list[int] = []
        too_many: set[int] = set()
        most = 0
        for listener in self._listeners:
            its = [inode for inode, seen in self._seen.items() if seen.listener is listener]
            connections += its
            most = max(most, len(its))
            # The newest, as a server that refuses them would.
            too_many.update(its[self._limits.connections_max :])
        for inode, end in _own(files, connections):
            seen = self._seen[inode]
            reason = "too_many" if inode in too_many else self._stuck(seen, end, now)
            if reason is not None:
                # Its owner may take a moment to close it; it counts no more.
                seen.listener = None
                self._ended[reason] += 1
                with contextlib.suppress(OSError):  # its client was quicker
                    end.shutdown(socket.SHUT_RDWR)
        return most

    def _stuck(self, seen: _Seen, end: socket.socket, now: float) -> str | None:
        """Return in which way a connection does not go on, for too long; None: it does.

        Over TCP alone: who is on a UNIX socket is asked by keepalive, if he is silent.
        """
        if end.family == socket.AF_UNIX:
            return None
        info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        if len(info) < _TCP_INFO.size:
            return None  # an older kernel tells less
        unacked, acked, received, unsent = _TCP_INFO.unpack(info)
        if received < PREFACE_BYTES:
            return "silent" if now - seen.since >= self._limits.handshake else None
        if not (unacked or unsent):
            seen.stuck_since = None
            return None
        # From when something was first seen under way: after a pause of this process, what its
        # clients were just sent is no older than that.
        if acked != seen.acked or seen.stuck_since is None:
            seen.acked, seen.stuck_since = acked, now
            return None
        # Not left to TCP_USER_TIMEOUT, as grpcio does: it never runs out on a peer whose window is
        # at zero and who sends something all the time (Linux 6.18). Keepalive asks no such peer.
        return "unread" if now - seen.stuck_since >= self._limits.keepalive_timeout else None

    def _listener_of(self, end: socket.socket) -> _Listener | None:
        """Return where a connection came in; None: it did not."""
        if end.family not in _FAMILIES:
            return None
        name = end.getsockname()
        here = name if end.family == socket.AF_UNIX else str(name[1])
        found = [
            listener
            for listener in self._listeners
            if end.family in listener.families and here == listener.name
        ]
        if not found or end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        # Addresses of this machine may have listeners on the same port.
        return found[0] if len(found) == 1 else min(found, key=lambda one: one.distance(name[0]))

    def _tell(self) -> None:
        if self._ended and time.monotonic() - self._told >= TELL_SECONDS:
            logger().warning("connections ended", **self._ended)
            self._told = time.monotonic()
            self._ended.clear()


def _tcp_listener(address: str) -> _Listener:
    host, _, port = address.rpartition(":")
    return _Listener((socket.AF_INET, socket.AF_INET6), port, host.strip("[]"))


def _unmapped(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> object:
    """Return the IPv4 address that an IPv6 one stands for, if it does (RFC 4291 §2.5.5.2)."""
    return getattr(address, "ipv4_mapped", None)


def _sockets() -> Iterator[tuple[int, int]]:
    """Yield inode and number of each socket of this process."""
    for name in os.listdir(FILES):  # noqa: PTH208 - no Path for each
        with contextlib.suppress(OSError):  # closed meanwhile
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield status.st_ino, int(name)


def _own(files: dict[int, int], inodes: Iterable[int]) -> Iterator[tuple[int, socket.socket]]:
    """Yield those that are still there, each by a number that is nobody else's until the next.

    Its owner may close its own number at any moment, and the kernel give that to a connection to
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


def _open_files() -> int:
    # Linux counts them by itself from 6.2 on.
    if files := os.stat(FILES).st_size:  # noqa: PTH116 - no Path for each
        return files
    try:
        return len(os.listdir(FILES))  # noqa: PTH208 - no Path for each
    except OSError:
        return sys.maxsize  # as many as there may be

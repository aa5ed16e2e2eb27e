"""Closes connections that exceed the limits or make no progress, where the transports do not.

All sockets are files of this process, so this module can inspect and shut down those of any
library. To the library, it looks as if the client had closed them. This costs calls nothing and
connections little: files are counted often, but inspected only when there are many, or every few
seconds. Linux only.
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

from latchkey_service.settings.logs import logger
from latchkey_service.transport.transports import Limits

__all__ = ["ConnectionGuard"]

FILES: Final = "/proc/self/fd"
# Minimum time between two counts. Connections above the limit may last this long.
COUNT_SECONDS: Final = 0.1
# Inspecting ten thousand connections takes a tenth of a second of a thread that shares the
# interpreter with the event loop. This factor limits it to a twentieth of the time.
REST_FACTOR: Final = 20.0
# One to list files, one to hold a socket, and some that other threads may take first.
SPARE_FILES: Final = 8
# Minimum time between two log lines, also under attack.
LOG_SECONDS: Final = 10.0
_FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
# RFC 9113 §3.4: the length of every client's connection preface.
PREFACE_BYTES: Final = 24
# struct tcp_info of Linux: unacked segments, bytes acked and received, bytes not sent yet.
_TCP_INFO: Final = struct.Struct("=24xI92xQQ8xI")


@dataclass(slots=True)
class _SocketState:
    """A socket at the last inspection. `listener` is None if none of our listeners accepted it."""

    listener: "_Listener | None"
    since: float
    acked: int = 0
    stuck_since: float | None = None


class _Listener(NamedTuple):
    """The address of a listener: socket families, a port or path, and the host of a port."""

    families: tuple[socket.AddressFamily, ...]
    name: str
    host: str = ""

    def distance(self, local: str) -> int:
        """Rank how well this listener's host matches a connection's local address; 0 is exact."""
        here = ipaddress.ip_address(local.partition("%")[0])
        try:
            return 0 if ipaddress.ip_address(self.host) in {here, _unmapped(here)} else 2
        except ValueError:
            return 1  # a name, which may resolve to any address


class ConnectionGuard:
    """Enforces the limits of this process's listeners at `addresses` (HOST:PORT, unix:PATH)."""

    def __init__(self, addresses: Sequence[str], limits: Limits) -> None:
        self._limits = limits
        # A port identifies a listener: outgoing connections never get the port of a listener.
        self._listeners = [
            _Listener((socket.AF_UNIX,), address.removeprefix("unix:"))
            if address.startswith("unix:")
            else _tcp_listener(address)
            for address in addresses
        ]
        self._inspect_seconds = min(limits.handshake, limits.keepalive_timeout) / 2
        # By inode, oldest first.
        self._sockets: dict[int, _SocketState] = {}
        # Files to close when no file descriptor is left.
        self._spare: list[int] = []
        self._logged_at = -LOG_SECONDS
        self._ended = Counter[str]()
        self.ended = Counter[str]()
        """The connections that were ended, by reason. Only increases."""
        self.connections = 0
        """The connections of all listeners at the last inspection."""

    async def run(self) -> None:
        """Enforce the limits until cancelled."""
        if sys.platform != "linux":
            logger().warning("connection limits unsupported on this system")
            return
        inspected_at = -self._inspect_seconds
        connections = files_then = 0
        rest = 0.0
        # A separate thread: slow host name resolution may occupy all threads of the event loop.
        inspector = ThreadPoolExecutor(1, "guard")
        loop = asyncio.get_running_loop()
        try:
            self._take_spare_files()
            while True:
                await asyncio.sleep(max(COUNT_SECONDS, rest))
                now = time.monotonic()
                # Counts each file opened since then as a connection.
                files = _open_files()
                many = connections + files - files_then > self._limits.connections_max
                if not many and now - inspected_at < self._inspect_seconds:
                    continue
                try:
                    connections = await loop.run_in_executor(inspector, self._inspect_reliably)
                except OSError as error:
                    logger().error("connection check failed", error=error.strerror)
                files_then = files
                inspected_at = time.monotonic()
                rest = REST_FACTOR * (inspected_at - now)
                self._log_closed()
        finally:
            inspector.shutdown(wait=False)
            self._give_spare_files()

    def _inspect_reliably(self) -> int:
        try:
            connections = self.inspect()
        except OSError:
            # No file descriptor was left: many connections arrived since the last inspection.
            self._give_spare_files()
            connections = self.inspect()
        self._take_spare_files()
        return connections

    def _take_spare_files(self) -> None:
        while len(self._spare) < SPARE_FILES:
            self._spare.append(os.open(os.devnull, os.O_RDONLY))

    def _give_spare_files(self) -> None:
        while self._spare:
            os.close(self._spare.pop())

    def inspect(self) -> int:
        """Inspect all connections; end those that exceed a limit or make no progress.

        Return the number of connections of the busiest listener. Takes some 10 µs for each.
        """
        now = time.monotonic()
        files = dict(_sockets())
        # Keyed by inode: the number of a closed file is reused at once.
        self._sockets = {inode: seen for inode, seen in self._sockets.items() if inode in files}
        for inode, end in _own(files, [inode for inode in files if inode not in self._sockets]):
            self._sockets[inode] = _SocketState(self._listener_of(end), now)
        connections: list[int] = []
        too_many: set[int] = set()
        most = 0
        for listener in self._listeners:
            its = [inode for inode, seen in self._sockets.items() if seen.listener is listener]
            connections += its
            most = max(most, len(its))
            # End the newest, as a server that rejects connections would.
            too_many.update(its[self._limits.connections_max :])
        self.connections = len(connections)
        for inode, end in _own(files, connections):
            seen = self._sockets[inode]
            reason = "too_many" if inode in too_many else self._stuck(seen, end, now)
            if reason is not None:
                # Its owner may take a moment to close it, but it no longer counts.
                seen.listener = None
                self._ended[reason] += 1
                self.ended[reason] += 1
                with contextlib.suppress(OSError):  # the client closed it first
                    end.shutdown(socket.SHUT_RDWR)
        return most

    def _stuck(self, seen: _SocketState, end: socket.socket, now: float) -> str | None:
        """Return why a connection counts as stuck, or None if it makes progress.

        TCP only: keepalive covers silent peers on UNIX sockets.
        """
        if end.family == socket.AF_UNIX:
            return None
        info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        if len(info) < _TCP_INFO.size:
            return None  # an older kernel reports fewer fields
        unacked, acked, received, unsent = _TCP_INFO.unpack(info)
        if received < PREFACE_BYTES:
            return "silent" if now - seen.since >= self._limits.handshake else None
        if not (unacked or unsent):
            seen.stuck_since = None
            return None
        # Start counting when the unacknowledged data is first seen: after a pause of this process,
        # the data may have been sent only just now.
        if acked != seen.acked or seen.stuck_since is None:
            seen.acked, seen.stuck_since = acked, now
            return None
        # TCP_USER_TIMEOUT, which grpcio uses, does not help: it never expires for a peer with zero
        # window that keeps sending (Linux 6.18). Keepalive does not ping such a peer either.
        return "unread" if now - seen.stuck_since >= self._limits.keepalive_timeout else None

    def _listener_of(self, end: socket.socket) -> _Listener | None:
        """Return the listener that accepted a connection, or None."""
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
        # Several addresses of this machine may have listeners on the same port.
        return found[0] if len(found) == 1 else min(found, key=lambda one: one.distance(name[0]))

    def _log_closed(self) -> None:
        if self._ended and time.monotonic() - self._logged_at >= LOG_SECONDS:
            logger().warning("connections closed", **self._ended)
            self._logged_at = time.monotonic()
            self._ended.clear()


def _tcp_listener(address: str) -> _Listener:
    host, _, port = address.rpartition(":")
    return _Listener((socket.AF_INET, socket.AF_INET6), port, host.strip("[]"))


def _unmapped(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> object:
    """Return the IPv4 address in an IPv4-mapped IPv6 address (RFC 4291 §2.5.5.2), or None."""
    return getattr(address, "ipv4_mapped", None)


def _sockets() -> Iterator[tuple[int, int]]:
    """Yield the inode and file number of each socket of this process."""
    for name in os.listdir(FILES):  # noqa: PTH208 - avoids a Path object per file
        with contextlib.suppress(OSError):  # closed in the meantime
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield status.st_ino, int(name)


def _own(files: dict[int, int], inodes: Iterable[int]) -> Iterator[tuple[int, socket.socket]]:
    """Yield those that still exist, each as a duplicate that stays valid until the next one.

    The owner may close its own file at any moment, and the kernel may reuse the number for a
    connection to the database.
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
    # From Linux 6.2 on, the directory's size is the number of open files.
    if files := os.stat(FILES).st_size:  # noqa: PTH116 - avoids a Path object
        return files
    try:
        return len(os.listdir(FILES))  # noqa: PTH208 - avoids a Path object per file
    except OSError:
        return sys.maxsize  # no file descriptor is left: assume the maximum

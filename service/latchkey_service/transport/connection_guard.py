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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple

from latchkey_service.access.origin import network_of
from latchkey_service.settings.logs import logger
from latchkey_service.transport.connection_shares import Held, busiest, surplus
from latchkey_service.transport.memory_pressure import KnownPeers, MemoryPressure
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
# Minimum time between two log lines, even under attack.
LOG_SECONDS: Final = 10.0
_FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
# RFC 9113 §3.4: the length of every client's connection preface.
PREFACE_BYTES: Final = 24
# struct tcp_info of Linux: unacked segments, milliseconds since data was received, bytes acked and
# received, bytes not sent yet.
_TCP_INFO: Final = struct.Struct("=24xI24xI64xQQ8xI")


@dataclass(slots=True)
class _SocketState:
    """A socket at the last inspection. `listener` is None if none of our listeners accepted it."""

    listener: "_Listener | None"
    since: float
    peer: str | None = None
    name: str = ""
    """The peer's name in gRPC, or "" without an address."""
    silent_seconds: float = 0.0
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
    """Enforces the limits of this process's listeners at `addresses` (HOST:PORT, unix:PATH).

    The listeners in `shared` have a proxy in front, so the limit per peer address does not apply to
    them. Under `pressure`, connections to the listeners in `strict` end whose peer is not `known`.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        limits: Limits,
        shared: Collection[str] = (),
        strict: Collection[str] = (),
        known: KnownPeers | None = None,
        pressure: MemoryPressure | None = None,
    ) -> None:
        self._limits = limits
        self._shared = {_tcp_listener(a) for a in shared if not a.startswith("unix:")}
        self._strict = {_tcp_listener(a) for a in strict if not a.startswith("unix:")}
        self._known = known or KnownPeers()
        self._pressure = pressure if self._strict else None
        # A port identifies a listener: outgoing connections never get the port of a listener.
        self._listeners = [
            _Listener((socket.AF_UNIX,), address.removeprefix("unix:"))
            if address.startswith("unix:")
            else _tcp_listener(address)
            for address in addresses
        ]
        self._inspect_seconds = min(limits.handshake, limits.keepalive_timeout) / 2
        # How many connections may open before a limit can be exceeded, and how many are closing.
        self._room = self._closing = 0
        # By inode, oldest first.
        self._sockets: dict[int, _SocketState] = {}
        # Files to close when no file descriptor is left.
        self._spare: list[int] = []
        # Peers whose connections the next inspection ends, as gRPC reports them.
        self._unwanted: set[str] = set()
        # Whether the next inspection ends strangers' connections.
        self._short = False
        self._logged_at = -LOG_SECONDS
        self._ended = Counter[str]()
        self.ended = Counter[str]()
        """The connections that were ended, by reason. Only increases."""
        self.connections = 0
        """The connections of all listeners at the last inspection."""

    def end(self, peer: str) -> bool:
        """Request the end of a peer's connection, and return whether that is possible.

        `peer` is as gRPC reports it. Connections without an address cannot be distinguished. If
        there is a proxy, the peer may be that proxy, with other clients on the same connection.
        """
        if sys.platform != "linux" or self._shared or not peer.startswith("ip"):
            return False
        self._unwanted.add(peer)
        return True

    async def run(self) -> None:
        """Enforce the limits until cancelled."""
        if sys.platform != "linux":
            logger().warning("connection limits unsupported on this system")
            return
        inspected_at = -self._inspect_seconds
        files_then = 0
        rest = 0.0
        # A separate thread: slow host name resolution may occupy all threads of the event loop.
        inspector = ThreadPoolExecutor(1, "guard")
        loop = asyncio.get_running_loop()
        try:
            self._take_spare_files()
            while True:
                await asyncio.sleep(COUNT_SECONDS)
                now = time.monotonic()
                # Memory fills fast and rarely needs a check, so that check does not wait out the
                # rest.
                pressed = self._pressure is not None and self._pressure.is_due(now)
                if now - inspected_at < rest and not pressed:
                    continue
                # Counts each file opened since then as a connection.
                files = _open_files()
                many = files - files_then > self._room
                due = now - inspected_at >= self._inspect_seconds
                if not (many or due or pressed or self._unwanted):
                    continue
                try:
                    await loop.run_in_executor(inspector, self._inspect_reliably)
                except Exception as error:  # noqa: BLE001 - the next check may succeed
                    logger().error("connection check failed", error=type(error).__name__)
                files_then = files - self._closing
                inspected_at = time.monotonic()
                rest = REST_FACTOR * (inspected_at - now)
                self._log_closed()
        finally:
            inspector.shutdown(wait=False)
            self._give_spare_files()

    def _inspect_reliably(self) -> None:
        try:
            self.inspect()
        except OSError:
            # No file descriptor was left: many connections arrived since the last inspection.
            self._give_spare_files()
            self.inspect()
        self._take_spare_files()

    def _take_spare_files(self) -> None:
        while len(self._spare) < SPARE_FILES:
            self._spare.append(os.open(os.devnull, os.O_RDONLY))

    def _give_spare_files(self) -> None:
        while self._spare:
            os.close(self._spare.pop())

    def inspect(self) -> None:
        """Inspect all connections; end those that exceed a limit or make no progress.

        Takes about 10 µs for each.
        """
        now = time.monotonic()
        # Both stay until an inspection has ended: one that finds no file descriptor is repeated.
        unwanted = set(self._unwanted)
        pressure = self._pressure
        if pressure is not None and pressure.is_due(now):
            self._short |= pressure.judge(now)
        files = dict(_sockets())
        # Keyed by inode: the number of a closed file is reused at once.
        self._sockets = {inode: seen for inode, seen in self._sockets.items() if inode in files}
        for inode, end in _own(files, [inode for inode in files if inode not in self._sockets]):
            # A socket that cannot be examined must not stop the others. The next inspection
            # examines it again.
            with contextlib.suppress(OSError):
                listener = self._listener_of(end)
                name = "" if listener is None else _grpc_name(end)
                peer = self._peer_of(listener, end)
                self._sockets[inode] = _SocketState(listener, now, peer, name)
        ours = [inode for inode, seen in self._sockets.items() if seen.listener is not None]
        ended: dict[int, str] = {}
        for inode, end in _own(files, ours):
            with contextlib.suppress(OSError):
                reason = self._stuck(self._sockets[inode], end, now)
                if reason is None:
                    reason = self._unwelcome(self._sockets[inode], unwanted, short=self._short)
                if reason is not None:
                    ended[inode] = reason
        self._known.keep({self._sockets[inode].name for inode in ours})
        self.connections = len(ours)
        self._room = sys.maxsize
        for listener in self._listeners:
            its = [
                Held(inode, seen.peer, seen.silent_seconds)
                for inode, seen in self._sockets.items()
                if seen.listener is listener and inode not in ended
            ]
            ended |= self._surplus(its)
        self._closing = len(ended)
        for inode, end in _own(files, ended):
            # Its owner may take a moment to close it, but it no longer counts.
            self._sockets[inode].listener = None
            self._ended[ended[inode]] += 1
            self.ended[ended[inode]] += 1
            with contextlib.suppress(OSError):  # the client closed it first
                end.shutdown(socket.SHUT_RDWR)
        # Others may have been added meanwhile.
        self._unwanted -= unwanted
        self._short = False

    def _unwelcome(
        self, seen: _SocketState, unwanted: Collection[str], *, short: bool
    ) -> str | None:
        """Return why a connection must end because of its peer, or None.

        `short`: memory is short.
        """
        if seen.name in unwanted:
            return "refused"
        stranger = seen.listener in self._strict and seen.name not in self._known
        return "memory" if short and stranger else None

    def _surplus(self, its: Sequence[Held]) -> Mapping[int, str]:
        """Return the connections of a listener that exceed a limit, and update the room left."""
        total_max, peer_max = self._limits.connections_max, self._limits.connections_per_address
        self._room = min(self._room, max(0, total_max - len(its)))
        if peer_max:
            self._room = min(self._room, max(0, peer_max - busiest(its)))
        return surplus(its, total_max, peer_max)

    def _peer_of(self, listener: "_Listener | None", end: socket.socket) -> str | None:
        if listener is None or listener in self._shared or end.family == socket.AF_UNIX:
            return None
        try:
            return network_of(str(end.getpeername()[0]))
        except OSError:  # the client closed it
            return None

    def _stuck(self, seen: _SocketState, end: socket.socket, now: float) -> str | None:
        """Return why a connection counts as stuck, or None if it makes progress.

        TCP only: keepalive covers silent peers on UNIX sockets.
        """
        if end.family == socket.AF_UNIX:
            return None
        info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        if len(info) < _TCP_INFO.size:
            return None  # an older kernel reports fewer fields
        unacked, silent_ms, acked, received, unsent = _TCP_INFO.unpack(info)
        seen.silent_seconds = min(silent_ms / 1_000, now - seen.since)
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


def _grpc_name(end: socket.socket) -> str:
    """Return the name that gRPC gives to the peer of a connection, or "" without an address."""
    if end.family == socket.AF_UNIX:
        return ""
    host, port, *more = end.getpeername()
    address = ipaddress.ip_address(host)
    mapped = _unmapped(address)
    if address.version == 4 or mapped is not None:
        return f"ipv4:{mapped or address}:{port}"
    # Link-local addresses have a zone: the number of the network interface.
    zone = f"%25{more[1]}" if more[1] else ""
    return f"ipv6:%5B{host}{zone}%5D:{port}"


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

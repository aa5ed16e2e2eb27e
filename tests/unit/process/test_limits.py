"""Limits computed from settings, the limit on open files, and the kernel's data."""

import resource
import socket
from typing import Any

import pytest
from latchkey_service.process import worker_watch
from latchkey_service.process.worker_watch import MIB, memory_max_bytes
from latchkey_service.settings.exposure import transport_of
from latchkey_service.settings.settings import Settings
from latchkey_service.transport import connection_guard, transports
from latchkey_service.transport.transports import Limits, limits_of


def settings(**given: Any) -> Settings:
    return Settings(_env_file=None, **given)


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:50051", "native"),
        ("localhost:50051", "native"),
        ("[::1]:50051", "native"),
        ("unix:/run/latchkey.sock", "native"),
        ("0.0.0.0:50051", "grpcio"),
        ("10.0.0.1:50051", "grpcio"),
        ("latchkey.internal:50051", "grpcio"),
    ],
)
def test_transport(listen: str, expected: str) -> None:
    """By default, `native` serves only this machine. Either transport may be set explicitly."""
    assert transport_of(settings(listen=listen)) == expected
    assert transport_of(settings(listen=listen, transport="native")) == "native"
    assert transport_of(settings(listen=listen, transport="grpcio")) == "grpcio"


@pytest.mark.parametrize(
    ("given", "files", "expected"),
    [
        ({"transport": "native"}, 1_048_576, 10_000),
        ({"transport": "native"}, 15_300, 5_000),
        ({"transport": "grpcio"}, 15_300, 10_000),
        ({"transport": "grpcio"}, 5_300, 5_000),
        ({"transport": "native", "tls_listen": "0.0.0.0:50052"}, 20_300, 5_000),
        ({"transport": "native"}, resource.RLIM_INFINITY, 10_000),
        ({"transport": "native", "connections_max": 7}, 1_048_576, 7),
        ({"transport": "native"}, 64, 1),
    ],
)
def test_connections_and_files(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], files: int, expected: int
) -> None:
    """The limit on open files also limits the connections."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert limits_of(settings(**given)).connections_max == expected


def test_files_per_connection() -> None:
    """A client that watches over `native` uses as many files as the computation assumes."""
    # integration/process/test_limits.py counts the files of a real service.
    assert transports.FILES_PER_CONNECTION == {"native": 3, "grpcio": 1}


def test_memory() -> None:
    """The limit grows with the settings. It can be set explicitly; 0 means no limit."""
    plain = memory_max_bytes(settings())
    assert plain > worker_watch.BASE_MIB * MIB
    # Cache entries take about 500 bytes each, and a Watch about 60 kB.
    assert memory_max_bytes(settings(cache_entries=10_100_000)) - plain > 10_000_000 * 500
    assert memory_max_bytes(settings(connections_max=110_000)) - plain > 100_000 * 60_000
    assert memory_max_bytes(settings(memory_mib=300)) == 300 * MIB
    assert memory_max_bytes(settings(memory_mib=0)) == 0


class End:
    """A TCP connection, as the kernel reports it."""

    family = socket.AF_INET

    def __init__(self) -> None:
        self.unacked = self.acked = 0

    def getsockopt(self, *_: object) -> bytes:
        return connection_guard._TCP_INFO.pack(self.unacked, 0, self.acked, 1_000, 0)


def test_idle_connection_is_not_stuck_at_once() -> None:
    """The timeout runs from when unacknowledged data is first seen, however long the connection was
    idle or unchecked before. If the data is not acknowledged by then, the connection is stuck."""
    guard = connection_guard.ConnectionGuard(["127.0.0.1:1"], Limits(keepalive_timeout=10.0))
    seen: Any = connection_guard._SocketState(None, 0.0)
    end: Any = End()
    assert guard._stuck(seen, end, 100.0) is None
    end.unacked = 1
    assert guard._stuck(seen, end, 130.0) is None
    assert guard._stuck(seen, end, 139.0) is None
    assert guard._stuck(seen, end, 140.0) == "unread"
    end.acked = 1
    assert guard._stuck(seen, end, 150.0) is None


@pytest.mark.parametrize(
    ("addresses", "local", "expected"),
    [
        (["127.0.0.1:5", "127.0.0.2:5"], ("127.0.0.2", 5), 1),
        (["127.0.0.1:5", "127.0.0.2:5"], ("127.0.0.1", 5), 0),
        (["[::1]:5", "127.0.0.1:5"], ("::1", 5, 0, 0), 0),
        (["[::1]:5", "127.0.0.1:5"], ("::ffff:127.0.0.1", 5, 0, 0), 1),
        (["10.0.0.1:5", "localhost:5"], ("127.0.0.1", 5), 1),
        (["10.0.0.1:5", "localhost:5"], ("fe80::1%eth0", 5, 0, 2), 1),
        (["10.0.0.1:5", "localhost:5"], ("10.0.0.1", 5), 0),
        (["0.0.0.0:5"], ("10.0.0.1", 5), 0),
        (["127.0.0.1:5", "0.0.0.0:6"], ("127.0.0.1", 6), 1),
        (["127.0.0.1:5", "127.0.0.2:5"], ("127.0.0.1", 7), None),
    ],
)
def test_connections_belong_to_their_listener(
    addresses: list[str], local: tuple[Any, ...], expected: int | None
) -> None:
    """A connection belongs to the listener whose address it reached, even on a shared port."""
    guard = connection_guard.ConnectionGuard(addresses, Limits())

    class Came(End):
        family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET

        def getsockname(self) -> tuple[Any, ...]:
            return local

        def getsockopt(self, *_: object) -> bytes:
            return b""

    end: Any = Came()
    found = guard._listener_of(end)
    assert found == (None if expected is None else guard._listeners[expected])

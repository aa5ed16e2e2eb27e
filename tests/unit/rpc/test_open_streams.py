"""Streams that need no identity: how many one client may open."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from unittest.mock import Mock

import pytest
from latchkey_service.audit.audit_log import AuditLog
from latchkey_service.errors import PermissionDenied
from latchkey_service.rpc.call_report import CallReporter
from latchkey_service.rpc.counters import Counts
from latchkey_service.rpc.streams import OPEN_STREAMS_PER_ADDRESS_MAX as SHARE
from latchkey_service.rpc.streams import Streams

WATCH = "/grpc.health.v1.Health/Watch"


class Context:
    """A call from a peer, with the address that a proxy reports, if any."""

    def __init__(self, peer: str, client: str) -> None:
        self._peer, self._client = peer, client
        self.code: Any = None

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> Any:
        return (("x-forwarded-for", self._client),) if self._client else ()

    def set_code(self, code: Any) -> None:
        self.code = code

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, metadata: Any) -> None: ...

    def time_remaining(self) -> None: ...


class Scene:
    """The streams of a worker, which stay open."""

    def __init__(self, *, proxied: bool) -> None:
        table: Any = None
        audit = AuditLog(table, lambda: 0.0, lambda: datetime.now(UTC))
        streams = Streams(CallReporter(Counts(), audit, lambda: 0.0), lambda: 0.0, self._no_sleep)
        self._handler = streams.open_stream(WATCH, self._answers, bytes, proxied=proxied)
        self._open: list[Any] = []

    async def _no_sleep(self, _seconds: float) -> None: ...

    async def _answers(self, _request: Any, _context: Any) -> AsyncIterator[bytes]:
        while True:
            yield b"serving"

    async def accepts(self, peer: str, client: str = "") -> bool:
        context = Context(peer, client)
        stream = self._handler(b"", context)
        self._open.append(stream)
        async for _ in stream:
            return True
        assert context.code is not None
        return False


@pytest.mark.parametrize("peer", ["unix:3", "ipv4:127.0.0.1:{}"])
async def test_clients_of_a_proxy_have_a_share_each(peer: str) -> None:
    """Behind the trusted proxy, a client uses up its own share, and not that of others."""
    scene = Scene(proxied=True)
    found = [await scene.accepts(peer.format(n), "192.0.2.1") for n in range(SHARE + 1)]
    assert found == [True] * SHARE + [False]
    assert await scene.accepts(peer.format(9), "192.0.2.2")


async def test_an_ipv6_network_is_one_client() -> None:
    """A client cannot get more streams with more addresses of its IPv6 network."""
    scene = Scene(proxied=False)
    found = [await scene.accepts(f"ipv6:%5B2001:db8::{n:x}%5D:5") for n in range(SHARE + 1)]
    assert found == [True] * SHARE + [False]
    assert await scene.accepts("ipv6:%5B2001:db8:0:1::1%5D:5")


async def test_clients_cannot_name_their_addresses_themselves() -> None:
    """Without a trusted proxy, the header with addresses does not count."""
    scene = Scene(proxied=False)
    found = [await scene.accepts("ipv4:192.0.2.1:5", f"10.0.0.{n}") for n in range(SHARE + 1)]
    assert found == [True] * SHARE + [False]


def test_a_stream_that_cannot_be_checked_ends_alone() -> None:
    """After a change to the policy, each stream is checked. A stream ends if it cannot be checked
    or is no longer allowed.
    """
    table: Any = None
    audit = AuditLog(table, lambda: 0.0, lambda: datetime.now(UTC))
    streams = Streams(CallReporter(Counts(), audit, lambda: 0.0), lambda: 0.0)
    ended: list[str] = []

    def stream(name: str, error: Exception) -> Any:
        def authorize(*_: object) -> Any:
            raise error

        made = Mock(path=WATCH, denied=None)
        made.authenticator.authorize = authorize
        made.task.cancel = lambda: ended.append(name)
        return made

    denied = PermissionDenied("no", "METHOD_DENIED")
    for name, error in (("a", denied), ("b", ZeroDivisionError()), ("c", denied)):
        streams._streams.add(stream(name, error))
    streams.recheck()
    assert sorted(ended) == ["a", "b", "c"]

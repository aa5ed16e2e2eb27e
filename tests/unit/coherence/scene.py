"""A server process with a lease, as the pure classes see it, with the clock passed in.

Only the tests in this folder examine each decision of a server at its boundary.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

from latchkey_coherence.verdict_cache import Entry, Position, VerdictCache
from latchkey_service.coherence.client_leases import ClientLeases
from latchkey_service.coherence.verifier_state import Change, Log, Server, VerifierState
from latchkey_service.coherence.watch_sessions import (
    Event,
    Grant,
    Request,
    WatchSession,
    WatchSessions,
)

from tests.helpers.positions import at

__all__ = [
    "LEASE_SECONDS",
    "PRIMARY",
    "Scene",
    "caught_up",
    "confirmed",
    "grants",
    "leased",
    "log",
    "request",
]

LEASE_SECONDS = 3.0
PRIMARY = Server("7000", "00000001")


def log(
    head: Position, *changes: tuple[Position, str], known: bool = True, server: Server = PRIMARY
) -> Log:
    """Return a log with these changes, each of one token."""
    return Log(known, server, head, tuple(Change(p, (token,)) for p, token in changes))


def request(applied: Position, number: int = 0, *, released: bool = False) -> Request:
    return Request(applied, number, released)


class Scene:
    """A process with a lease, and streams that a test feeds by hand."""

    def __init__(self, position: Position = at(0)) -> None:  # noqa: B008 - immutable
        self.now = 100.0
        self.state: VerifierState[Any] = VerifierState(
            VerdictCache(10), ClientLeases(), LEASE_SECONDS
        )
        self.state.register(position, position.revision, PRIMARY, self.now)
        self.renew()
        self.log_reads = 0
        self.sessions = self.make_sessions()
        self.said: asyncio.Queue[Request] = asyncio.Queue()
        self.sent: asyncio.Queue[Event] = asyncio.Queue()
        self.reads = asyncio.Event()
        self.reads.set()

    def make_sessions(self, **options: Any) -> WatchSessions:
        def read_log() -> None:
            self.log_reads += 1

        return WatchSessions(
            self.state, lambda: self.now, lambda: None, read_log, enabled=True, **options
        )

    def renew(self) -> None:
        """Renew the lease with a statement that finds no news, and acknowledge what is possible."""
        self.state.renew(self.now, self.state.acknowledgeable(self.now))

    def apply(self, *changes: tuple[Position, str]) -> None:
        """Apply a log that is read now, without renewing."""
        head = changes[-1][0] if changes else self.state.cache.position
        self.state.apply(log(head, *changes, server=self.state.server), self.now)

    async def requests(self) -> AsyncIterator[Request]:
        while True:
            yield await self.said.get()

    async def send(self, event: Event) -> None:
        await self.reads.wait()
        await self.sent.put(event)

    def serve(self) -> "asyncio.Task[None]":
        return asyncio.create_task(self.sessions.serve(self.requests(), self.send, "a client"))


def grants(events: Sequence[object]) -> list[Grant]:
    return [event for event in events if isinstance(event, Grant)]


def confirmed(scene: Scene) -> WatchSession:
    """Return a session whose client is at the process's position and has no lease."""
    session = WatchSession(scene.state, "a client")
    position = scene.state.cache.position
    session.receive(request(position), scene.now)
    assert session.take(scene.now) == []
    return session


def leased(scene: Scene) -> WatchSession:
    """Return a session whose client has confirmed everything and has a lease."""
    session = confirmed(scene)
    session.receive(request(scene.state.cache.position, 1), scene.now)
    (grant,) = session.take(scene.now)
    assert isinstance(grant, Grant)
    assert session.lease.ends == scene.state.lease_ends
    return session


def caught_up() -> Scene:
    """Return a process that started at revision 10, has applied 11 and 13, and caches a token."""
    scene = Scene(at(10))
    scene.apply((at(11), "a"), (at(13), "b"))
    scene.renew()
    assert scene.state.cache.store(b"k", Entry("t", math.inf), at(13))
    return scene

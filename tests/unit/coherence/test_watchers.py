"""Streams whose clients misbehave, with the clock passed in: they hold up nobody."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from latchkey_coherence.memory import Memory
from latchkey_service.coherence import watch
from latchkey_service.coherence.membership import Log, Membership
from latchkey_service.coherence.subleases import SubLeases
from latchkey_service.coherence.watch import Event, Request, Watcher, Watchers
from latchkey_service.errors import Overloaded, Unavailable, WatcherSilent

from tests.support import eventually

LEASE_SECONDS = 3.0


class Scene:
    """A process with a lease, and streams to it that a test feeds by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.membership: Membership[Any] = Membership(Memory(10), SubLeases(), LEASE_SECONDS)
        self.membership.register(0, 0)
        self.membership.renew(self.now, 0)
        self.watchers = Watchers(self.membership, lambda: self.now, lambda: None, enabled=True)
        self.said: asyncio.Queue[Request] = asyncio.Queue()
        self.sent: asyncio.Queue[Event] = asyncio.Queue()
        self.reads = asyncio.Event()
        self.reads.set()

    async def requests(self) -> AsyncIterator[Request]:
        while True:
            yield await self.said.get()

    async def send(self, event: Event) -> None:
        await self.reads.wait()
        await self.sent.put(event)

    def serve(self) -> "asyncio.Task[None]":
        return asyncio.create_task(self.watchers.serve(self.requests(), self.send))


async def test_one_that_reads_nothing_is_dropped() -> None:
    """A client whose messages pile up on the way is dropped after a few leases, while others are
    served as ever."""
    scene = Scene()
    scene.reads.clear()
    stream = scene.serve()
    await scene.said.put(Request(0, 1, released=False))
    await eventually(lambda: scene.membership.subleases.floor(scene.now) is not None, "a grant")
    scene.now += watch.SILENT_LEASES * LEASE_SECONDS + 0.1
    scene.watchers.on_news()
    with pytest.raises(asyncio.CancelledError):
        await stream
    assert len(scene.watchers) == 0


async def test_one_that_says_nothing_is_dropped() -> None:
    """It is told why."""
    scene = Scene()
    stream = scene.serve()
    await asyncio.sleep(0)
    scene.now += watch.SILENT_LEASES * LEASE_SECONDS + 0.1
    scene.watchers.on_news()
    with pytest.raises(WatcherSilent):
        await stream


async def test_there_is_a_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is refused, and takes nothing from the others."""
    monkeypatch.setattr(watch, "WATCHERS_MAX", 1)
    scene = Scene()
    first = scene.serve()
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await scene.watchers.serve(scene.requests(), scene.send)
    await scene.said.put(Request(0, 1, released=False))
    assert isinstance(await scene.sent.get(), watch.Grant)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_without_a_lease_of_its_own_it_grants_none() -> None:
    """The request is kept, and answered once the lease is renewed."""
    scene = Scene()
    scene.now += LEASE_SECONDS
    stream = scene.serve()
    await scene.said.put(Request(0, 1, released=False))
    await eventually(scene.said.empty, "the request is heard")
    scene.watchers.on_news()
    await asyncio.sleep(0)
    assert scene.sent.empty()
    scene.membership.renew(scene.now, 0)
    scene.watchers.on_news()
    assert isinstance(await scene.sent.get(), watch.Grant)
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)


async def test_who_waits_for_a_grant_is_not_silent() -> None:
    """However long the process was without a lease: it is granted to once there is one, and is
    dropped a few leases later if nothing is heard of it then."""
    scene = Scene()
    scene.now += LEASE_SECONDS
    stream = scene.serve()
    await scene.said.put(Request(0, 1, released=False))
    await eventually(scene.said.empty, "the request is heard")
    scene.now += 10 * watch.SILENT_LEASES * LEASE_SECONDS
    scene.membership.renew(scene.now, 0)
    scene.watchers.on_news()
    assert isinstance(await scene.sent.get(), watch.Grant)
    scene.now += watch.SILENT_LEASES * LEASE_SECONDS + 0.1
    scene.watchers.on_news()
    with pytest.raises(WatcherSilent):
        await stream


def test_a_database_that_was_set_back() -> None:
    """What clients confirmed of its former history counts for nothing, from the moment on in which
    it is noticed; they begin anew."""
    scene = Scene()
    membership = scene.membership
    membership.apply(Log(50, ("a",)))
    watcher = Watcher(membership)
    watcher.hear(Request(50, 1, released=False), scene.now)
    watcher.take(scene.now)
    watcher.hear(Request(50, 0, released=False), scene.now)
    assert membership.acknowledgeable(scene.now) == 50
    membership.apply(Log(40, ()))
    assert membership.acknowledgeable(scene.now) == 0
    assert watch.Reset(40) in watcher.take(scene.now)
    # What was on its way then is still about the former history.
    watcher.hear(Request(50, 0, released=False), scene.now)
    assert membership.acknowledgeable(scene.now) == 0
    watcher.hear(Request(40, 0, released=False), scene.now)
    assert membership.acknowledgeable(scene.now) == 40
    membership.apply(Log(41, ("b",)))
    assert membership.acknowledgeable(scene.now) == 40


async def test_an_old_one_is_asked_to_move() -> None:
    """A client whose stream is old is told Closing, and gets no grant on it any more; one that
    stays is ended after a few leases, when it holds none."""
    scene = Scene()
    scene.watchers = Watchers(
        scene.membership, lambda: scene.now, lambda: None, enabled=True, stream_seconds=100.0
    )
    stream = scene.serve()
    began = scene.now
    numbers = itertools.count(1)

    async def events_at(age: float) -> list[type[Event]]:
        """Have the client ask at this age, and the heart beat; return what came."""
        scene.now = began + age
        (served,) = scene.watchers._streams
        await scene.said.put(Request(0, next(numbers), released=False))
        await eventually(lambda: served.watcher.heard == scene.now, "it is heard")
        scene.membership.renew(scene.now, 0)
        scene.watchers.on_news()
        for _ in range(5):
            await asyncio.sleep(0)
        return [type(scene.sent.get_nowait()) for _ in range(scene.sent.qsize())]

    await asyncio.sleep(0)
    assert await events_at(0.0) == [watch.Grant]
    assert await events_at(100.0 * watch.MOVE_FROM - 1.0) == [watch.Grant]
    oldest = 100.0 * watch.MOVE_TO
    assert await events_at(oldest) == [watch.Closing]
    assert await events_at(oldest + 1.0) == []
    assert not stream.done()
    assert await events_at(oldest + watch.SILENT_LEASES * LEASE_SECONDS + 1.0) == []
    with pytest.raises(Unavailable):
        await stream
    assert scene.membership.subleases.floor(scene.now) is None

"""Streams whose clients misbehave, with the clock passed in: they hold up nobody."""

import asyncio
import itertools

import pytest
from latchkey_coherence.memory import NOWHERE
from latchkey_service.coherence import watch_sessions
from latchkey_service.coherence.watch_sessions import Event, Reset
from latchkey_service.errors import Overloaded, Unavailable, WatcherSilent

from tests.positions import at
from tests.support import eventually
from tests.unit.coherence.scene import LEASE_SECONDS, Scene, request


async def granted(scene: Scene) -> None:
    """Have an empty client ask for a lease, wait for it, and confirm where it begins."""
    await scene.said.put(request(NOWHERE, 1))
    assert await scene.sent.get() == Reset(at(0))
    assert isinstance(await scene.sent.get(), watch_sessions.Grant)
    await scene.said.put(request(at(0)))
    await eventually(scene.said.empty, "the confirmation is heard")


async def test_one_that_reads_nothing_is_dropped() -> None:
    """A client whose messages pile up on the way is dropped after a few leases, while others are
    served as ever."""
    scene = Scene()
    scene.reads.clear()
    stream = scene.serve()
    await scene.said.put(request(NOWHERE, 1))
    await eventually(lambda: scene.membership.subleases.floor(scene.now) is not None, "a grant")
    scene.now += watch_sessions.SILENT_LEASES * LEASE_SECONDS + 0.1
    scene.watchers.on_news(False)
    with pytest.raises(asyncio.CancelledError):
        await stream
    assert len(scene.watchers) == 0


async def test_one_that_says_nothing_is_dropped() -> None:
    """It is told why."""
    scene = Scene()
    stream = scene.serve()
    await asyncio.sleep(0)
    scene.now += watch_sessions.SILENT_LEASES * LEASE_SECONDS + 0.1
    scene.watchers.on_news(False)
    with pytest.raises(WatcherSilent):
        await stream


async def test_there_is_a_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is refused, and takes nothing from the others."""
    monkeypatch.setattr(watch_sessions, "WATCHERS_MAX", 1)
    scene = Scene()
    first = scene.serve()
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await scene.watchers.serve(scene.requests(), scene.send)
    await granted(scene)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_without_a_lease_of_its_own_it_grants_none() -> None:
    """The request is kept, and answered once the lease is renewed."""
    scene = Scene()
    scene.now += LEASE_SECONDS
    stream = scene.serve()
    await scene.said.put(request(NOWHERE, 1))
    await eventually(scene.said.empty, "the request is heard")
    scene.watchers.on_news(False)
    await asyncio.sleep(0)
    assert [scene.sent.get_nowait() for _ in range(scene.sent.qsize())] == [Reset(at(0))]
    scene.renew()
    scene.watchers.on_news(False)
    assert isinstance(await scene.sent.get(), watch_sessions.Grant)
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)


async def test_who_waits_for_a_grant_is_not_silent() -> None:
    """However long the process was without a lease: it is granted to once there is one, and is
    dropped a few leases later if nothing is heard of it then."""
    scene = Scene()
    scene.now += LEASE_SECONDS
    stream = scene.serve()
    await scene.said.put(request(NOWHERE, 1))
    await eventually(scene.said.empty, "the request is heard")
    scene.now += 10 * watch_sessions.SILENT_LEASES * LEASE_SECONDS
    scene.renew()
    scene.watchers.on_news(False)
    assert await scene.sent.get() == Reset(at(0))
    assert isinstance(await scene.sent.get(), watch_sessions.Grant)
    scene.now += watch_sessions.SILENT_LEASES * LEASE_SECONDS + 0.1
    scene.watchers.on_news(False)
    with pytest.raises(WatcherSilent):
        await stream


async def test_an_old_one_is_asked_to_move() -> None:
    """A client whose stream is old is told Closing, and gets no grant on it any more; one that
    stays is ended after a few leases, when it holds none."""
    scene = Scene()
    scene.watchers = scene.make_watchers(stream_seconds=100.0)
    stream = scene.serve()
    began = scene.now
    numbers = itertools.count(1)

    async def events_at(age: float) -> list[type[Event]]:
        """Have the client ask at this age, and the heart beat; return what came."""
        scene.now = began + age
        (served,) = scene.watchers._streams
        await scene.said.put(request(at(0), next(numbers)))
        await eventually(lambda: served.watcher.heard == scene.now, "it is heard")
        scene.renew()
        scene.watchers.on_news(False)
        for _ in range(5):
            await asyncio.sleep(0)
        return [type(scene.sent.get_nowait()) for _ in range(scene.sent.qsize())]

    await asyncio.sleep(0)
    assert await events_at(0.0) == [watch_sessions.Grant]
    assert await events_at(100.0 * watch_sessions.MOVE_FROM - 1.0) == [watch_sessions.Grant]
    oldest = 100.0 * watch_sessions.MOVE_TO
    assert await events_at(oldest) == [watch_sessions.Closing]
    assert await events_at(oldest + 1.0) == []
    assert not stream.done()
    assert await events_at(oldest + watch_sessions.SILENT_LEASES * LEASE_SECONDS + 1.0) == []
    with pytest.raises(Unavailable):
        await stream
    assert scene.membership.subleases.floor(scene.now) is None


async def test_a_client_that_may_be_ahead_has_the_log_read() -> None:
    """At once, and again where the read that was applied had begun before its word came."""
    scene = Scene()
    stream = scene.serve()
    await scene.said.put(request(at(1), 1))
    await eventually(lambda: scene.log_reads == 1, "the log is read")
    scene.apply()
    scene.watchers.on_news(False)
    await asyncio.sleep(0)
    assert scene.sent.empty()
    scene.now += 0.1
    scene.apply((at(1), "t"))
    scene.watchers.on_news(True)
    assert isinstance(await scene.sent.get(), watch_sessions.Grant)
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)


async def test_a_confirmation_sets_free_what_was_held_back() -> None:
    """The grant and the news that waited for it are sent when it comes, not at the next beat."""
    scene = Scene()
    stream = scene.serve()
    await granted(scene)
    scene.apply((at(1), "a"))
    scene.watchers.on_news(True)
    assert await scene.sent.get() == watch_sessions.Invalidation(at(1), ["a"])
    await scene.said.put(request(at(0), 2))
    await eventually(scene.said.empty, "the request is heard")
    scene.apply((at(2), "b"))
    scene.watchers.on_news(True)
    await asyncio.sleep(0)
    assert scene.sent.empty()
    await scene.said.put(request(at(1)))
    assert isinstance(await scene.sent.get(), watch_sessions.Grant)
    assert await scene.sent.get() == watch_sessions.Invalidation(at(2), ["b"])
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)


async def test_clients_that_are_waited_for_are_named() -> None:
    """The caller and address of a stream are what people see when a revision waits for it."""
    scene = Scene()
    stream = scene.serve()
    await granted(scene)
    assert scene.membership.waiting_for(scene.now) == (0.0, [])
    scene.apply((at(1), "a"))
    scene.now += 1.0
    scene.renew()
    seconds, names = scene.membership.waiting_for(scene.now)
    assert seconds == pytest.approx(1.0)
    assert names == ["a client"]
    await scene.said.put(request(at(1)))
    await eventually(lambda: scene.membership.acknowledgeable(scene.now) == 1, "a confirmation")
    assert scene.membership.waiting_for(scene.now) == (0.0, [])
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)

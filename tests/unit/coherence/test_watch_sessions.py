"""Streams of misbehaving clients do not delay others. The clock is passed in."""

import asyncio
import itertools

import pytest
from latchkey_coherence.verdict_cache import NOWHERE
from latchkey_service.coherence import watch_sessions
from latchkey_service.coherence.watch_sessions import Event, Reset
from latchkey_service.errors import Overloaded, Unavailable, WatchTimedOut

from tests.helpers.positions import at
from tests.helpers.waiting import eventually
from tests.unit.coherence.scene import LEASE_SECONDS, Scene, request


async def granted(scene: Scene) -> None:
    """Let an empty client ask for a lease, receive it, and confirm its first position."""
    await scene.said.put(request(NOWHERE, 1))
    assert await scene.sent.get() == Reset(at(0))
    assert isinstance(await scene.sent.get(), watch_sessions.Grant)
    await scene.said.put(request(at(0)))
    await eventually(scene.said.empty, "the confirmation is received")


async def test_a_client_that_does_not_read_is_dropped() -> None:
    """A client whose messages pile up unread is dropped after a few leases."""
    scene = Scene()
    scene.reads.clear()
    stream = scene.serve()
    await scene.said.put(request(NOWHERE, 1))
    await eventually(lambda: scene.state.client_leases.floor(scene.now) is not None, "a grant")
    scene.now += watch_sessions.SILENT_LEASES * LEASE_SECONDS + 0.1
    scene.sessions.on_news(False)
    with pytest.raises(asyncio.CancelledError):
        await stream
    assert len(scene.sessions) == 0


async def test_a_silent_client_is_dropped() -> None:
    """The error names the reason."""
    scene = Scene()
    stream = scene.serve()
    await asyncio.sleep(0)
    scene.now += watch_sessions.SILENT_LEASES * LEASE_SECONDS + 0.1
    scene.sessions.on_news(False)
    with pytest.raises(WatchTimedOut):
        await stream


async def test_a_silent_client_that_owes_a_confirmation_is_dropped() -> None:
    """The server has answered what the client asked, so it is the client that keeps the other
    waiting."""
    scene = Scene()
    stream = scene.serve()
    await scene.said.put(request(at(0, 2), 1))
    assert await scene.sent.get() == Reset(at(0))
    scene.now += watch_sessions.SILENT_LEASES * LEASE_SECONDS + 0.1
    scene.sessions.on_news(False)
    with pytest.raises(WatchTimedOut):
        await stream


async def test_number_of_streams_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream above the maximum is refused, and the others are not affected."""
    monkeypatch.setattr(watch_sessions, "WATCH_SESSIONS_MAX", 1)
    scene = Scene()
    first = scene.serve()
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await scene.sessions.serve(scene.requests(), scene.send)
    await granted(scene)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_no_grant_before_the_server_has_a_lease() -> None:
    """The request is kept, and answered once the lease is renewed."""
    scene = Scene()
    scene.now += LEASE_SECONDS
    stream = scene.serve()
    await scene.said.put(request(NOWHERE, 1))
    await eventually(scene.said.empty, "the request is received")
    scene.sessions.on_news(False)
    await asyncio.sleep(0)
    assert [scene.sent.get_nowait() for _ in range(scene.sent.qsize())] == [Reset(at(0))]
    scene.renew()
    scene.sessions.on_news(False)
    assert isinstance(await scene.sent.get(), watch_sessions.Grant)
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)


async def test_a_client_that_waits_for_a_grant_is_not_silent() -> None:
    """However long the process was without a lease, the client gets a grant once there is one. It
    is dropped a few leases later if it stays silent then."""
    scene = Scene()
    scene.now += LEASE_SECONDS
    stream = scene.serve()
    await scene.said.put(request(NOWHERE, 1))
    await eventually(scene.said.empty, "the request is received")
    scene.now += 10 * watch_sessions.SILENT_LEASES * LEASE_SECONDS
    scene.renew()
    scene.sessions.on_news(False)
    assert await scene.sent.get() == Reset(at(0))
    assert isinstance(await scene.sent.get(), watch_sessions.Grant)
    scene.now += watch_sessions.SILENT_LEASES * LEASE_SECONDS + 0.1
    scene.sessions.on_news(False)
    with pytest.raises(WatchTimedOut):
        await stream


async def test_an_old_stream_is_asked_to_move() -> None:
    """A client whose stream is old receives Closing and no further grant. If it stays, the stream
    is ended after a few leases, when the client holds none."""
    scene = Scene()
    scene.sessions = scene.make_sessions(stream_seconds=100.0)
    stream = scene.serve()
    began = scene.now
    numbers = itertools.count(1)

    async def events_at(age: float) -> list[type[Event]]:
        """Let the client ask at this age and the lease be renewed. Return the types of the events
        sent."""
        scene.now = began + age
        (served,) = scene.sessions._streams
        await scene.said.put(request(at(0), next(numbers)))
        await eventually(lambda: served.session.last_heard == scene.now, "it is received")
        scene.renew()
        scene.sessions.on_news(False)
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
    assert scene.state.client_leases.floor(scene.now) is None


async def test_a_client_that_may_be_ahead_triggers_a_read_of_the_log() -> None:
    """The log is read at once. The client is judged by a read that began after its message."""
    scene = Scene()
    stream = scene.serve()
    await scene.said.put(request(at(1), 1))
    await eventually(lambda: scene.log_reads == 1, "the log is read")
    scene.apply()
    scene.sessions.on_news(False)
    await asyncio.sleep(0)
    assert scene.sent.empty()
    scene.now += 0.1
    scene.apply((at(1), "t"))
    scene.sessions.on_news(True)
    assert isinstance(await scene.sent.get(), watch_sessions.Grant)
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)


async def test_a_confirmation_releases_held_back_messages() -> None:
    """The grant and the news that waited for it are sent when it arrives, not at the next
    renewal."""
    scene = Scene()
    stream = scene.serve()
    await granted(scene)
    scene.apply((at(1), "a"))
    scene.sessions.on_news(True)
    assert await scene.sent.get() == watch_sessions.Invalidation(at(1), ["a"])
    await scene.said.put(request(at(0), 2))
    await eventually(scene.said.empty, "the request is received")
    scene.apply((at(2), "b"))
    scene.sessions.on_news(True)
    await asyncio.sleep(0)
    assert scene.sent.empty()
    await scene.said.put(request(at(1)))
    assert isinstance(await scene.sent.get(), watch_sessions.Grant)
    assert await scene.sent.get() == watch_sessions.Invalidation(at(2), ["b"])
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)


async def test_clients_that_delay_a_revision_are_named() -> None:
    """Status and log name the caller and address of a stream that a revision waits for."""
    scene = Scene()
    stream = scene.serve()
    await granted(scene)
    assert scene.state.waiting_for(scene.now) == (0.0, [])
    scene.apply((at(1), "a"))
    scene.now += 1.0
    scene.renew()
    seconds, names = scene.state.waiting_for(scene.now)
    assert seconds == pytest.approx(1.0)
    assert names == ["a client"]
    await scene.said.put(request(at(1)))
    await eventually(lambda: scene.state.acknowledgeable(scene.now) == 1, "a confirmation")
    assert scene.state.waiting_for(scene.now) == (0.0, [])
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)

"""The meaning of a client's confirmation, and the end of a stream. Pure, with the clock passed
in.
"""

import math

import pytest
from latchkey_coherence.verdict_cache import Position
from latchkey_service.coherence.verifier_state import Server
from latchkey_service.coherence.watch_sessions import (
    Closing,
    Grant,
    Invalidation,
    Reset,
)

from tests.helpers.positions import at
from tests.unit.coherence.scene import Scene, confirmed, grants, leased, log, request


@pytest.fixture
def scene() -> Scene:
    """A process that has applied revision 10."""
    return Scene(at(10))


def test_messages_sent_before_the_reset_arrived_confirm_nothing(scene: Scene) -> None:
    """A client of another history claims a revision that this history also reaches."""
    session = leased(scene)
    scene.state.lose()
    scene.state.register(at(8, 2), 0, Server("7000", "00000002"), scene.now)
    scene.renew()
    assert scene.state.acknowledgeable(scene.now) == 0, "its lease is live"
    # These messages cross the Reset.
    session.receive(request(at(10), 2), scene.now)
    assert session.take(scene.now) == [Reset(at(8, 2))]
    scene.apply((at(9, 2), "t"))
    for said in (at(10), at(8), at(9, 2), Position(8, 0)):
        session.receive(request(said, 3), scene.now)
        assert not grants(session.take(scene.now))
        assert scene.state.acknowledgeable(scene.now) == 0
    session.receive(request(at(8, 2)), scene.now)
    assert scene.state.acknowledgeable(scene.now) == 8


def test_a_client_that_falls_back_is_sent_the_news_again(scene: Scene) -> None:
    """Another server has reset the client to an earlier position of the same history. It is granted
    a lease after it has confirmed what it is sent again: a client that claimed less and less would
    hold up every Delete."""
    session = confirmed(scene)
    scene.apply((at(11), "a"))
    assert session.take(scene.now) == [Invalidation(at(11), ["a"])]
    session.receive(request(at(11)), scene.now)
    session.receive(request(at(10), 1), scene.now)
    assert session.take(scene.now) == [Invalidation(at(11), ["a"])]
    session.receive(request(at(10), 2), scene.now)
    assert session.take(scene.now) == []
    session.receive(request(at(11)), scene.now)
    (grant,) = session.take(scene.now)
    assert isinstance(grant, Grant)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_repeating_an_older_claim_yields_no_grant(scene: Scene, times: int) -> None:
    """A Delete that the client has fallen behind may have returned. So the client receives it
    before any grant, however often it repeats its claim before the server sends anything."""
    session = confirmed(scene)
    scene.apply((at(11), "a"), (at(12), "b"))
    session.take(scene.now)
    session.receive(request(at(12)), scene.now)
    for number in range(times):
        session.receive(request(at(10), number + 1), scene.now)
    (news,) = session.take(scene.now)
    assert isinstance(news, Invalidation)
    assert sorted(news.token_ids) == ["a", "b"]
    session.receive(request(at(12)), scene.now)
    (grant,) = session.take(scene.now)
    assert isinstance(grant, Grant)


def test_a_client_that_falls_back_and_catches_up_elsewhere_is_granted(scene: Scene) -> None:
    """The client receives the rest on another stream, before this one has sent it again."""
    session = confirmed(scene)
    scene.apply((at(11), "a"))
    session.take(scene.now)
    session.receive(request(at(11)), scene.now)
    session.receive(request(at(10), 1), scene.now)
    session.receive(request(at(11), 2), scene.now)
    (grant,) = session.take(scene.now)
    assert isinstance(grant, Grant)
    assert (grant.position, grant.number) == (at(11), 2)


def test_a_client_with_a_lease_that_falls_back_counts_as_behind(scene: Scene) -> None:
    """What a client confirmed before it was reset no longer counts while it answers under its
    lease."""
    session = leased(scene)
    scene.apply((at(11), "a"))
    session.take(scene.now)
    session.receive(request(at(11)), scene.now)
    assert scene.state.acknowledgeable(scene.now) == 11
    session.receive(request(at(10)), scene.now)
    assert scene.state.acknowledgeable(scene.now) == 10
    assert session.take(scene.now) == [Invalidation(at(11), ["a"])]


def test_news_from_another_stream_is_not_sent_again(scene: Scene) -> None:
    """A client that has received a revision on another stream says so, and is at that position."""
    session = confirmed(scene)
    scene.apply((at(11), "a"), (at(12), "b"))
    session.receive(request(at(11), 1), scene.now)
    assert session.take(scene.now)[0] == Invalidation(at(12), ["b"])


@pytest.mark.parametrize("timeline", [True, False], ids=["another timeline", "registered again"])
def test_every_stream_is_reset_when_the_cache_starts_over(scene: Scene, timeline: bool) -> None:
    """The reset comes even if the position is the same, because changes that are not in the log may
    be lost (rule 12)."""
    session = leased(scene)
    if timeline:
        assert scene.state.apply(log(at(10), server=Server("7000", "00000002")), scene.now)
    else:
        scene.state.lose()
        assert session.take(scene.now) == []
        scene.state.register(at(10), 0, Server("7000", "00000001"), scene.now)
    scene.renew()
    assert session.take(scene.now) == [Reset(at(10))]
    assert scene.state.acknowledgeable(scene.now) == 0
    session.receive(request(at(10)), scene.now)
    assert scene.state.acknowledgeable(scene.now) == 10


def test_a_client_that_missed_forgotten_changes_is_reset(scene: Scene) -> None:
    """A client with a lease counts as behind until it confirms the Reset or its lease ends."""
    session = leased(scene)
    cache = scene.state.cache
    cache._marks.pop(10)
    scene.apply((at(11), "a"))
    assert session.take(scene.now) == [Reset(at(11))]
    assert scene.state.acknowledgeable(scene.now) == 0
    session.receive(request(at(11)), scene.now)
    assert scene.state.acknowledgeable(scene.now) == 11


def test_a_client_that_released_delays_nothing(scene: Scene) -> None:
    """A client stops counting as soon as it says that it has released its lease."""
    session = leased(scene)
    scene.apply((at(11), "a"))
    assert scene.state.acknowledgeable(scene.now) == 10
    session.receive(request(at(10), released=True), scene.now)
    assert scene.state.acknowledgeable(scene.now) == 11
    assert session.lease.ends == -math.inf


def test_a_closing_stream_grants_nothing_and_still_sends_news(scene: Scene) -> None:
    """The client continues to answer under its last lease, so it must still receive
    invalidations.
    """
    session = leased(scene)
    session.close()
    session.receive(request(at(10), 2), scene.now)
    scene.apply((at(11), "a"))
    assert session.take(scene.now) == [Closing(), Invalidation(at(11), ["a"])]
    assert session.take(scene.now) == []
    session.receive(request(at(11), 3), scene.now)
    scene.apply((at(12), "b"))
    assert session.take(scene.now) == [Invalidation(at(12), ["b"])]

"""The decisions for one stream: what is sent, what a confirmation proves, when a lease is granted.

Pure, with the clock passed in. `proto/conformance` has cases for clients only, so these tests are
the cases for servers.
"""

import pytest
from latchkey_coherence.lease import outwait_seconds
from latchkey_coherence.verdict_cache import NOWHERE, Position
from latchkey_service.coherence.ack_rules import OUTWAIT_MARGIN_SECONDS
from latchkey_service.coherence.watch_sessions import (
    Grant,
    Invalidation,
    Reset,
    WatchSession,
)

from tests.helpers.positions import at
from tests.unit.coherence.scene import LEASE_SECONDS, Scene, confirmed, grants, leased, log, request


@pytest.fixture
def scene() -> Scene:
    """A process that has applied revision 10."""
    return Scene(at(10))


# The client's position.


def test_nothing_is_sent_before_the_first_message(scene: Scene) -> None:
    """What a client has to drop depends on its position, so its first message has to come
    before."""
    session = WatchSession(scene.state)
    scene.apply((at(11), "t"))
    assert session.take(scene.now) == []


def test_an_empty_client_is_reset_and_granted_at_once(scene: Scene) -> None:
    """An empty client has nothing to drop. The Reset comes first, so that it knows the grant's
    position."""
    session = WatchSession(scene.state)
    session.receive(request(NOWHERE, 1), scene.now)
    reset, grant = session.take(scene.now)
    assert reset == Reset(at(10))
    assert grant == Grant(at(10), 1, scene.state.lease_ends - scene.now)


@pytest.mark.parametrize("revision", [10, 0])
def test_a_client_without_marks_gets_one_lease_at_most(revision: int) -> None:
    """An empty client's first message does not show whether it knows marks. The next one does, and
    from then on a client without marks gets no grant."""
    scene = Scene(at(revision))
    session = WatchSession(scene.state)
    session.receive(request(NOWHERE, 1), scene.now)
    assert len(grants(list(session.take(scene.now)))) == 1
    session.receive(request(Position(revision, 0)), scene.now)
    session.receive(request(Position(revision, 0), 2), scene.now + 1.0)
    assert session.take(scene.now + 1.0) == []
    scene.renew()
    assert session.take(scene.now + 1.0) == []


@pytest.mark.parametrize(
    "claim",
    [at(10, 2), at(3), at(11), Position(10, 0), Position(12, 0), Position(0, 5)],
    ids=["other mark", "pruned", "ahead", "no mark", "ahead without mark", "at 0"],
)
def test_a_client_whose_position_is_unknown_is_reset(scene: Scene, claim: Position) -> None:
    """The client gets no grant until it confirms the Reset, whatever it sends before."""
    session = WatchSession(scene.state)
    session.receive(request(claim, 1), scene.now)
    scene.now += 0.1
    scene.apply()
    assert session.take(scene.now) == [Reset(at(10))]
    session.receive(request(claim, 2), scene.now)
    assert session.take(scene.now) == []
    session.receive(request(at(10)), scene.now)
    assert [grant.number for grant in grants(session.take(scene.now))] == [2]


def test_a_client_that_is_behind_is_sent_what_it_missed(scene: Scene) -> None:
    """A position that the process still knows by its mark counts like one that this stream has
    sent."""
    scene.apply((at(11), "a"), (at(12), "b"))
    session = WatchSession(scene.state)
    session.receive(request(at(11)), scene.now)
    assert session.take(scene.now) == [Invalidation(at(12), ["b"])]
    session.receive(request(at(12), 1), scene.now)
    assert grants(session.take(scene.now))


def test_a_client_that_is_ahead_waits_for_a_later_read_of_the_log(scene: Scene) -> None:
    """The client may have received the news first. A read of the log that began before its message
    proves nothing."""
    session = WatchSession(scene.state)
    session.receive(request(at(11), 1), scene.now)
    assert session.undecided
    assert session.take(scene.now) == []
    scene.state.apply(log(at(10)), scene.now - 0.1)
    assert session.undecided
    assert session.take(scene.now) == []
    scene.state.apply(log(at(11), (at(11), "t")), scene.now + 0.1)
    scene.now += 0.2
    assert [grant.position for grant in grants(session.take(scene.now))] == [at(11)]
    assert not session.undecided


def test_a_client_that_is_ahead_on_another_history_is_reset_once_the_log_gets_there(
    scene: Scene,
) -> None:
    """The process reaches the same revision with another mark."""
    session = WatchSession(scene.state)
    session.receive(request(at(11, 2), 1), scene.now)
    assert session.take(scene.now) == []
    scene.state.apply(log(at(11), (at(11), "t")), scene.now - 0.1)
    assert session.take(scene.now) == [Reset(at(11))]


def test_a_client_that_repeats_its_claim_delays_only_itself(
    scene: Scene,
) -> None:
    """Only the client's own stream waits, and the client holds no lease."""
    session = WatchSession(scene.state)
    for _ in range(5):
        session.receive(request(at(11), 1), scene.now)
        scene.state.apply(log(at(10)), scene.now)
        scene.now += 0.01
        assert session.take(scene.now) == []
    assert scene.state.acknowledgeable(scene.now) == 10


def test_no_grant_while_a_claim_is_undecided(
    scene: Scene,
) -> None:
    """Earlier confirmations do not count while the client claims a position on another history."""
    session = confirmed(scene)
    session.receive(request(at(11, 2), 1), scene.now)
    assert session.undecided
    assert not grants(session.take(scene.now))
    scene.apply()  # begins no earlier than the claim, but not later either
    assert not grants(session.take(scene.now))
    scene.now += 0.1
    scene.apply()
    assert session.take(scene.now) == [Reset(at(10))]


# Grants.


def test_a_grant_lasts_as_long_as_the_server_lease(scene: Scene) -> None:
    """The end of the grant is recorded before it is sent."""
    session = confirmed(scene)
    scene.now += 1.0
    session.receive(request(at(10), 7), scene.now)
    (grant,) = session.take(scene.now)
    assert grant == Grant(at(10), 7, scene.state.lease_ends - scene.now)
    assert session.lease.ends == scene.state.lease_ends
    assert session.take(scene.now) == [], "one grant for a request"


def test_no_grant_without_a_lease(scene: Scene) -> None:
    """The request is kept until there is a lease."""
    session = confirmed(scene)
    scene.now = scene.state.lease_ends
    session.receive(request(at(10), 1), scene.now)
    assert session.take(scene.now) == []
    assert session.wants_grant
    scene.renew()
    assert grants(session.take(scene.now))


def test_no_grant_for_a_client_that_owes_a_confirmation(scene: Scene) -> None:
    """While the client owes a confirmation it is sent nothing more: otherwise it might always owe
    one."""
    session = leased(scene)
    scene.apply((at(11), "a"))
    assert session.take(scene.now) == [Invalidation(at(11), ["a"])]
    session.receive(request(at(10), 2), scene.now)
    scene.apply((at(12), "b"))
    assert session.take(scene.now) == []
    session.receive(request(at(11)), scene.now)
    grant, news = session.take(scene.now)
    assert isinstance(grant, Grant)
    assert (grant.position, grant.number) == (at(11), 2)
    assert news == Invalidation(at(12), ["b"])


def test_without_a_live_lease_news_comes_before_the_grant(scene: Scene) -> None:
    """Deletes may have returned without waiting for this client, so it must not answer under a new
    lease before it receives them."""
    session = leased(scene)
    scene.now = session.lease.ends
    scene.renew()
    scene.apply((at(11), "a"))
    assert scene.state.acknowledgeable(scene.now) == 11
    session.receive(request(at(10), 2), scene.now)
    news, grant = session.take(scene.now)
    assert news == Invalidation(at(11), ["a"])
    assert isinstance(grant, Grant)
    assert grant.position == at(11)


@pytest.mark.parametrize(
    "claims",
    [
        [at(10)],
        [at(8), at(10), at(9), at(8)],
        [NOWHERE],
        [at(10, 2)],
        [Position(10, 0)],
        [at(19)],
    ],
    ids=["the last", "earlier ones", "nothing", "another mark", "without a mark", "the future"],
)
def test_a_client_that_never_confirms_delays_deletes_by_one_lease(claims: list[Position]) -> None:
    """A client that requests grants but never confirms delays a Delete only until the end of the
    lease that it held when it was sent the invalidation, whatever position it claims. It
    receives no grant, and the next Delete does not wait for it.
    """
    scene = Scene(at(8))
    scene.apply((at(9), "x"), (at(10), "y"))
    scene.renew()
    session = leased(scene)
    ends = session.lease.ends
    scene.apply((at(11), "a"))
    assert session.take(scene.now) == [Invalidation(at(11), ["a"])]
    number = 1
    while scene.now < ends + 2 * LEASE_SECONDS:
        number += 1
        session.receive(request(claims[number % len(claims)], number), scene.now)
        assert not grants(session.take(scene.now))
        assert session.lease.ends <= ends
        scene.now += 0.5
        scene.renew()
        scene.apply()
    assert scene.state.acknowledged == 11
    scene.apply((at(12), "b"))
    assert scene.state.acknowledgeable(scene.now) == 12


@pytest.mark.parametrize("wake_up", [True, False], ids=["by a wake-up", "by the renewal"])
def test_no_lease_outlasts_the_wait_for_an_unsent_deletion(scene: Scene, wake_up: bool) -> None:
    """A Delete that is not acknowledged returns a lease's length after its commit (rule 8).

    So a client that was not sent the deletion must not answer any longer. Its stream may break
    right after the grant, so messages after the grant do not count.
    """
    session = leased(scene)
    committed = scene.now = scene.now + 2.0
    scene.now += 0.5
    if wake_up:
        scene.apply((at(11), "a"))
        scene.renew()
    else:
        scene.state.apply(log(at(11), (at(11), "a")), scene.now)
        scene.renew()
    session.receive(request(at(10), 2), scene.now)
    sent: list[object] = []
    for event in session.take(scene.now):
        if isinstance(event, Grant) and Invalidation(at(11), ["a"]) not in sent:
            ends = scene.now + event.lease_seconds
            outwaited = committed + outwait_seconds(LEASE_SECONDS) + OUTWAIT_MARGIN_SECONDS
            assert ends <= outwaited, "it answers with what was deleted"
        sent.append(event)
    assert Invalidation(at(11), ["a"]) in sent


def test_a_flood_of_deletes_does_not_starve_a_healthy_client(scene: Scene) -> None:
    """The lease is renewed even if news arrives before each of the client's confirmations."""
    session = leased(scene)
    revision, number, sent_at = 10, 1, at(10)
    until = scene.now + 4 * LEASE_SECONDS
    lapses = 0
    while scene.now < until:
        scene.now += 0.05
        revision += 1
        scene.apply((at(revision), f"t{revision}"))
        if revision % 20 == 0:
            scene.renew()
        number += 1
        session.receive(request(sent_at, number), scene.now)
        for event in session.take(scene.now):
            if isinstance(event, Invalidation | Reset):
                sent_at = event.position
        lapses += session.lease.ends <= scene.now
    assert lapses == 0
    assert sent_at.revision > revision - 10

"""What Watch streams add up to, as a pure function of time and messages."""

import math
from datetime import UTC, datetime

import pytest
from latchkey import Scope, Token, Verdict, Verification, _subscription
from latchkey._convert import watch_event_in, watch_request_out
from latchkey._entry import Remembered, remembered
from latchkey._subscription import (
    Closing,
    Grant,
    Invalidation,
    Request,
    Reset,
    Stream,
    Subscription,
)
from latchkey.errors import InternalError
from latchkey_coherence.memory import NOWHERE, Memory, Position
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.positions import at

LEASE = 2.0
LESS = LEASE * 0.999  # what a client makes of it


def entry(token_id: str) -> Remembered:
    token = Token(
        id=token_id,
        account_id="a",
        name="n",
        scope=Scope.READ,
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
    )
    answer = Verification(verdict=Verdict.VALID, token=token)
    made = remembered(answer, None, math.inf)
    assert made is not None
    return made


@pytest.fixture
def subscription() -> Subscription:
    """A subscription of an empty memory; it asks when half of a lease is left."""
    return Subscription(Memory(100), lambda: 1.0)


def granted(subscription: Subscription, now: float, position: Position = at(5)) -> Stream:  # noqa: B008 - immutable
    """Open a stream at `now` and let it grant at once, after a Reset where there is need of one."""
    stream = subscription.open(now)
    request = stream.take(now)
    assert request is not None
    if request.applied != position:
        stream.receive(Reset(position), now)
        assert stream.take(now) == Request(position)
    stream.receive(Grant(position, request.number, LEASE), now)
    return stream


def reset_to(subscription: Subscription, position: Position, now: float) -> Stream:
    """Open a stream at `now` that has its memory start over and grants nothing yet."""
    stream = subscription.open(now)
    stream.take(now)
    stream.receive(Reset(position), now)
    stream.take(now)
    return stream


def test_a_lease_counts_from_before_its_request_was_sent(subscription: Subscription) -> None:
    """However late a grant comes, the lease ends when it would have if it had come at once."""
    stream = subscription.open(100.0)
    assert stream.take(100.1) == Request(NOWHERE, number=1)
    assert stream.take(100.2) is None
    stream.receive(Grant(at(5), 1, LEASE), 101.0)
    assert subscription.lease.end == pytest.approx(100.1 + LESS)
    assert subscription.memory.position == at(5)


def test_a_grant_that_is_over_is_none(subscription: Subscription) -> None:
    """A grant that arrives after its end gives no lease, takes none away, and is asked for anew."""
    old = granted(subscription, 100.0)
    end = subscription.lease.end
    stream = subscription.open(100.0)
    stream.take(100.0)
    stream.receive(Grant(at(5), 1, 0.5), 101.0)
    assert not stream.granted
    assert subscription.lease.end == end
    assert stream.due() == pytest.approx(101.0 + _subscription.ASK_GAP_SECONDS)
    assert stream.late_at == 100.0 + _subscription.FIRST_GRANT_SECONDS
    assert stream.take(101.1) == Request(at(5), number=2)
    assert old.due() is not None


def test_asks_again_while_there_is_time(subscription: Subscription) -> None:
    """The next grant is asked for once, with half of the lease left, under the next number."""
    stream = granted(subscription, 100.0)
    due = stream.due() or 0.0
    assert due == pytest.approx(100.0 + LESS / 2)
    assert stream.take(due - 0.001) is None
    assert stream.late_at is None
    assert stream.take(due) == Request(at(5), number=2)
    assert stream.late_at == pytest.approx(due + LESS / 4)
    assert stream.due() is None
    stream.receive(Grant(at(5), 2, LEASE), due + 0.1)
    assert subscription.lease.end == pytest.approx(due + LESS)
    assert stream.late_at is None


def test_clients_do_not_march_in_step() -> None:
    """When to ask is drawn anew for each lease, and always leaves time to find another server."""
    draws = iter([0.0, 1.0])
    subscription = Subscription(Memory(100), lambda: next(draws))
    dues = [granted(subscription, 100.0).due() for _ in range(2)]
    shares = [(100.0 + LESS - (due or 0)) / LESS for due in dues]
    assert shares == pytest.approx([_subscription.ASK_SHARE_MIN, _subscription.ASK_SHARE_MAX])


def test_within_a_stream_a_lease_only_grows(subscription: Subscription) -> None:
    """A short grant does not shorten a long one: the server heeds both."""
    stream = granted(subscription, 100.0)
    end = subscription.lease.end
    stream.take(101.0)
    stream.receive(Grant(at(5), 2, 0.3), 101.0)
    assert subscription.lease.end == end


@pytest.mark.parametrize("number", [0, 2, -1])
def test_grants_of_other_numbers_do_not_count(subscription: Subscription, number: int) -> None:
    """Only what was asked for can be counted from when it was asked."""
    stream = subscription.open(100.0)
    stream.take(100.0)
    stream.receive(Grant(at(5), number, LEASE), 100.0)
    assert subscription.lease.end == -math.inf
    stream.receive(Grant(at(5), 1, LEASE), 100.0)
    end = subscription.lease.end
    stream.receive(Grant(at(5), 1, 10 * LEASE), 100.0)  # again
    assert subscription.lease.end == end


def test_a_confused_server_cannot_grant_for_ever(subscription: Subscription) -> None:
    """However long a grant says it is, a minute is the most that it is taken for."""
    stream = subscription.open(100.0)
    stream.take(100.0)
    stream.receive(Grant(at(5), 1, 1e12), 100.0)
    assert subscription.lease.end <= 160.0


def test_invalidations_are_applied_and_then_acknowledged(subscription: Subscription) -> None:
    """The acknowledgement says what the memory has applied, and is due at once."""
    stream = granted(subscription, 100.0)
    memory = subscription.memory
    assert memory.admit(b"k", entry("t1"), at(5))
    stream.receive(Invalidation(at(6), ("t1", "t2")), 100.1)
    assert memory.entries == {}
    assert stream.due() == -math.inf
    assert stream.take(100.1) == Request(at(6))
    assert stream.take(100.1) is None
    assert not memory.admit(b"k", entry("t1"), at(5))


def test_an_acknowledgement_and_a_request_are_one_message(subscription: Subscription) -> None:
    """When both are due there is one message, and the clock was read for it."""
    stream = granted(subscription, 100.0)
    stream.receive(Invalidation(at(6), ()), 101.5)
    assert stream.take(101.5) == Request(at(6), number=2)
    assert stream.take(101.5) is None


def test_what_an_empty_memory_was_not_told_it_does_not_admit(subscription: Subscription) -> None:
    """Who has begun with nothing does not know what was named before, so older answers stay out."""
    stream = subscription.open(100.0)
    stream.take(100.0)
    stream.receive(Invalidation(at(6), ("t2",)), 100.0)
    stream.receive(Grant(at(6), 1, LEASE), 100.0)
    assert not subscription.memory.admit(b"k", entry("t1"), at(5))
    assert subscription.memory.admit(b"k", entry("t1"), at(6))


def test_a_database_without_a_revision_is_remembered_too(subscription: Subscription) -> None:
    """Before the first deletion ever the memory works, and is empty for who is told that it is."""
    stream = granted(subscription, 100.0, revision=0)
    memory = subscription.memory
    assert memory.admit(b"k", entry("t1"), at(0))
    stream.take(101.5)
    stream.receive(Grant(at(0), 2, LEASE), 101.5)
    assert len(memory) == 1
    assert subscription.open(102.0).take(102.0) == Request(NOWHERE, number=1)
    assert len(memory) == 0


def test_a_new_stream_replaces_the_lease_and_the_old_one_is_released(
    subscription: Subscription,
) -> None:
    """From a new stream's first grant on, the old one's do not count, and its server hears that."""
    old = granted(subscription, 100.0)
    new = subscription.open(101.0)
    assert new.take(101.0) == Request(at(5), number=1)
    assert old.take(101.0) == Request(at(5), number=2)
    new.receive(Invalidation(at(6), ("t1",)), 101.0)
    assert old.take(101.0) is None  # not before the first grant
    new.receive(Grant(at(6), 1, 0.5), 101.0)
    assert subscription.lease.end == pytest.approx(101.0 + 0.5 * 0.999)
    assert old.due() == -math.inf
    assert old.take(101.0) == Request(at(6), released=True)
    assert old.take(101.0) is None
    for event in (Grant(at(6), 2, LEASE), Invalidation(at(7), ("t1",)), Reset(at(9)), Closing(), None):
        old.receive(event, 101.0)
    assert subscription.lease.end == pytest.approx(101.0 + 0.5 * 0.999)
    assert subscription.memory.position == at(6)
    assert old.due() is None


def test_closing_asks_no_more_and_keeps_the_lease(subscription: Subscription) -> None:
    """A server that stops is not asked for grants; what it has granted lasts, and is still told."""
    stream = granted(subscription, 100.0)
    end = subscription.lease.end
    stream.receive(Closing(), 100.1)
    assert stream.closing
    assert subscription.lease.end == end
    assert (stream.due(), stream.late_at) == (None, None)
    stream.receive(Invalidation(at(6), ()), 100.2)
    assert stream.take(100.2) == Request(at(6))


def test_release_ends_the_lease_first(subscription: Subscription) -> None:
    """When the server can hear that nothing is answered any more, nothing is."""
    stream = granted(subscription, 100.0)
    subscription.release()
    assert subscription.lease.end == -math.inf
    assert stream.take(100.0) == Request(at(5), released=True)
    stream.receive(Grant(at(5), 2, LEASE), 100.0)
    assert subscription.lease.end == -math.inf


def test_a_reset_forgets_and_goes_on(subscription: Subscription) -> None:
    """A server that cannot tell what was missed costs the entries, not the lease."""
    stream = granted(subscription, 100.0)
    subscription.memory.admit(b"k", entry("t1"), at(5))
    stream.receive(Reset(at(9)), 100.0)
    assert subscription.memory.entries == {}
    assert stream.take(100.0) == Request(at(9))
    assert subscription.lease.end > 100.0
    assert not subscription.memory.admit(b"k", entry("t1"), at(8))


def test_a_reset_to_the_past_ends_all_other_grants(subscription: Subscription) -> None:
    """What is remembered by the word of a server that knows less is covered by its grants alone."""
    granting = granted(subscription, 100.0, revision=9)
    other = subscription.open(100.0)
    other.take(100.0)
    behind = subscription.open(100.0)
    behind.take(100.0)
    behind.receive(Reset(at(7)), 100.0)
    assert subscription.memory.position == at(7)
    assert subscription.lease.end == -math.inf
    granting.take(101.5)
    granting.receive(Grant(at(9), 2, LEASE), 101.5)
    other.receive(Grant(at(9), 1, LEASE), 101.5)
    assert subscription.lease.end == -math.inf
    behind.receive(Grant(at(7), 1, LEASE), 101.5)
    assert subscription.lease.end > 101.5


def test_what_is_not_known_empties_the_memory(subscription: Subscription) -> None:
    """An event of a newer server may end anything: everything goes, and answers under way too."""
    stream = granted(subscription, 100.0)
    subscription.memory.admit(b"k", entry("t1"), at(5))
    stream.receive(None, 100.0)
    assert subscription.memory.entries == {}
    assert not subscription.memory.admit(b"k", entry("t1"), at(4))


def test_messages_are_translated() -> None:
    """Each field arrives where it belongs, and what cannot be read is an error."""
    assert watch_request_out(Request(at(3), number=2, released=True)) == pb.WatchRequest(
        applied_revision=3, number=2, released=True
    )
    grant = pb.WatchResponse()
    grant.grant.revision, grant.grant.number = 4, 2
    grant.grant.lease_duration.FromMilliseconds(2_500)
    assert watch_event_in(grant) == Grant(at(4), 2, 2.5)
    invalidation = pb.Invalidation(revision=5, token_ids=["a", "b"])
    event = watch_event_in(pb.WatchResponse(invalidation=invalidation))
    assert event == Invalidation(at(5), ("a", "b"))
    assert watch_event_in(pb.WatchResponse(reset=pb.Reset(revision=6))) == Reset(at(6))
    assert watch_event_in(pb.WatchResponse(closing=pb.Closing())) == Closing()
    assert watch_event_in(pb.WatchResponse()) is None
    with pytest.raises(InternalError):
        watch_event_in(None)

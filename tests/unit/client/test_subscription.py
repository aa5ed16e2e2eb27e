"""What Watch streams add up to, as a pure function of time and messages."""

import math
from datetime import UTC, datetime

import pytest
from latchkey import Scope, Token, Verdict, Verification, _subscription
from latchkey._convert import watch_event_in, watch_request_out
from latchkey._entry import CacheEntry, cache_entry
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


def entry(token_id: str) -> CacheEntry:
    token = Token(
        id=token_id,
        account_id="a",
        name="n",
        scope=Scope.READ,
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
    )
    answer = Verification(verdict=Verdict.VALID, token=token)
    made = cache_entry(answer, None, math.inf)
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
    stream.receive(Reset(at(5)), 100.9)
    assert stream.take(100.9) == Request(at(5))
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
    """Before the first deletion ever there is a position as well: revision 0, with a mark."""
    stream = granted(subscription, 100.0, at(0))
    memory = subscription.memory
    assert memory.admit(b"k", entry("t1"), at(0))
    stream.take(101.5)
    stream.receive(Grant(at(0), 2, LEASE), 101.5)
    assert len(memory) == 1
    assert subscription.open(102.0).take(102.0) == Request(at(0), number=1)
    assert len(memory) == 1


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
    for event in (
        Grant(at(6), 2, LEASE),
        Invalidation(at(7), ("t1",)),
        Reset(at(9)),
        Closing(),
        None,
    ):
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


def test_a_reset_drops_entries_and_lease(subscription: Subscription) -> None:
    """A lease was granted on a history, and this may be another one. The stream goes on: it
    confirms the Reset, and asks for the next lease at once."""
    stream = granted(subscription, 100.0)
    subscription.memory.admit(b"k", entry("t1"), at(5))
    stream.receive(Reset(at(9)), 100.0)
    assert subscription.memory.entries == {}
    assert subscription.lease.end == -math.inf
    assert stream.take(100.0) == Request(at(9), number=2)
    assert not subscription.memory.admit(b"k", entry("t1"), at(8))
    stream.receive(Grant(at(9), 2, LEASE), 100.1)
    assert subscription.lease.end == pytest.approx(100.0 + LESS)


def test_a_request_stays_open_across_a_reset(subscription: Subscription) -> None:
    """The server answers it once the Reset is confirmed; asking again would cost a round trip."""
    stream = subscription.open(100.0)
    stream.take(100.0)
    stream.receive(Reset(at(9, 2)), 100.1)
    assert stream.take(100.1) == Request(at(9, 2))
    assert stream.take(100.1) is None
    stream.receive(Grant(at(9, 2), 1, LEASE), 100.2)
    assert subscription.lease.end == pytest.approx(100.0 + LESS)


@pytest.mark.parametrize("position", [at(7), at(9, 2), at(9), at(12)])
def test_a_reset_ends_all_other_grants(subscription: Subscription, position: Position) -> None:
    """The other streams' servers believe the memory to be where it was, so they would not name all
    that it has to drop. Their grants count no longer, and they are left."""
    granting = granted(subscription, 100.0, at(9))
    other = subscription.open(100.0)
    other.take(100.0)
    resetting = reset_to(subscription, position, 100.0)
    assert subscription.memory.position == position
    assert subscription.lease.end == -math.inf
    for stream, number in ((granting, 2), (other, 1)):
        stream.receive(Grant(position, number, LEASE), 101.5)
        stream.receive(Invalidation(at(20), ("t1",)), 101.5)
        assert stream.closing
        assert stream.take(101.5) == Request(position, released=True)
    assert subscription.lease.end == -math.inf
    assert subscription.memory.position == position
    resetting.receive(Grant(position, 1, LEASE), 101.5)
    assert subscription.lease.end > 101.5


def test_an_invalidation_of_another_history_starts_over(subscription: Subscription) -> None:
    """A revision that is known by another mark proves that the histories differ. The memory stands
    nowhere then, and says so, until the server resets it."""
    stream = granted(subscription, 100.0)
    subscription.memory.admit(b"k", entry("t1"), at(5))
    stream.receive(Invalidation(at(5, 2), ("t2",)), 100.1)
    assert len(subscription.memory) == 0
    assert subscription.lease.end == -math.inf
    assert stream.take(100.1) == Request(NOWHERE, number=2)
    stream.receive(Grant(at(5, 2), 2, LEASE), 100.2)
    assert subscription.lease.end == -math.inf
    stream.receive(Reset(at(5, 2)), 100.3)
    stream.receive(Grant(at(5, 2), 2, LEASE), 100.4)
    assert subscription.lease.end == pytest.approx(100.1 + LESS)


@pytest.mark.parametrize("position", [at(5, 2), at(4), at(6), Position(5, 0), NOWHERE])
def test_a_grant_at_an_unknown_position_does_not_count(
    subscription: Subscription, position: Position
) -> None:
    """A lease permits to answer on one history, up to a position that the memory has applied."""
    stream = reset_to(subscription, at(5), 100.0)
    stream.receive(Grant(position, 1, LEASE), 100.0)
    assert subscription.lease.end == -math.inf
    stream.receive(Grant(at(5), 1, LEASE), 100.0)
    assert subscription.lease.end > 100.0


def test_a_server_without_marks_grants_nothing(subscription: Subscription) -> None:
    """Nothing tells its history from another one: every verify asks the service."""
    stream = subscription.open(100.0)
    stream.take(100.0)
    stream.receive(Reset(Position(5, 0)), 100.0)
    stream.receive(Grant(Position(5, 0), 1, LEASE), 100.0)
    stream.receive(Invalidation(Position(6, 0), ()), 100.0)
    stream.receive(Grant(Position(6, 0), 1, LEASE), 100.0)
    assert subscription.lease.end == -math.inf
    assert not subscription.memory.admit(b"k", entry("t1"), Position(6, 0))


def test_servers_on_two_histories_do_not_mix_in_one_memory(subscription: Subscription) -> None:
    """A client that moves hears of two servers at once, and they may follow different histories.

    The first one's deletion of t1 is confirmed. The other one, which follows a deposed primary,
    then names something else at a later revision. An answer that was read there, and says that t1
    is VALID, must not enter a memory that answers under the first one's lease.
    """
    first = granted(subscription, 100.0, at(5))
    other = subscription.open(100.0)
    assert other.take(100.0) == Request(at(5), number=1)
    first.receive(Invalidation(at(7), ("t1",)), 100.1)
    other.receive(Invalidation(at(8, 2), ("t2",)), 100.2)
    admitted = subscription.memory.admit(b"k", entry("t1"), at(8, 2))
    assert not (admitted and subscription.lease.end > 100.2)


def test_news_that_passes_over_another_stream_s_news_leads_to_a_new_stream(
    subscription: Subscription,
) -> None:
    """Its server cannot know what the other one has named since, so it has to be asked again from
    there. The lease of the other one goes on."""
    first = granted(subscription, 100.0, at(5))
    other = subscription.open(100.0)
    other.take(100.0)
    first.receive(Invalidation(at(6), ("t1",)), 100.1)
    subscription.memory.admit(b"k", entry("t3"), at(6))
    other.receive(Invalidation(at(7), ("t3",)), 100.2)
    assert subscription.memory.position == at(6)
    assert len(subscription.memory) == 0, "to forget does no harm"
    assert other.closing
    assert other.take(100.2) == Request(at(6), released=True)
    assert subscription.lease.end > 100.2
    assert not first.closing


def test_news_that_the_granting_stream_cannot_place_starts_over(
    subscription: Subscription,
) -> None:
    """Of two servers whose news cannot be told to be of one history, the one that grants counts."""
    first = granted(subscription, 100.0, at(5))
    other = subscription.open(100.0)
    other.take(100.0)
    other.receive(Invalidation(at(6, 2), ("t1",)), 100.1)
    assert subscription.memory.position == at(6, 2)
    subscription.memory.admit(b"k", entry("t3"), at(6, 2))
    first.receive(Invalidation(at(7), ("t2",)), 100.2)
    assert subscription.memory.position == at(7)
    assert len(subscription.memory) == 0
    assert not subscription.memory.knows(at(6, 2))
    assert subscription.lease.end == -math.inf
    assert first.take(100.2) == Request(at(7), number=2)
    assert other.take(100.2) == Request(at(7), released=True)
    first.receive(Grant(at(7), 2, LEASE), 100.3)
    assert subscription.lease.end > 100.3


@pytest.mark.parametrize("known", [True, False])
def test_two_servers_with_the_same_news_disturb_nobody(
    subscription: Subscription, known: bool
) -> None:
    """A revision that the memory has by the same mark, or that it is past, moves nothing."""
    first = granted(subscription, 100.0, at(5))
    other = subscription.open(100.0)
    other.take(100.0)
    first.receive(Invalidation(at(7), ("t1", "t2")), 100.1)
    if known:
        other.receive(Invalidation(at(7), ("t1", "t2")), 100.2)
        other.receive(Invalidation(at(8), ("t3",)), 100.3)
        assert subscription.memory.position == at(8)
    else:
        other.receive(Invalidation(at(6), ("t1",)), 100.2)
        assert subscription.memory.position == at(7)
    assert not first.closing
    assert not other.closing
    assert subscription.lease.end > 100.3


def test_what_is_not_known_empties_the_memory(subscription: Subscription) -> None:
    """An event of a newer server may end anything: everything goes, and answers under way too."""
    stream = granted(subscription, 100.0)
    subscription.memory.admit(b"k", entry("t1"), at(5))
    stream.receive(None, 100.0)
    assert subscription.memory.entries == {}
    assert subscription.memory.position == at(5)
    assert not subscription.memory.admit(b"k", entry("t1"), at(4))


def test_messages_are_translated() -> None:
    """Each field arrives where it belongs, and what cannot be read is an error."""
    request = Request(Position(3, 2**64 - 1), number=2, released=True)
    assert watch_request_out(request) == pb.WatchRequest(
        applied_revision=3, mark=2**64 - 1, number=2, released=True
    )
    grant = pb.WatchResponse()
    grant.grant.revision, grant.grant.mark, grant.grant.number = 4, 11, 2
    grant.grant.lease_duration.FromMilliseconds(2_500)
    assert watch_event_in(grant) == Grant(Position(4, 11), 2, 2.5)
    invalidation = pb.Invalidation(revision=5, mark=12, token_ids=["a", "b"])
    event = watch_event_in(pb.WatchResponse(invalidation=invalidation))
    assert event == Invalidation(Position(5, 12), ("a", "b"))
    reset = pb.WatchResponse(reset=pb.Reset(revision=6, mark=13))
    assert watch_event_in(reset) == Reset(Position(6, 13))
    assert watch_event_in(pb.WatchResponse(closing=pb.Closing())) == Closing()
    assert watch_event_in(pb.WatchResponse()) is None
    with pytest.raises(InternalError):
        watch_event_in(None)

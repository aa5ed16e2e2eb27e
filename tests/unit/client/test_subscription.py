"""The subscription as a pure function of time and messages."""

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
from latchkey_coherence.verdict_cache import NOWHERE, Position, VerdictCache
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.positions import at

LEASE = 2.0
LESS = LEASE * 0.999  # the client's lease, reduced for clock drift


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
    """A subscription with an empty cache. It requests a grant when half of a lease is left."""
    return Subscription(VerdictCache(100), lambda: 1.0)


def granted(subscription: Subscription, now: float, position: Position = at(5)) -> Stream:  # noqa: B008 - immutable
    """Open a stream at `now` and grant at once, after a Reset if it is necessary."""
    stream = subscription.open(now)
    request = stream.take(now)
    assert request is not None
    if request.applied != position:
        stream.receive(Reset(position), now)
        assert stream.take(now) == Request(position)
    stream.receive(Grant(position, request.number, LEASE), now)
    return stream


def reset_to(subscription: Subscription, position: Position, now: float) -> Stream:
    """Open a stream at `now` that resets the cache and does not grant yet."""
    stream = subscription.open(now)
    stream.take(now)
    stream.receive(Reset(position), now)
    stream.take(now)
    return stream


def test_a_lease_counts_from_before_its_request_was_sent(subscription: Subscription) -> None:
    """The lease ends at the same time, whether its grant arrives early or late."""
    stream = subscription.open(100.0)
    assert stream.take(100.1) == Request(NOWHERE, number=1)
    assert stream.take(100.2) is None
    stream.receive(Reset(at(5)), 100.9)
    assert stream.take(100.9) == Request(at(5))
    stream.receive(Grant(at(5), 1, LEASE), 101.0)
    assert subscription.lease.end == pytest.approx(100.1 + LESS)
    assert subscription.cache.position == at(5)


def test_an_expired_grant_gives_no_lease(subscription: Subscription) -> None:
    """A grant that arrives after its end does not change the lease. Another one is requested."""
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


def test_requests_the_next_grant_in_time(subscription: Subscription) -> None:
    """It is requested once, with half of the lease left, under the next number."""
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


def test_clients_do_not_ask_in_step() -> None:
    """The time to ask is random for each lease, and leaves time to find another server."""
    draws = iter([0.0, 1.0])
    subscription = Subscription(VerdictCache(100), lambda: next(draws))
    dues = [granted(subscription, 100.0).due() for _ in range(2)]
    shares = [(100.0 + LESS - (due or 0)) / LESS for due in dues]
    assert shares == pytest.approx([_subscription.ASK_SHARE_MIN, _subscription.ASK_SHARE_MAX])


def test_within_a_stream_a_lease_only_grows(subscription: Subscription) -> None:
    """A short grant does not shorten a long one, since the server honours both."""
    stream = granted(subscription, 100.0)
    end = subscription.lease.end
    stream.take(101.0)
    stream.receive(Grant(at(5), 2, 0.3), 101.0)
    assert subscription.lease.end == end


@pytest.mark.parametrize("number", [0, 2, -1])
def test_grants_of_other_numbers_do_not_count(subscription: Subscription, number: int) -> None:
    """A grant counts only if it answers the open request, whose time is known."""
    stream = subscription.open(100.0)
    stream.take(100.0)
    stream.receive(Grant(at(5), number, LEASE), 100.0)
    assert subscription.lease.end == -math.inf
    stream.receive(Grant(at(5), 1, LEASE), 100.0)
    end = subscription.lease.end
    stream.receive(Grant(at(5), 1, 10 * LEASE), 100.0)  # a repetition
    assert subscription.lease.end == end


def test_grants_are_limited_to_a_minute(subscription: Subscription) -> None:
    """A longer grant of a faulty server counts as one minute."""
    stream = subscription.open(100.0)
    stream.take(100.0)
    stream.receive(Grant(at(5), 1, 1e12), 100.0)
    assert subscription.lease.end <= 160.0


def test_invalidations_are_applied_and_then_acknowledged(subscription: Subscription) -> None:
    """The acknowledgement reports the applied position, and is due at once."""
    stream = granted(subscription, 100.0)
    cache = subscription.cache
    assert cache.store(b"k", entry("t1"), at(5))
    stream.receive(Invalidation(at(6), ("t1", "t2")), 100.1)
    assert cache.entries == {}
    assert stream.due() == -math.inf
    assert stream.take(100.1) == Request(at(6))
    assert stream.take(100.1) is None
    assert not cache.store(b"k", entry("t1"), at(5))


def test_an_acknowledgement_and_a_request_are_one_message(subscription: Subscription) -> None:
    """If both are due, one message is sent, with the time at which the clock was read."""
    stream = granted(subscription, 100.0)
    stream.receive(Invalidation(at(6), ()), 101.5)
    assert stream.take(101.5) == Request(at(6), number=2)
    assert stream.take(101.5) is None


def test_an_empty_cache_rejects_older_answers(subscription: Subscription) -> None:
    """A new cache does not know what was named before, so it does not store older answers."""
    stream = subscription.open(100.0)
    stream.take(100.0)
    stream.receive(Invalidation(at(6), ("t2",)), 100.0)
    stream.receive(Grant(at(6), 1, LEASE), 100.0)
    assert not subscription.cache.store(b"k", entry("t1"), at(5))
    assert subscription.cache.store(b"k", entry("t1"), at(6))


def test_answers_are_cached_at_revision_zero(subscription: Subscription) -> None:
    """Before the first deletion there is a position too: revision 0 with a mark."""
    stream = granted(subscription, 100.0, at(0))
    cache = subscription.cache
    assert cache.store(b"k", entry("t1"), at(0))
    stream.take(101.5)
    stream.receive(Grant(at(0), 2, LEASE), 101.5)
    assert len(cache) == 1
    assert subscription.open(102.0).take(102.0) == Request(at(0), number=1)
    assert len(cache) == 1


def test_a_new_stream_replaces_the_lease_and_the_old_one_is_released(
    subscription: Subscription,
) -> None:
    """After a new stream's first grant, the old stream's grants do not count, and are released."""
    old = granted(subscription, 100.0)
    new = subscription.open(101.0)
    assert new.take(101.0) == Request(at(5), number=1)
    assert old.take(101.0) == Request(at(5), number=2)
    new.receive(Invalidation(at(6), ("t1",)), 101.0)
    assert old.take(101.0) is None  # before the new stream's first grant
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
    assert subscription.cache.position == at(6)
    assert old.due() is None


def test_closing_stops_requests_and_keeps_the_lease(subscription: Subscription) -> None:
    """A stopping server gets no further requests. Its grant stays valid, and its invalidations
    are applied."""
    stream = granted(subscription, 100.0)
    end = subscription.lease.end
    stream.receive(Closing(), 100.1)
    assert stream.closing
    assert subscription.lease.end == end
    assert (stream.due(), stream.late_at) == (None, None)
    stream.receive(Invalidation(at(6), ()), 100.2)
    assert stream.take(100.2) == Request(at(6))


def test_release_ends_the_lease_first(subscription: Subscription) -> None:
    """The lease has ended before the release can be sent."""
    stream = granted(subscription, 100.0)
    subscription.release()
    assert subscription.lease.end == -math.inf
    assert stream.take(100.0) == Request(at(5), released=True)
    stream.receive(Grant(at(5), 2, LEASE), 100.0)
    assert subscription.lease.end == -math.inf


def test_a_reset_drops_entries_and_lease(subscription: Subscription) -> None:
    """A lease belongs to one history, and this may be another. The stream continues: it confirms
    the Reset and requests the next lease at once."""
    stream = granted(subscription, 100.0)
    subscription.cache.store(b"k", entry("t1"), at(5))
    stream.receive(Reset(at(9)), 100.0)
    assert subscription.cache.entries == {}
    assert subscription.lease.end == -math.inf
    assert stream.take(100.0) == Request(at(9), number=2)
    assert not subscription.cache.store(b"k", entry("t1"), at(8))
    stream.receive(Grant(at(9), 2, LEASE), 100.1)
    assert subscription.lease.end == pytest.approx(100.0 + LESS)


def test_a_request_stays_open_across_a_reset(subscription: Subscription) -> None:
    """The server answers it after the Reset is confirmed. A new request would cost a round trip."""
    stream = subscription.open(100.0)
    stream.take(100.0)
    stream.receive(Reset(at(9, 2)), 100.1)
    assert stream.take(100.1) == Request(at(9, 2))
    assert stream.take(100.1) is None
    stream.receive(Grant(at(9, 2), 1, LEASE), 100.2)
    assert subscription.lease.end == pytest.approx(100.0 + LESS)


@pytest.mark.parametrize("position", [at(7), at(9, 2), at(9), at(12)])
def test_a_reset_ends_all_other_grants(subscription: Subscription, position: Position) -> None:
    """The other streams' servers assume the cache's old position, so they might not name all tokens
    to evict. Their grants no longer count, and the streams are left."""
    granting = granted(subscription, 100.0, at(9))
    other = subscription.open(100.0)
    other.take(100.0)
    resetting = reset_to(subscription, position, 100.0)
    assert subscription.cache.position == position
    assert subscription.lease.end == -math.inf
    for stream, number in ((granting, 2), (other, 1)):
        stream.receive(Grant(position, number, LEASE), 101.5)
        stream.receive(Invalidation(at(20), ("t1",)), 101.5)
        assert stream.closing
        assert stream.take(101.5) == Request(position, released=True)
    assert subscription.lease.end == -math.inf
    assert subscription.cache.position == position
    resetting.receive(Grant(position, 1, LEASE), 101.5)
    assert subscription.lease.end > 101.5


def test_an_invalidation_of_another_history_starts_over(subscription: Subscription) -> None:
    """A known revision with another mark proves that the histories differ. The cache then has no
    position, and reports that, until the server resets it."""
    stream = granted(subscription, 100.0)
    subscription.cache.store(b"k", entry("t1"), at(5))
    stream.receive(Invalidation(at(5, 2), ("t2",)), 100.1)
    assert len(subscription.cache) == 0
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
    """A lease permits answers on one history, up to a position that the cache has applied."""
    stream = reset_to(subscription, at(5), 100.0)
    stream.receive(Grant(position, 1, LEASE), 100.0)
    assert subscription.lease.end == -math.inf
    stream.receive(Grant(at(5), 1, LEASE), 100.0)
    assert subscription.lease.end > 100.0


def test_a_server_without_marks_grants_nothing(subscription: Subscription) -> None:
    """Its history cannot be identified, so every verify asks the service."""
    stream = subscription.open(100.0)
    stream.take(100.0)
    stream.receive(Reset(Position(5, 0)), 100.0)
    stream.receive(Grant(Position(5, 0), 1, LEASE), 100.0)
    stream.receive(Invalidation(Position(6, 0), ()), 100.0)
    stream.receive(Grant(Position(6, 0), 1, LEASE), 100.0)
    assert subscription.lease.end == -math.inf
    assert not subscription.cache.store(b"k", entry("t1"), Position(6, 0))


def test_servers_on_two_histories_do_not_mix_in_one_cache(subscription: Subscription) -> None:
    """A client that moves receives messages of two servers, which may follow different histories.

    The deletion of t1 by the first server is confirmed. The second server follows a deposed primary
    and names another token at a later revision. An answer from that server says that t1 is VALID.
    It must not enter a cache that answers under the first server's lease.
    """
    first = granted(subscription, 100.0, at(5))
    other = subscription.open(100.0)
    assert other.take(100.0) == Request(at(5), number=1)
    first.receive(Invalidation(at(7), ("t1",)), 100.1)
    other.receive(Invalidation(at(8, 2), ("t2",)), 100.2)
    admitted = subscription.cache.store(b"k", entry("t1"), at(8, 2))
    assert not (admitted and subscription.lease.end > 100.2)


def test_an_invalidation_that_skips_another_streams_change_leads_to_a_new_stream(
    subscription: Subscription,
) -> None:
    """Its server cannot know what the other server has named since, so a new stream asks it from
    that position. The other server's lease remains valid."""
    first = granted(subscription, 100.0, at(5))
    other = subscription.open(100.0)
    other.take(100.0)
    first.receive(Invalidation(at(6), ("t1",)), 100.1)
    subscription.cache.store(b"k", entry("t3"), at(6))
    other.receive(Invalidation(at(7), ("t3",)), 100.2)
    assert subscription.cache.position == at(6)
    assert len(subscription.cache) == 0, "evicting is safe"
    assert other.closing
    assert other.take(100.2) == Request(at(6), released=True)
    assert subscription.lease.end > 100.2
    assert not first.closing


def test_an_unrelated_invalidation_from_the_granting_stream_starts_over(
    subscription: Subscription,
) -> None:
    """If two servers may follow different histories, the one that grants decides."""
    first = granted(subscription, 100.0, at(5))
    other = subscription.open(100.0)
    other.take(100.0)
    other.receive(Invalidation(at(6, 2), ("t1",)), 100.1)
    assert subscription.cache.position == at(6, 2)
    subscription.cache.store(b"k", entry("t3"), at(6, 2))
    first.receive(Invalidation(at(7), ("t2",)), 100.2)
    assert subscription.cache.position == at(7)
    assert len(subscription.cache) == 0
    assert not subscription.cache.knows(at(6, 2))
    assert subscription.lease.end == -math.inf
    assert first.take(100.2) == Request(at(7), number=2)
    assert other.take(100.2) == Request(at(7), released=True)
    first.receive(Grant(at(7), 2, LEASE), 100.3)
    assert subscription.lease.end > 100.3


@pytest.mark.parametrize("known", [True, False])
def test_two_servers_with_the_same_changes_do_not_interfere(
    subscription: Subscription, known: bool
) -> None:
    """A revision that the cache knows by the same mark, or has passed, changes nothing."""
    first = granted(subscription, 100.0, at(5))
    other = subscription.open(100.0)
    other.take(100.0)
    first.receive(Invalidation(at(7), ("t1", "t2")), 100.1)
    if known:
        other.receive(Invalidation(at(7), ("t1", "t2")), 100.2)
        other.receive(Invalidation(at(8), ("t3",)), 100.3)
        assert subscription.cache.position == at(8)
    else:
        other.receive(Invalidation(at(6), ("t1",)), 100.2)
        assert subscription.cache.position == at(7)
    assert not first.closing
    assert not other.closing
    assert subscription.lease.end > 100.3


def test_an_unknown_event_empties_the_cache(subscription: Subscription) -> None:
    """It may invalidate anything, so entries are evicted and answers under way are not stored."""
    stream = granted(subscription, 100.0)
    subscription.cache.store(b"k", entry("t1"), at(5))
    stream.receive(None, 100.0)
    assert subscription.cache.entries == {}
    assert subscription.cache.position == at(5)
    assert not subscription.cache.store(b"k", entry("t1"), at(4))


def test_messages_are_translated() -> None:
    """Each field is converted, and an unreadable message is an error."""
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

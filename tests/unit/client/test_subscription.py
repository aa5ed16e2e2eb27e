"""What the conformance cases leave to the client: when it asks at random, and how messages are
translated. `tests/conformance` plays the rest with the same classes."""

import pytest
from latchkey import _subscription
from latchkey._convert import watch_event_in, watch_request_out
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
from latchkey_coherence.verdict_cache import Position, VerdictCache
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.positions import at

LEASE = 2.0
LESS = LEASE * 0.999  # the client's lease, reduced for clock drift


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


def test_clients_do_not_ask_in_step() -> None:
    """The time to ask is random for each lease, and leaves time to find another server."""
    draws = iter([0.0, 1.0])
    subscription = Subscription(VerdictCache(100), lambda: next(draws))
    dues = [granted(subscription, 100.0).due() for _ in range(2)]
    shares = [(100.0 + LESS - (due or 0)) / LESS for due in dues]
    assert shares == pytest.approx([_subscription.ASK_SHARE_MIN, _subscription.ASK_SHARE_MAX])


def test_answers_are_cached_at_revision_zero(subscription: Subscription) -> None:
    """Before the first deletion there is a position too: revision 0 with a mark."""
    granted(subscription, 100.0, at(0))
    assert subscription.cache.knows(at(0))
    assert subscription.lease.end > 100.0
    assert subscription.open(101.0).take(101.0) == Request(at(0), number=1)


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

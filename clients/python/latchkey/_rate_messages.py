"""Converts rate limits and shares between protobuf messages and the library's values."""

from datetime import timedelta

from google.protobuf.duration_pb2 import Duration
from latchkey_proto.v1 import token_service_pb2 as pb

from latchkey._rate_limit import RateLimit
from latchkey._shares import ShareQuestion, SharesReceived, core_limit
from latchkey.errors import InternalError


def rate_limit_in(message: pb.RateLimit) -> RateLimit:
    """Convert a rate limit from protobuf."""
    return RateLimit(message.count, duration_in(message.period), message.burst)


def rate_limit_out(limit: RateLimit) -> pb.RateLimit:
    """Convert a rate limit to protobuf."""
    if not isinstance(limit, RateLimit):
        raise TypeError(f"rate_limit must be a RateLimit, not {type(limit).__name__}")
    period = Duration()
    period.FromTimedelta(limit.period)
    return pb.RateLimit(count=limit.count, period=period, burst=limit.burst)


def shares_out(question: ShareQuestion) -> pb.RateSharesRequest:
    """Convert a question for shares to protobuf."""
    return pb.RateSharesRequest(
        number=question.number,
        wanted=[
            pb.WantedCalls(token_id=token_id, calls=calls) for token_id, calls in question.wanted
        ],
    )


def shares_in(message: pb.RateShares) -> SharesReceived:
    """Convert shares from protobuf."""
    duration = message.share_duration
    return SharesReceived(
        message.number,
        tuple(
            (share.token_id, share.calls, limit)
            for share in message.shares
            if (limit := core_limit(rate_limit_in(share.rate_limit))) is not None
        ),
        duration.seconds + duration.nanos / 1e9,
    )


def duration_in(message: Duration) -> timedelta:
    """Convert a duration from protobuf. Raises InternalError if it is out of range."""
    try:
        return message.ToTimedelta()
    except (ValueError, OverflowError) as error:
        raise InternalError("The service sent an invalid duration.") from error

"""The messages of a Watch stream, as values. `rpc/token_service.py` converts them to protobuf."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from latchkey_coherence.rate import RateLimit
from latchkey_coherence.verdict_cache import Position

__all__ = [
    "Closing",
    "Event",
    "Grant",
    "Invalidation",
    "IssuedCalls",
    "ReportReceived",
    "ReportedUse",
    "Request",
    "Reset",
    "Shares",
    "WantedCalls",
]


class ReportedUse(NamedTuple):
    """The uses of one secret that a client reports. Ages are seconds before the report."""

    token_id: str
    hint: str
    uses: int
    first_age_seconds: float
    last_age_seconds: float


class WantedCalls(NamedTuple):
    """The calls of a token with a rate limit that a client asks for."""

    token_id: str
    calls: int


class IssuedCalls(NamedTuple):
    """Calls that a client may accept: token ids, numbers, and limits under which they count."""

    calls: Sequence[tuple[str, int, RateLimit]]
    ends: float
    """Until when, in seconds on the process's clock."""


class Request(NamedTuple):
    """A message from a client.

    `report` is the number of its report, which has `use_count` uses, or 0 without a report.
    `shares_number` is that of its question for `wanted`, or 0 without a question.
    """

    applied: Position
    number: int
    released: bool
    report: int = 0
    use_count: int = 0
    uses: Iterable[ReportedUse] = ()
    """Read at most once."""
    shares_number: int = 0
    wanted: Sequence[WantedCalls] = ()


class Invalidation(NamedTuple):
    """The changes since the last message to this client."""

    position: Position
    token_ids: list[str]


class Grant(NamedTuple):
    """A lease for the client, in answer to the request with this number."""

    position: Position
    number: int
    lease_seconds: float


class Reset(NamedTuple):
    """The client must start over at this position."""

    position: Position


class Closing(NamedTuple):
    """The client must move to a new stream: the server will stop soon, or the stream is old."""


class ReportReceived(NamedTuple):
    """This process is responsible for the uses in the client's reports up to this number."""

    report: int


class Shares(NamedTuple):
    """The calls that the client asked for with this number, and how long they may be spent."""

    number: int
    calls: Sequence[tuple[str, int, RateLimit]]
    seconds: float


Event = Invalidation | Grant | Reset | Closing | ReportReceived | Shares

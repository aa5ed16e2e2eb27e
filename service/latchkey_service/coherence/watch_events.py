"""The messages of a Watch stream, as values. `rpc/token_service.py` converts them to protobuf."""

from collections.abc import Iterable
from typing import NamedTuple

from latchkey_coherence.verdict_cache import Position

__all__ = [
    "Closing",
    "Event",
    "Grant",
    "Invalidation",
    "ReportReceived",
    "ReportedUse",
    "Request",
    "Reset",
]


class ReportedUse(NamedTuple):
    """The uses of one secret that a client reports. Ages are seconds before the report."""

    token_id: str
    hint: str
    uses: int
    first_age_seconds: float
    last_age_seconds: float


class Request(NamedTuple):
    """A message from a client.

    `report` is the number of its report, which has `use_count` uses, or 0 without a report.
    """

    applied: Position
    number: int
    released: bool
    report: int = 0
    use_count: int = 0
    uses: Iterable[ReportedUse] = ()
    """Read at most once."""


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


Event = Invalidation | Grant | Reset | Closing | ReportReceived

"""The events of the `native` transport's library: what its tuples contain.

Owns no state. `native.py` decides what becomes of each event.
"""

from collections.abc import Sequence
from typing import Any

from latchkey_service.errors import PUSHBACK_METADATA

__all__ = [
    "Event",
    "has_malformed_timeout",
    "metadata_of",
    "seconds_left",
    "sendable",
    "with_time_left",
]

# Kind, number of the call, number of the method, request, header or peer, details.
Event = Sequence[Any]


def metadata_of(context: Any) -> Any:
    """Return the metadata of a call as key-value pairs, or None.

    Reads a private attribute. The public method converts all pairs to named tuples first, which
    would cost a Verify more than the rest of its authorization. Streams reach grpcio's part of the
    library, whose contexts lack that attribute.
    """
    try:
        return context._call.metadata  # noqa: SLF001 - see above; the version is pinned
    except AttributeError:
        return context.invocation_metadata()


def sendable(trailing_metadata: Any) -> list[tuple[str, str | bytes]]:
    """Return the metadata without the key that the library (0.5.0) refuses as reserved.

    It would then not answer the call.
    """
    return [pair for pair in trailing_metadata if pair[0] != PUSHBACK_METADATA]


def has_malformed_timeout(event: Event) -> bool:
    """Return whether the call has a header `grpc-timeout`, but no deadline."""
    # Without the header, this field has the peer's address, which is text.
    return event[4].__class__ is bytes and event[5][2] is None


def seconds_left(event: Event) -> float | None:
    """Return the caller's remaining time when the event was fetched; None means no limit."""
    _, _, seconds = event[5]
    return None if seconds is None else float(seconds)


def with_time_left(now: float, came: float, event: Event) -> Event:
    """Return the event with the caller's remaining time updated."""
    seconds = seconds_left(event)
    # After a wait of less than a turn, updating it is not worth the cost.
    if seconds is None or now - came < 0.001:
        return event
    metadata, peer, _ = event[5]
    return (*event[:5], (metadata, peer, max(0.0, seconds - (now - came))))

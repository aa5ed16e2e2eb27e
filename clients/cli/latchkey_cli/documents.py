"""JSON for scripts. The models of the client library have the proto's field names.

The values follow protobuf's JSON format. Times are RFC 3339 in UTC, or null. Durations are seconds
followed by "s". Enums use the proto's names: SCOPE_READ, VERDICT_VALID. Marks are 64-bit numbers
and therefore strings of digits: many JSON readers would round a number of that size. Days
are dates in UTC. Every key is always present.
"""

import dataclasses
import enum
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    # Types only: shell completion must not wait for gRPC to load.
    from latchkey import CreatedToken, RotatedToken

__all__ = ["document", "with_secret"]

_MARKS: Final = frozenset({"mark", "head_mark"})


def with_secret(answer: "CreatedToken | RotatedToken") -> dict[str, Any]:
    """Return a token with its new secret, and with the receipt if there is one."""
    return {
        "token": document(answer.token),
        "secret": answer.secret.reveal(),
        "receipt": document(answer.receipt),
    }


def document(value: Any) -> Any:
    """Return a model of the client library, or a value of its fields."""
    match value:
        case datetime():
            # Always with microseconds: all times have the same length, so they sort as text.
            moment = value.astimezone(UTC).isoformat(timespec="microseconds")
            return moment.replace("+00:00", "Z")
        case timedelta():
            return f"{value.total_seconds():.6f}s"
        case enum.Enum():
            kind = re.sub(r"(?<!^)(?=[A-Z])", "_", type(value).__name__)
            return f"{kind.upper()}_{value.name}"
        case Mapping():
            # Dates, the days of a usage, keep their order.
            if any(isinstance(key, date) for key in value):
                return {key.isoformat(): number for key, number in value.items()}
            return dict(sorted(value.items()))
        case tuple():
            return [document(each) for each in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return {name: str(each) if name in _MARKS else document(each) for name, each in fields}

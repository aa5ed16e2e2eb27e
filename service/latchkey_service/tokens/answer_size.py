"""How many tokens fit into one answer. Pure."""

from collections.abc import Iterable, Sequence
from typing import Final

from latchkey_service.tokens.verdict import TokenRecord

__all__ = ["TOKENS_BYTES_MAX", "fitting"]

# gRPC's default limit for messages that a client receives is 4 MiB. The rest is for other fields.
TOKENS_BYTES_MAX: Final = 4_000_000
# Id, account, name, hint, times, limits, and five secrets.
_OTHERS_BYTES: Final = 2_048
# Tags and lengths of an element.
_ELEMENT_BYTES: Final = 10


def fitting(records: Sequence[TokenRecord]) -> int:
    """Return how many of the first `records` fit into an answer: at least one, if there is one."""
    left = TOKENS_BYTES_MAX
    for count, record in enumerate(records):
        left -= _bytes_max(record)
        if left < 0:
            return max(1, count)
    return len(records)


def _bytes_max(record: TokenRecord) -> int:
    texts: Iterable[str] = (
        *record.labels.keys(),
        *record.labels.values(),
        *record.allowed_networks,
        *record.permissions,
        record.description,
    )
    return _OTHERS_BYTES + sum(len(text.encode()) + _ELEMENT_BYTES for text in texts)

"""Describes where a statement ran: the position of its snapshot, and the server's timeline.

Also owns the SQL condition for a known position, and the conversion of marks between Postgres and
the wire.
"""

from typing import NamedTuple

from latchkey_coherence.verdict_cache import Position

__all__ = ["POSITION_KNOWN", "Snapshot", "mark_in", "mark_out"]

_MARK_MODULUS = 1 << 64
_MARK_SIGN = 1 << 63

# True if this database's history holds the position ($1, $2), a revision and its mark: it is the
# newest position, or the newest that was pruned, or it is in the log (rule 12).
POSITION_KNOWN = """(
    (h.revision = $1 AND h.mark = $2) OR (h.pruned_revision = $1 AND h.pruned_mark = $2)
    OR EXISTS (SELECT FROM invalidation k WHERE k.revision = $1 AND k.mark = $2))"""


class Snapshot(NamedTuple):
    """The state of the database that one statement saw."""

    position: Position
    timeline: str | None
    """None: the engine does not report one, or it is a standby."""


def mark_in(mark: int) -> int:
    """Convert a mark from Postgres' signed bigint to the unsigned number of the wire."""
    return mark % _MARK_MODULUS


def mark_out(mark: int) -> int:
    """Convert a mark from the wire's unsigned number to Postgres' signed bigint."""
    return mark - _MARK_MODULUS if mark >= _MARK_SIGN else mark

"""Describes where a statement ran: the position of its snapshot, and the server's timeline.

Owns the SQL of a snapshot and of the condition for a known position, and the conversion of marks
between Postgres and the wire.
"""

from typing import TYPE_CHECKING, NamedTuple

from latchkey_coherence.verdict_cache import Position

if TYPE_CHECKING:
    import asyncpg

__all__ = ["POSITION_KNOWN", "SNAPSHOT", "Snapshot", "mark_in", "mark_out", "snapshot_of"]

_MARK_MODULUS = 1 << 64
_MARK_SIGN = 1 << 63

# The position and the timeline of a read, computed once per statement. It comes first in the join,
# so the statement returns at least one row, with the snapshot, even if nothing matches.
SNAPSHOT = """(SELECT revision, mark, server_timeline() AS timeline FROM head OFFSET 0) h"""

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


def snapshot_of(row: "asyncpg.Record") -> Snapshot:
    """Return the snapshot in the first columns of a row: revision, mark, timeline."""
    return Snapshot(Position(row[0], mark_in(row[1])), row[2])


def mark_in(mark: int) -> int:
    """Convert a mark from Postgres' signed bigint to the unsigned number of the wire."""
    return mark % _MARK_MODULUS


def mark_out(mark: int) -> int:
    """Convert a mark from the wire's unsigned number to Postgres' signed bigint."""
    return mark - _MARK_MODULUS if mark >= _MARK_SIGN else mark

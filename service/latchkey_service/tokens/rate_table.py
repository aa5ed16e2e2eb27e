"""The SQL of rate limits: the buckets that issue calls. No other statement locks their rows.

`latchkey_coherence.rate.draw` is the reference for what a bucket issues, and a test compares both.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from latchkey_coherence.rate import AHEAD_SECONDS, RateLimit

from latchkey_service.coherence.snapshot import SNAPSHOT, Snapshot, snapshot_of
from latchkey_service.postgres.connections import Pool, retry_on_conflict, translate_errors

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Issued", "RateTable", "Want", "draw_all"]

_MICROSECONDS = 1_000_000
_AHEAD = round(AHEAD_SECONDS * _MICROSECONDS)
_NOW = f"(extract(epoch FROM clock_timestamp()) * {_MICROSECONDS})::bigint"


def _draw(full_at: str, row: str) -> str:
    """Return a query of `full_at` and `calls` after a draw. The clock is read under the lock."""
    period, count = f"{row}.period", f"{row}.count"
    return f"""
        SELECT n.now + o.owed + (i.calls * {period} + {count} - 1) / {count}, i.calls
          FROM (SELECT {_NOW} AS now OFFSET 0) n,
               LATERAL (SELECT ({row}.burst * {period} + {count} - 1) / {count} AS capacity) c,
               LATERAL (SELECT least(greatest({full_at} - n.now, 0), c.capacity) AS owed) o,
               LATERAL (SELECT (c.capacity - o.owed) * {count} / {period} AS available) a,
               LATERAL (SELECT least({row}.needed, a.available) AS needed) m,
               LATERAL (SELECT m.needed + least({row}.ahead, {count} * {_AHEAD} / {period},
                                                (a.available - m.needed) / 2) AS calls) i
"""  # noqa: S608 - constants only


# One statement for all tokens. Rows are locked in the order of their ids, so that two processes do
# not wait for each other.
#
# A commit does not wait for the disk or for a standby. A crash of Postgres or a failover may undo
# the draws of the last moments, and so issue up to one more burst of each token.
_DRAW_ALL = f"""
WITH relaxed AS MATERIALIZED (
    SELECT set_config('synchronous_commit', 'off', true) IS NOT NULL AS done),
wanted AS MATERIALIZED (
    SELECT w.token_id, w.needed, w.ahead, t.id IS NOT NULL AS live, t.rate_count::bigint AS count,
           t.rate_period_seconds * {_MICROSECONDS}::bigint AS period, t.rate_burst::bigint AS burst
      FROM relaxed r,
           unnest($1::text[], $2::bigint[], $3::bigint[]) AS w (token_id, needed, ahead)
      LEFT JOIN token t ON t.id = w.token_id AND t.delete_time IS NULL
     WHERE r.done),
drawn AS (
    INSERT INTO rate_use AS u (token_id, count, period, burst, needed, ahead, full_at, calls)
    SELECT w.token_id, w.count, w.period, w.burst, w.needed, w.ahead, d.full_at, d.calls
      FROM wanted w, LATERAL ({_draw("0", "w")}) AS d (full_at, calls)
     WHERE w.count IS NOT NULL
     ORDER BY w.token_id
        ON CONFLICT (token_id) DO UPDATE
       SET count = excluded.count, period = excluded.period, burst = excluded.burst,
           needed = excluded.needed, ahead = excluded.ahead,
           (full_at, calls) = ({_draw("u.full_at", "excluded")})
    RETURNING token_id, full_at, calls, {_NOW} AS now)
SELECT h.revision, h.mark, h.timeline,
       w.token_id, w.live, w.count, w.period / {_MICROSECONDS}, w.burst, d.calls,
       -- Until the bucket can issue one call.
       greatest(0, d.full_at - d.now - (w.burst * w.period + w.count - 1) / w.count
                   + (w.period + w.count - 1) / w.count)
  FROM {SNAPSHOT} CROSS JOIN wanted w LEFT JOIN drawn d ON d.token_id = w.token_id
"""  # noqa: S608 - constants only


class Want(NamedTuple):
    """Calls of one token that a process wants."""

    token_id: str
    needed: int
    """For verifies that wait."""
    ahead: int
    """For later verifies. Fewer are issued if the bucket is not full."""


class Issued(NamedTuple):
    """What a token's bucket has issued."""

    token_id: str
    live: bool
    """False: the token was deleted, and nothing was issued."""
    limit: RateLimit | None
    """None: the token has no limit any more."""
    calls: int
    retry_seconds: float
    """When it can issue another call."""


@retry_on_conflict
async def draw_all(
    connection: "Connection", wants: Sequence[Want]
) -> tuple[dict[str, Issued], Snapshot]:
    """Draw from the buckets of up to 1,000 tokens; return what they issued, and the snapshot.

    `wants` has at least one element, and no token twice. If the outcome is unknown, nothing may be
    spent: the statement must not be repeated for the same calls, which would only lose them.
    """
    token_ids, needed, ahead = (list(column) for column in zip(*wants, strict=True))
    with translate_errors():
        rows = await connection.fetch(_DRAW_ALL, token_ids, needed, ahead)
    return {row[3]: _issued(row) for row in rows}, snapshot_of(rows[0])


def _issued(row: "asyncpg.Record") -> Issued:
    token_id, live, count, period, burst, calls, retry = row[3:]
    if count is None:
        return Issued(token_id, live, None, 0, 0.0)
    return Issued(token_id, live, RateLimit(count, period, burst), calls, retry / _MICROSECONDS)


class RateTable:
    """Maintains the table. Every method raises StoreUnavailable if Postgres is too slow."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @retry_on_conflict
    async def purge(self, limit: int) -> int:
        """Remove up to `limit` rows of full buckets, which carry no information; return how
        many."""
        async with self._pool.session() as session:
            status = await session.execute(
                f"""
                DELETE FROM rate_use
                 WHERE token_id IN (SELECT token_id FROM rate_use WHERE full_at < {_NOW}
                                     LIMIT $1 FOR UPDATE SKIP LOCKED)
                """,  # noqa: S608 - a constant only
                limit,
            )
        return int(status.removeprefix("DELETE "))

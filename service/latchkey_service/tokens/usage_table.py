"""The SQL of the uses of tokens. No other statement waits for the locks of these tables.

`token_store.py` joins `token_usage` when it reads tokens, and removes a token's rows together with
its tombstone.
"""

from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import NamedTuple

from latchkey_service.coherence.snapshot import SNAPSHOT, Snapshot, snapshot_of
from latchkey_service.postgres.connections import Pool, retry_on_conflict
from latchkey_service.tokens.usage import DAYS_MAX, Use

__all__ = ["CallerUsage", "UsageTable"]

# Callers of one token in an answer. A policy rarely has more that use the same token.
CALLERS_MAX = 100
# Far longer than a writer repeats a statement.
WRITER_KEPT = "1 day"

# One statement, so that a batch is written as a whole or not at all, with one round trip.
#
# A batch whose outcome is unknown is written again under the same number, and `fresh` is then empty
# if it was committed before. So each use is counted once.
#
# A commit does not wait for the disk or for a standby: uses of the last second before Postgres
# crashes may be lost, and a missing standby does not hold up a connection.
#
# Only reads the token's row, without a lock, so that a Delete never waits for this statement and
# this statement never waits for a Delete.
_RECORD = """
WITH relaxed AS MATERIALIZED (
    SELECT set_config('synchronous_commit', 'off', true) IS NOT NULL AS done),
fresh AS (
    INSERT INTO token_usage_writer AS w (writer, number)
    SELECT $1, $2 FROM relaxed WHERE done
        ON CONFLICT (writer) DO UPDATE
       SET number = excluded.number, write_time = excluded.write_time
     WHERE w.number < excluded.number
    RETURNING number),
used AS MATERIALIZED (
    SELECT t.id AS token_id,
           -- A client may report any hint, and each makes a row. So only known ones are kept. The
           -- hint of an imported secret may have any form, so the last four characters decide.
           CASE WHEN u.hint = t.hint THEN u.hint
                ELSE coalesce((SELECT s.hint FROM secret s
                                WHERE s.token_id = t.id AND right(s.hint, 4) = right(u.hint, 4)
                                ORDER BY s.hint = u.hint DESC, s.ordinal DESC LIMIT 1), '')
            END AS hint,
           u.caller, t.account_id,
           greatest(u.first_time, t.create_time) AS first_time,
           greatest(u.last_time, t.create_time) AS last_time,
           u.count, t.delete_time IS NULL AS live
      FROM fresh,
           unnest($3::text[], $4::text[], $5::text[], $6::timestamptz[], $7::timestamptz[],
                  $8::bigint[]) AS u (token_id, hint, caller, first_time, last_time, count)
      JOIN token t ON t.id = u.token_id
     WHERE t.delete_time IS NULL OR u.last_time <= t.delete_time),
days AS (
    INSERT INTO token_usage_day AS d (token_id, caller, day, count)
    SELECT token_id, caller, (last_time AT TIME ZONE 'UTC')::date AS day, sum(count)
      FROM used
     WHERE count > 0
     GROUP BY token_id, caller, day
     ORDER BY token_id, caller, day
        ON CONFLICT (token_id, caller, day) DO UPDATE
       SET count = least(d.count::numeric + excluded.count, 9223372036854775807)::bigint),
-- For the order of List. Its index changes with each row, so a token's row changes once a minute.
ordered AS (
    INSERT INTO token_last_use AS o (token_id, account_id, last_used_time)
    SELECT token_id, account_id, max(last_time) FROM used
     WHERE live
     GROUP BY token_id, account_id
     ORDER BY token_id
        ON CONFLICT (token_id) DO UPDATE SET last_used_time = excluded.last_used_time
     WHERE o.last_used_time < excluded.last_used_time - interval '1 minute')
INSERT INTO token_usage AS x (token_id, hint, caller, first_time, last_time)
SELECT token_id, hint, caller, min(first_time), max(last_time)
  FROM used
 GROUP BY token_id, hint, caller
 ORDER BY token_id, hint, caller
    ON CONFLICT (token_id, hint, caller) DO UPDATE
   SET first_time = least(x.first_time, excluded.first_time),
       last_time = greatest(x.last_time, excluded.last_time)
"""

# One statement, so that the token, its uses and the snapshot belong together.
_BY_CALLER = f"""
SELECT h.revision, h.mark, h.timeline, t.id, u.caller, u.first_time, u.last_time, d.day, d.count
  FROM {SNAPSHOT}
  LEFT JOIN token t
    ON t.id = $2
   AND ($1::text IS NULL OR t.account_id = $1 AND t.delete_time IS NULL)
  LEFT JOIN LATERAL (
       SELECT x.caller, min(x.first_time) AS first_time, max(x.last_time) AS last_time
         FROM token_usage x
        WHERE x.token_id = t.id
        GROUP BY x.caller
        ORDER BY max(x.last_time) DESC, x.caller
        LIMIT {CALLERS_MAX}) u ON true
  LEFT JOIN token_usage_day d
    ON d.token_id = t.id AND d.caller = u.caller AND d.day > $3
 ORDER BY u.last_time DESC, u.caller, d.day DESC
"""  # noqa: S608 - constants only


class CallerUsage(NamedTuple):
    """The uses of a token by one caller. `days` lists the days with uses, the newest first."""

    caller: str
    first_time: datetime
    last_time: datetime
    days: list[tuple[date, int]]


class UsageTable:
    """The tables. All methods raise StoreUnavailable if Postgres does not answer in time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @retry_on_conflict
    async def record(self, writer: str, number: int, uses: Sequence[Use]) -> None:
        """Add `uses` to the tables, unless `writer` has already written this number.

        Numbers of a writer increase. `uses` are sorted. Ignores tokens that do not exist.
        """
        columns = zip(*uses, strict=True)
        token_ids, hints, callers, firsts, lasts, counts = (list(column) for column in columns)
        async with self._pool.session() as session:
            await session.execute(
                _RECORD,
                writer,
                number,
                token_ids,
                hints,
                callers,
                [datetime.fromtimestamp(time, UTC) for time in firsts],
                [datetime.fromtimestamp(time, UTC) for time in lasts],
                counts,
            )

    @retry_on_conflict
    async def by_caller(
        self, account_id: str | None, token_id: str, today: date
    ) -> tuple[list[CallerUsage] | None, Snapshot]:
        """Return who used the account's live token, and the snapshot of the read.

        Without an account, the token may be any account's, and may be deleted. The most recent
        caller comes first. Returns None if there is no such token.
        """
        oldest = date.fromordinal(today.toordinal() - DAYS_MAX)
        async with self._pool.session() as session:
            rows = await session.fetch(_BY_CALLER, account_id, token_id, oldest)
        snapshot = snapshot_of(rows[0])
        if rows[0][3] is None:
            return None, snapshot
        found: dict[str, CallerUsage] = {}
        for _, _, _, _, caller, first_time, last_time, day, count in rows:
            if caller is None:
                continue  # nobody has used it
            usage = found.setdefault(caller, CallerUsage(caller, first_time, last_time, []))
            if day is not None:
                usage.days.append((day, count))
        return list(found.values()), snapshot

    @retry_on_conflict
    async def purge(self, today: date, limit: int) -> int:
        """Remove up to `limit` counts of days that are too long ago; return how many.

        Removes the leftovers of stopped writers, too.
        """
        oldest = date.fromordinal(today.toordinal() - DAYS_MAX)
        async with self._pool.session() as session:
            status = await session.execute(
                f"""
                WITH writers AS (
                    DELETE FROM token_usage_writer
                     WHERE write_time < clock_timestamp() - interval '{WRITER_KEPT}')
                DELETE FROM token_usage_day
                 WHERE (token_id, caller, day) IN (
                           SELECT token_id, caller, day FROM token_usage_day
                            WHERE day <= $1
                            LIMIT $2
                              FOR UPDATE SKIP LOCKED)
                """,  # noqa: S608 - a constant only
                oldest,
                limit,
            )
        return int(status.removeprefix("DELETE "))

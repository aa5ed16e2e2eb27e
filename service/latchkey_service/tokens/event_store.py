"""The SQL of events: claiming and removing them, announcing expiries, and counting.

`event_table.py` contains the part that writes an event with its change. `process/webhook.py`
delivers. All times of attempts are by the clock of the database, because several hosts deliver.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from latchkey_service.postgres.connections import Pool, retry_on_conflict
from latchkey_service.tokens.event_table import EXPIRING, Outbox

__all__ = ["Backlog", "Event", "EventStore", "ExpiryCursor"]

# The counts are bounded, because their time is proportional to the rows. 10⁶ take about 0.2 s.
BACKLOG_COUNTED_MAX = 100_000
EXPIRING_COUNTED_MAX = 1_000_000


class Event(NamedTuple):
    """An event that this process has claimed."""

    id: int
    message_id: UUID
    type: str
    time: datetime
    account_id: str
    token_id: str
    name: str
    expire_time: datetime | None
    caller: str
    attempts: int
    """Including the one that the claim is for."""


class Backlog(NamedTuple):
    """The events that are not delivered."""

    events: int
    """At most BACKLOG_COUNTED_MAX."""
    oldest_seconds: float
    """Age of the oldest one; 0 if there is none."""


class ExpiryCursor(NamedTuple):
    """A position in the order of expiries: after this time and token."""

    expire_time: datetime
    token_id: str


class EventStore:
    """Reads and removes events. Every method raises StoreUnavailable if Postgres is too slow."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @retry_on_conflict
    async def claim(self, limit: int, claim_seconds: float) -> list[Event]:
        """Claim up to `limit` due events. No other process gets them for `claim_seconds`."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                """
                WITH due AS MATERIALIZED (
                    SELECT id FROM webhook_event
                     WHERE next_time <= clock_timestamp()
                     ORDER BY next_time LIMIT $1 FOR UPDATE SKIP LOCKED)
                UPDATE webhook_event e
                   SET attempts = e.attempts + 1,
                       next_time = clock_timestamp() + make_interval(secs => $2)
                  FROM due WHERE e.id = due.id
                RETURNING e.id, e.message_id, e.type, e.time, e.account_id, e.token_id, e.name,
                          e.expire_time, e.caller, e.attempts
                """,
                limit,
                claim_seconds,
            )
        return sorted((Event(*row) for row in rows), key=lambda event: event.id)

    @retry_on_conflict
    async def remove(self, ids: Sequence[int]) -> None:
        """Remove events that were delivered."""
        async with self._pool.session() as session:
            await session.execute("DELETE FROM webhook_event WHERE id = ANY($1::bigint[])", ids)

    @retry_on_conflict
    async def postpone(
        self, delays: Sequence[tuple[int, float]], retry_days: int
    ) -> list[tuple[int, str, str]]:
        """Set when events that were not delivered are due again: pairs of id and seconds.

        Removes those that are older than `retry_days`, and returns their ids, types and tokens.
        """
        async with self._pool.session() as session:
            rows = await session.fetch(
                """
                WITH failed AS MATERIALIZED (
                    SELECT * FROM unnest($1::bigint[], $2::float8[]) AS f (id, seconds)),
                postponed AS (
                    UPDATE webhook_event e
                       SET next_time = clock_timestamp() + make_interval(secs => f.seconds)
                      FROM failed f
                     WHERE e.id = f.id
                       AND e.time >= clock_timestamp() - make_interval(days => $3))
                DELETE FROM webhook_event e USING failed f
                 WHERE e.id = f.id AND e.time < clock_timestamp() - make_interval(days => $3)
                RETURNING e.id, e.type, e.token_id
                """,
                [event_id for event_id, _ in delays],
                [seconds for _, seconds in delays],
                retry_days,
            )
        return [tuple(row) for row in rows]

    @retry_on_conflict
    async def backlog(self) -> Backlog:
        """Return how many events are not delivered, and how old the oldest one is."""
        async with self._pool.session() as session:
            (row,) = await session.fetch(
                """
                SELECT (SELECT count(*) FROM (SELECT FROM webhook_event LIMIT $1) counted),
                       extract(epoch FROM clock_timestamp()
                               - (SELECT time FROM webhook_event ORDER BY time LIMIT 1))::float8
                """,
                BACKLOG_COUNTED_MAX,
            )
        return Backlog(row[0], max(0.0, row[1] or 0.0))

    @retry_on_conflict
    async def take_turn(self, task: str, seconds: float) -> bool:
        """Return whether this process does `task` now. If so, no other process does for
        `seconds`."""
        async with self._pool.session() as session:
            return bool(
                await session.fetchval(
                    """
                    INSERT INTO upkeep_turn AS u (task, next_time)
                    VALUES ($1, clock_timestamp() + make_interval(secs => $2))
                    ON CONFLICT (task) DO UPDATE SET next_time = excluded.next_time
                     WHERE u.next_time <= clock_timestamp()
                    RETURNING true
                    """,
                    task,
                    seconds,
                )
            )

    @retry_on_conflict
    async def announce_expiring(
        self,
        outbox: Outbox,
        days: Sequence[int],
        now: datetime,
        after: ExpiryCursor | None,
        limit: int,
    ) -> ExpiryCursor | None:
        """Write an event for each token that expires within one of `days` and was not announced.

        Looks at up to `limit` tokens after the position `after`, in the order of their expiry.
        Returns the position of the last one, or None after the last token. Of several thresholds
        that have passed, only the shortest is announced. A token that was created later than a
        threshold is not announced for it.
        """
        cursor = after or ExpiryCursor(now, "")
        async with self._pool.session() as session:
            (row,) = await session.fetch(
                f"""
                WITH page AS MATERIALIZED (
                    SELECT t.id, t.account_id, t.name, t.create_time, t.expire_time
                      FROM token t
                     WHERE t.delete_time IS NULL
                       AND t.expire_time <= $1::timestamptz + make_interval(days => $2)
                       AND (t.expire_time, t.id) > ($3, $4)
                     ORDER BY t.expire_time, t.id LIMIT $5),
                due AS (
                    SELECT p.*, d.days
                      FROM page p CROSS JOIN LATERAL (
                           SELECT days FROM unnest($6::integer[]) AS days
                            WHERE p.expire_time <= $1 + make_interval(days => days)
                              AND p.expire_time >= p.create_time + make_interval(days => days)
                            ORDER BY days LIMIT 1) d),
                noticed AS (
                    -- Of two workers, the second one waits here, and then writes no event.
                    INSERT INTO expiry_notice AS n (token_id, expire_time, days)
                    SELECT id, expire_time, days FROM due
                    ON CONFLICT (token_id) DO UPDATE
                       SET expire_time = excluded.expire_time, days = excluded.days
                     WHERE n.expire_time <> excluded.expire_time OR n.days > excluded.days
                    RETURNING token_id)
                {
                    outbox.insert(
                        EXPIRING,
                        "SELECT $1::timestamptz, d.account_id, d.id, d.name, d.expire_time, ''"
                        " FROM due d JOIN noticed n ON n.token_id = d.id",
                    )
                }
                SELECT count(*), (array_agg(p.expire_time ORDER BY p.expire_time DESC))[1],
                       (array_agg(p.id ORDER BY p.expire_time DESC, p.id DESC))[1]
                  FROM page p
                """,  # noqa: S608 - constants only
                now,
                max(days),
                cursor.expire_time,
                cursor.token_id,
                limit,
                list(days),
            )
        return ExpiryCursor(row[1], row[2]) if row[0] == limit else None

    @retry_on_conflict
    async def purge_notices(self, before: datetime, limit: int) -> int:
        """Remove up to `limit` notices of expiries before a time; return how many."""
        async with self._pool.session() as session:
            status = await session.execute(
                """
                DELETE FROM expiry_notice WHERE token_id IN (
                       SELECT token_id FROM expiry_notice WHERE expire_time < $1
                        ORDER BY expire_time LIMIT $2 FOR UPDATE SKIP LOCKED)
                """,
                before,
                limit,
            )
        return int(status.removeprefix("DELETE "))

    @retry_on_conflict
    async def count_expiring(self, days: tuple[int, int, int], now: datetime) -> dict[int, int]:
        """Return how many live tokens expire within each number of days, the smallest first.

        Counts the first EXPIRING_COUNTED_MAX tokens.
        """
        async with self._pool.session() as session:
            (row,) = await session.fetch(
                """
                SELECT count(*) FILTER (WHERE expire_time <= ($2::timestamptz[])[1]),
                       count(*) FILTER (WHERE expire_time <= ($2::timestamptz[])[2]),
                       count(*)
                  FROM (SELECT expire_time FROM token
                         WHERE delete_time IS NULL AND expire_time > $1
                           AND expire_time <= ($2::timestamptz[])[3]
                         ORDER BY expire_time LIMIT $3) expiring
                """,
                now,
                [now + timedelta(days=number) for number in days],
                EXPIRING_COUNTED_MAX,
            )
        return dict(zip(days, row, strict=True))

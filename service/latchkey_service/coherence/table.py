"""The SQL of verifiers and of the log: `OwnRow` on the heart's connection, the rest on the pool."""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from latchkey_coherence.memory import HISTORY_MAX

from latchkey_service.coherence.confirmation import VerifierRow
from latchkey_service.coherence.membership import Log
from latchkey_service.database import Pool, durably, retrying, translated
from latchkey_service.errors import StoreUnavailable

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = [
    "CHANNEL",
    "NOTIFY",
    "Identity",
    "OwnRow",
    "Rows",
    "Status",
    "VerifierStatus",
    "VerifierTable",
    "read_rows",
]

# What a Delete's wake-up is sent on, with its revision as the payload.
CHANNEL = "latchkey_invalidation"
# Not durable, as there is nothing to keep: a notifying commit holds a lock of the whole cluster
# until its WAL is flushed, and a standby has it.
NOTIFY = "SELECT set_config('synchronous_commit', 'off', true), pg_notify($1, $2)"

# What a Delete waits for, and what tells that a process is dead.
_ROWS = """
SELECT h.revision, v.id, v.incarnation, v.renewal, v.acknowledged_revision, v.lease_seconds
  FROM head h
  LEFT JOIN verifier v ON true
"""


class Rows(NamedTuple):
    """All verifiers' rows, and head in the snapshot that they were read in."""

    head: int
    verifiers: list[VerifierRow]


@retrying
async def read_rows(connection: "Connection") -> Rows:
    """Return what a Delete waits for."""
    with translated():
        rows = await connection.fetch(_ROWS)
    return Rows(rows[0][0], [VerifierRow(*row[1:]) for row in rows if row[1] is not None])


@dataclass(frozen=True, slots=True)
class Identity:
    """What a process says of itself in its row. `id` is another one each time it starts."""

    id: str
    host: str
    process_id: int
    version: str
    lease_seconds: float
    # The newest first. Empty: not reported.
    pepper_ids: tuple[str, ...] = ()


class VerifierStatus(NamedTuple):
    """A verifier's row, for people. Times are the database's."""

    id: str
    host: str
    process_id: int
    version: str
    start_time: datetime
    acknowledged_revision: int
    lease_seconds: float
    lease_remaining_seconds: float
    clients: int
    notifications: int
    pepper_ids: list[str]


@dataclass(frozen=True, slots=True)
class Status:
    """The head revision and all verifiers, the oldest first, from one snapshot."""

    head_revision: int
    verifiers: list[VerifierStatus]


class OwnRow:
    """This process's row, on a connection of its own: a renewal must not wait for the pool."""

    def __init__(self, connection: "Connection", identity: Identity) -> None:
        self._connection = connection
        self._identity = identity

    @retrying
    async def register(self, incarnation: int, confirmed: int | None) -> tuple[int, int]:
        """Commit the row, and return head and the revision that it acknowledges (rule 2).

        That is head, or less where clients that may still answer have `confirmed` less. Who commits
        a later revision afterwards finds the row and waits for it; who committed it before is seen
        by every read that follows. An attempt that was given up may still be carried out, late: it
        changes nothing, since by then the row is of a later incarnation.
        """
        identity = self._identity
        with translated(), durably(self._connection):
            row = await self._connection.fetchrow(
                """
                INSERT INTO verifier (id, incarnation, acknowledged_revision, lease_seconds, host,
                                      process_id, version, pepper_ids)
                SELECT $1, $2, least(h.revision, $7), $3, $4, $5, $6, $8 FROM head h
                ON CONFLICT (id) DO UPDATE
                   SET incarnation = excluded.incarnation, renewal = verifier.renewal + 1,
                       acknowledged_revision = excluded.acknowledged_revision
                 WHERE verifier.incarnation < excluded.incarnation
                RETURNING (SELECT revision FROM head), acknowledged_revision
                """,
                identity.id,
                incarnation,
                identity.lease_seconds,
                identity.host,
                identity.process_id,
                identity.version,
                confirmed,
                list(identity.pepper_ids),
            )
        if row is None:
            raise StoreUnavailable("Another attempt to register came in between; try again.")
        return row[0], row[1]

    @retrying
    async def read_log(self, applied: int) -> Log:
        """Return what the log names after `applied`, up to head, on the primary (rule 3)."""
        with translated():
            rows = await self._connection.fetch(
                """
                SELECT h.revision, h.pruned_revision, i.token_id
                  FROM head h
                  LEFT JOIN invalidation i ON i.revision > $1
                 ORDER BY i.revision
                 LIMIT $2
                """,
                applied,
                HISTORY_MAX + 1,
            )
        head, pruned, _ = rows[0]
        complete = pruned <= applied and len(rows) <= HISTORY_MAX
        return Log(head, tuple(row[2] for row in rows if row[2] is not None), complete)

    @retrying
    async def renew(
        self, incarnation: int, acknowledged: int, clients: int, notifications: int
    ) -> bool:
        """Renew the row and acknowledge; tell whether it was there (rule 3).

        Committed as durably as deletions are: a process that talks to a deposed primary must not
        take an answer that will be undone for a renewal.
        """
        with translated(), durably(self._connection):
            status = await self._connection.execute(
                """
                UPDATE verifier
                   SET renewal = renewal + 1, acknowledged_revision = $3, clients = $4,
                       notifications = $5, renew_time = clock_timestamp()
                 WHERE id = $1 AND incarnation = $2
                """,
                self._identity.id,
                incarnation,
                acknowledged,
                clients,
                notifications,
            )
        return status == "UPDATE 1"

    @retrying
    async def remove(self, incarnation: int) -> None:
        """Remove the row: the process answers nothing any more, nor does a client of its."""
        with translated():
            await self._connection.execute(
                "DELETE FROM verifier WHERE id = $1 AND incarnation = $2",
                self._identity.id,
                incarnation,
            )

    async def all_rows(self) -> list[VerifierRow]:
        """Return everybody's rows."""
        return (await read_rows(self._connection)).verifiers

    @retrying
    async def remove_dead(self, row: VerifierRow) -> bool:
        """Remove another's row unless it has been renewed; tell whether it went (rule 9).

        Never waits for a lock: whoever holds the row's is at work on it, or dead with it.
        """
        with translated():
            status = await self._connection.execute(
                """
                DELETE FROM verifier
                 WHERE id IN (SELECT v.id
                                FROM verifier v
                               WHERE v.id = $1 AND v.incarnation = $2 AND v.renewal = $3
                                 FOR UPDATE SKIP LOCKED)
                """,
                row.id,
                row.incarnation,
                row.renewal,
            )
        return status == "DELETE 1"


class VerifierTable:
    """All verifiers' rows, and the log."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def notify(self, revision: int) -> None:
        """Wake the verifiers, in a transaction of its own after the commit (rule 10).

        Raises StoreUnsupported where the engine has no notifications.
        """
        async with self._pool.session() as session:
            await session.execute(NOTIFY, CHANNEL, str(revision))

    @retrying
    async def status(self) -> Status:
        """Return head and rows, for people."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                """
                SELECT h.revision, v.id, v.host, v.process_id, v.version, v.start_time,
                       v.acknowledged_revision, v.lease_seconds,
                       greatest(0, v.lease_seconds - extract(
                           epoch FROM clock_timestamp() - v.renew_time))::double precision,
                       v.clients, v.notifications, v.pepper_ids
                  FROM head h
                  LEFT JOIN verifier v ON true
                 ORDER BY v.start_time, v.id
                """
            )
        found = [VerifierStatus(*row[1:]) for row in rows if row[1] is not None]
        return Status(rows[0][0], found)

    @retrying
    async def prune_log(self, keep_seconds: float, limit: int) -> int:
        """Remove invalidations that every verifier has acknowledged and that are older than that.

        About `limit` at a time, for head is locked meanwhile. Returns how many went. Nothing
        depends on the clock: who has applied less than was pruned is told so by `pruned_revision`,
        in the snapshot in which it reads the log (rule 11).
        """
        async with self._pool.session() as session:
            status = await session.execute(
                """
                WITH old AS (
                    SELECT i.revision
                      FROM invalidation i
                     WHERE i.create_time < clock_timestamp() - make_interval(secs => $1)
                       AND i.revision <= coalesce(
                               (SELECT min(v.acknowledged_revision) FROM verifier v), i.revision)
                     ORDER BY i.revision
                     LIMIT $2),
                bound AS (SELECT max(revision) AS revision FROM old),
                marked AS (
                    UPDATE head h
                       SET pruned_revision = b.revision
                      FROM bound b
                     WHERE b.revision > h.pruned_revision
                    RETURNING h.pruned_revision)
                DELETE FROM invalidation i USING marked m WHERE i.revision <= m.pruned_revision
                """,
                keep_seconds,
                limit,
            )
        return int(status.removeprefix("DELETE "))

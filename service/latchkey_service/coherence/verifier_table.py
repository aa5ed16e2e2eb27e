"""The SQL of verifiers and of the log.

Owns the `verifier` table, and reads and prunes `invalidation`. The token store writes
`invalidation` when it deletes a token. `OwnRow` runs on the lease renewer's connection, `read_rows`
on any connection, and everything else on the pool.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from latchkey_coherence.verdict_cache import HISTORY_MAX, Position

from latchkey_service.coherence.ack_rules import VerifierRow
from latchkey_service.coherence.log import Change, Log, Registration, Server
from latchkey_service.coherence.snapshot import POSITION_KNOWN, mark_in, mark_out
from latchkey_service.coherence.verifier_reports import (
    Report,
    SiblingReport,
    Status,
    VerifierStatus,
    processes_of,
)
from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres.connections import (
    DURABLE,
    Pool,
    require_durable_commit,
    retry_on_conflict,
    translate_errors,
)

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = [
    "CHANNEL",
    "LIFECYCLE_RULES",
    "NOTIFY",
    "RATE_RULES",
    "Identity",
    "OwnRow",
    "Registration",
    "Report",
    "Rows",
    "SiblingReport",
    "Status",
    "VerifierStatus",
    "VerifierTable",
    "read_rows",
]

# The channel for the notification after a Delete. The payload is the revision.
CHANNEL = "latchkey_invalidation"
# Not durable, because a notification need not survive. A notifying commit holds a lock of the whole
# cluster until its WAL is flushed and a standby has received it.
NOTIFY = "SELECT set_config('synchronous_commit', 'off', true), pg_notify($1, $2)"

# All verifiers' rows, and which of the positions ($1, $2) this database's history holds.
_ROWS = """
WITH known AS MATERIALIZED (
    SELECT array_agg(p.revision) AS revisions, array_agg(p.mark) AS marks
      FROM unnest($1::bigint[], $2::bigint[]) AS p (revision, mark), head h
     WHERE (h.revision = p.revision AND h.mark = p.mark)
        OR (h.pruned_revision = p.revision AND h.pruned_mark = p.mark)
        OR EXISTS (SELECT FROM invalidation i WHERE i.revision = p.revision AND i.mark = p.mark))
SELECT k.revisions, k.marks, v.id, v.incarnation, v.renewal, v.acknowledged_revision,
       v.lease_seconds, v.clients_confirmed, v.clients_outwaited, v.processes,
       v.processes_outwaited
  FROM known k
  LEFT JOIN verifier v ON true
"""

# The state of the database, and whether its history holds the position ($1, $2). Evaluated once for
# each statement, however many rows of the log it returns.
_STATE = f"""
    state AS MATERIALIZED (
        SELECT h.revision, h.mark, server_identifier() AS identifier,
               server_timeline() AS timeline, {POSITION_KNOWN} AS known
          FROM head h)"""  # noqa: S608 - constants only
# That state, and the log after the position. At least one row.
_STATE_AND_LOG = """s.known, s.identifier, s.timeline, s.revision, s.mark,
               i.revision, i.mark, i.token_id
          FROM state s
          LEFT JOIN invalidation i ON s.known AND i.revision > $1
         ORDER BY i.revision
         LIMIT $3"""

_READ_LOG = f"""
          WITH {_STATE}
        SELECT {_STATE_AND_LOG}"""

# A single statement uses a single server and snapshot (rule 3). Behind a pooler, two statements
# could reach two servers, and the lease would depend on another server's log.
_RENEW = f"""
          WITH {_STATE},
               renewed AS (
        UPDATE verifier v
           SET renewal = v.renewal + 1, acknowledged_revision = $6, clients = $7,
               clients_confirmed = $8, clients_outwaited = $9, waiting_for = $10::text[],
               notifications = $11, database_host = $12, warnings = $13::text[],
               processes = $14, processes_outwaited = $15,
               siblings = coalesce($16::text::jsonb, v.siblings),
               server_identifier = s.identifier, server_timeline = s.timeline,
               renew_time = clock_timestamp()
          FROM state s
         WHERE s.known AND v.id = $4 AND v.incarnation = $5 AND {DURABLE}
        RETURNING v.id)
        SELECT EXISTS (SELECT FROM renewed), {_STATE_AND_LOG}"""  # noqa: S608 - constants only


class Rows(NamedTuple):
    """All verifiers' rows, and those of the requested positions that the history holds."""

    known: frozenset[Position]
    verifiers: list[VerifierRow]


@retry_on_conflict
async def read_rows(connection: "Connection", positions: Iterable[Position] = ()) -> Rows:
    """Return all verifiers' rows, and which of `positions` this database's history holds."""
    asked = list(positions)
    with translate_errors():
        rows = await connection.fetch(
            _ROWS, [p.revision for p in asked], [mark_out(p.mark) for p in asked]
        )
    revisions, marks, *_ = rows[0]
    known = frozenset(map(Position, revisions or (), map(mark_in, marks or ())))
    return Rows(known, [VerifierRow(*row[2:]) for row in rows if row[2] is not None])


def _log(rows: "Sequence[asyncpg.Record | tuple[Any, ...]]") -> Log:
    """Build the log from rows of `_STATE_AND_LOG`."""
    known, identifier, timeline, revision, mark, *_ = rows[0]
    named = [row[5:] for row in rows if row[5] is not None]
    changes = tuple(
        Change(Position(position[0], mark_in(position[1])), tuple(row[2] for row in group))
        for position, group in groupby(named, key=itemgetter(0, 1))
    )
    return Log(
        known=known,
        server=Server(identifier, timeline),
        head=Position(revision, mark_in(mark)),
        changes=changes,
        complete=len(rows) <= HISTORY_MAX,
    )


# The rules by which this release judges tokens, in `verifier.rules`. Releases that report 0 know
# only scope, expiry and deletion. Those that report 1 do not seal the rows of tokens, and those
# that report 2 do not know rate limits.
LIFECYCLE_RULES = 1
RATE_RULES = 3
RULES = RATE_RULES


@dataclass(frozen=True, slots=True)
class Identity:
    """A process's description of itself in its row. `id` is new each time the process starts."""

    id: str
    host: str
    process_id: int
    version: str
    lease_seconds: float
    # Newest first. Empty: not reported.
    pepper_ids: tuple[str, ...] = ()


class OwnRow:
    """This process's row, on a dedicated connection: a renewal must not wait for the pool."""

    def __init__(self, connection: "Connection", identity: Identity) -> None:
        self._connection = connection
        self._identity = identity

    @retry_on_conflict
    async def register(self, incarnation: int, *, acknowledge: bool) -> Registration:
        """Commit the row, and return the position of its history (rule 2).

        With `acknowledge` the row acknowledges the newest revision. Without it, the row
        acknowledges nothing, because clients may still answer from their caches under an earlier
        lease. A process that commits a later revision finds the row and waits for it; an earlier
        revision is in every later read. An abandoned attempt may still reach the database later. It
        then changes nothing, because the row has a later incarnation.
        """
        identity = self._identity
        with translate_errors(), require_durable_commit(self._connection):
            row = await self._connection.fetchrow(
                f"""
                INSERT INTO verifier (id, incarnation, acknowledged_revision, lease_seconds, host,
                                      process_id, version, pepper_ids, rules)
                SELECT $1, $2, CASE WHEN $7 THEN h.revision ELSE 0 END, $3, $4, $5, $6, $8, $9
                  FROM head h
                 WHERE {DURABLE}
                ON CONFLICT (id) DO UPDATE
                   SET incarnation = excluded.incarnation, renewal = verifier.renewal + 1,
                       acknowledged_revision = excluded.acknowledged_revision
                 WHERE verifier.incarnation < excluded.incarnation
                RETURNING acknowledged_revision, server_identifier(), server_timeline(),
                          (SELECT revision FROM head), (SELECT mark FROM head)
                """,  # noqa: S608 - constants only
                identity.id,
                incarnation,
                identity.lease_seconds,
                identity.host,
                identity.process_id,
                identity.version,
                acknowledge,
                list(identity.pepper_ids),
                RULES,
            )
        if row is None:
            raise StoreUnavailable("Another attempt to register came in between; try again.")
        acknowledged, identifier, timeline, revision, mark = row
        position = Position(revision, mark_in(mark))
        return Registration(position, acknowledged, Server(identifier, timeline))

    @retry_on_conflict
    async def read_log(self, applied: Position) -> Log:
        """Return the log after `applied`, and whether this database's history holds `applied`.

        One round trip. This read must not extend a lease: see `renew`.
        """
        with translate_errors():
            rows = await self._connection.fetch(
                _READ_LOG, applied.revision, mark_out(applied.mark), HISTORY_MAX + 1
            )
        return _log(rows)

    @retry_on_conflict
    async def renew(
        self,
        incarnation: int,
        applied: Position,
        acknowledged: int,
        report: Report,
    ) -> tuple[bool, Log]:
        """Renew the row, acknowledge, and return the log after `applied` (rule 3).

        Also returns whether the row was renewed. It is not renewed if this database's history does
        not hold `applied` (`Log.known`), or if the row no longer exists.

        The commit must be as durable as that of a deletion, so that a deposed primary cannot extend
        a lease with a commit that will be undone. Raises StoreUnavailable if the commit is not
        durable.
        """
        with translate_errors(), require_durable_commit(self._connection):
            rows = await self._connection.fetch(
                _RENEW,
                applied.revision,
                mark_out(applied.mark),
                HISTORY_MAX + 1,
                self._identity.id,
                incarnation,
                acknowledged,
                *report[:-1],
                None
                if report.siblings is None
                else json.dumps([sibling._asdict() for sibling in report.siblings]),
            )
        return rows[0][0], _log([tuple(row)[1:] for row in rows])

    @retry_on_conflict
    async def remove(self, incarnation: int) -> None:
        """Remove the row, after the process and its clients have stopped answering."""
        with translate_errors():
            await self._connection.execute(
                "DELETE FROM verifier WHERE id = $1 AND incarnation = $2",
                self._identity.id,
                incarnation,
            )

    @retry_on_conflict
    async def recount(self, lead: str, incarnation: int) -> None:
        """Let a lead's row no longer count the siblings that have their own rows.

        The number never rises, because a sibling whose row is gone is at the next lead. Only
        receipts depend on it. Never waits for a lock: the lead that holds it writes the number
        itself, and another sibling writes the same.
        """
        with translate_errors():
            await self._connection.execute(
                """
                UPDATE verifier l
                   SET processes = least(l.processes, 1 + (
                           SELECT count(*) FROM jsonb_array_elements(l.siblings) s
                            WHERE NOT EXISTS (SELECT FROM verifier o WHERE o.id = s->>'id')))
                 WHERE l.id IN (SELECT id FROM verifier
                                 WHERE id = $1 AND incarnation = $2
                                   FOR UPDATE SKIP LOCKED)
                """,
                lead,
                incarnation,
            )

    async def all_rows(self) -> list[VerifierRow]:
        """Return the rows of all verifiers."""
        return (await read_rows(self._connection)).verifiers

    @retry_on_conflict
    async def remove_dead(self, row: VerifierRow) -> bool:
        """Remove another process's row unless it was renewed. Return whether it was removed (rule
        9).

        Never waits for a lock: the process that holds the row's lock is using the row, or is dead.
        """
        with translate_errors():
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

    async def notify(self, payload: int | str) -> None:
        """Wake the verifiers, in a separate transaction after the commit (rule 10).

        `payload` is the revision, or the name of a probe. Raises StoreUnsupported if the engine has
        no notifications.
        """
        async with self._pool.session() as session:
            await session.execute(NOTIFY, CHANNEL, str(payload))

    @retry_on_conflict
    async def status(self) -> Status:
        """Return the newest position and all rows, for people."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                """
                SELECT h.revision, h.mark, (SELECT max(version) FROM schema_migration),
                       v.id, v.host, v.process_id, v.version, v.start_time,
                       v.acknowledged_revision, v.lease_seconds,
                       greatest(0, v.lease_seconds - extract(
                           epoch FROM clock_timestamp() - v.renew_time))::double precision,
                       v.clients, v.notifications, v.waiting_for, v.pepper_ids,
                       v.database_host, v.server_identifier, v.server_timeline, v.warnings,
                       v.siblings::text
                  FROM head h
                  LEFT JOIN verifier v ON true
                 ORDER BY v.start_time, v.id
                """
            )
        own = {row[3] for row in rows}
        found = [
            each
            for row in rows
            if row[3] is not None
            for each in processes_of(row[3:])
            # A sibling that has left its lead may still be in the list of that lead's row.
            if each.id == row[3] or each.id not in own
        ]
        return Status(Position(rows[0][0], mark_in(rows[0][1])), found, rows[0][2])

    @retry_on_conflict
    async def prune_log(self, keep_seconds: float, limit: int) -> int:
        """Remove old invalidations that every verifier has acknowledged. Return how many were
        removed.

        Old means older than `keep_seconds`. Removes about `limit` at a time, because `head` is
        locked meanwhile. Correctness does not depend on the clock: a reader that has applied less
        than was pruned starts over, because the history no longer holds its position (rules 11 and
        12).
        """
        async with self._pool.session() as session:
            status = await session.execute(
                """
                WITH old AS (
                    SELECT i.revision, i.mark
                      FROM invalidation i
                     WHERE i.create_time < clock_timestamp() - make_interval(secs => $1)
                       AND i.revision <= coalesce(
                               (SELECT min(v.acknowledged_revision) FROM verifier v), i.revision)
                     ORDER BY i.revision
                     LIMIT $2),
                bound AS (SELECT revision, mark FROM old ORDER BY revision DESC LIMIT 1),
                marked AS (
                    UPDATE head h
                       SET pruned_revision = b.revision, pruned_mark = b.mark
                      FROM bound b
                     WHERE b.revision > h.pruned_revision
                    RETURNING h.pruned_revision)
                DELETE FROM invalidation i USING marked m WHERE i.revision <= m.pruned_revision
                """,
                keep_seconds,
                limit,
            )
        return int(status.removeprefix("DELETE "))

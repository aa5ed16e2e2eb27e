"""The SQL of changes to many tokens at once: RevokeSecret and DeleteAll.

All changes of a call take one revision, and are named in the log and audited in the statement that
makes them, as in `lifecycle_store.py`.
"""

from collections.abc import Sequence
from dataclasses import astuple
from datetime import UTC, datetime
from typing import NamedTuple

from latchkey_coherence.verdict_cache import Position

from latchkey_service.audit.audit_log import AuditContext
from latchkey_service.audit.audit_table import DETAIL_COLUMNS, DETAIL_VALUES
from latchkey_service.coherence.ack_rules import Acknowledgements
from latchkey_service.coherence.snapshot import SNAPSHOT, Snapshot, mark_in, mark_out, snapshot_of
from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres.connections import (
    DURABLE,
    Pool,
    require_durable_commit,
    retry_on_conflict,
)
from latchkey_service.tokens.event_table import DELETED, LEAKED, NO_EVENTS, REVOKED, Outbox
from latchkey_service.tokens.filter_table import Arguments, Start, condition_of
from latchkey_service.tokens.filters import Filter
from latchkey_service.tokens.lifecycle_store import Changed
from latchkey_service.tokens.receipt_table import RECEIPT, Deletion
from latchkey_service.tokens.token_store import deletion_of
from latchkey_service.tokens.token_table import COLUMNS, DETAILS, USES, detailed_record_of
from latchkey_service.tokens.verdict import TokenRecord

__all__ = ["BulkStore", "Scan"]

# Tokens that one statement reads to find those that match: about 50 ms for the slowest filter.
SCANNED = 10_000

# Rows of events, for `Outbox.insert`.
_REVOKED = """SELECT s.moment, t.account_id, t.id, t.name, t.expire_time, $3
                FROM stamped s, (SELECT DISTINCT id FROM ended) e JOIN token t ON t.id = e.id"""
_LEAKED = """SELECT clock_timestamp(), t.account_id, t.id, t.name, t.expire_time, $3
               FROM (SELECT DISTINCT id FROM marked) m JOIN token t ON t.id = m.id"""
_DELETED = """SELECT s.moment, t.account_id, t.id, t.name, t.expire_time, $3
                FROM stamped s, live l JOIN token t ON t.id = l.id"""


class Scan(NamedTuple):
    """What a part of an account's tokens has that matches."""

    matching: int
    ids: list[str]
    """The oldest first, up to a limit."""
    next: Start | None
    """Where the next part begins. None: this is the last part."""


class BulkStore:
    """Changes many tokens. Every method raises StoreUnavailable if Postgres is too slow."""

    def __init__(self, pool: Pool, outbox: Outbox = NO_EVENTS) -> None:
        self._pool = pool
        # Parts of statements. A process writes the same events until it ends.
        self._announce_revoked = outbox.insert(REVOKED, _REVOKED)
        self._announce_leaked = outbox.insert(LEAKED, _LEAKED)
        self._announce_deleted = outbox.insert(DELETED, _DELETED)

    @retry_on_conflict
    async def revoke_secrets(
        self, digests: Sequence[bytes], now: datetime, audit_context: AuditContext
    ) -> tuple[Changed | None, dict[bytes, bool], bool]:
        """End the secrets with these digests under one revision.

        Returns three values: the change, or None if nothing had to change; for each digest that
        the database has, whether this call ended a secret that worked; and whether there is an
        audit entry. Locks the rows of the tokens in the order of their ids, then that of `head`.
        """
        async with self._pool.session() as session:
            with require_durable_commit(session):
                rows = await session.fetch(
                    f"""
                    WITH live AS MATERIALIZED (
                        SELECT s.digest, t.id, t.account_id
                          FROM token t JOIN secret s ON s.token_id = t.id
                         WHERE s.digest = ANY($1::bytea[]) AND s.retire_time IS NULL
                           AND t.delete_time IS NULL AND {DURABLE}
                         ORDER BY t.id
                           FOR UPDATE OF t),
                    next AS (
                        -- Counts, because EXISTS would take this lock after the first row, and lock
                        -- the others under it: a deadlock with each Delete of one of them.
                        UPDATE head h SET revision = h.revision + 1, mark = DEFAULT
                         WHERE (SELECT count(*) FROM live) > 0
                        RETURNING h.revision, h.mark),
                    stamped AS MATERIALIZED (
                        SELECT revision, mark, clock_timestamp() AS moment FROM next),
                    ended AS (
                        UPDATE secret x
                           SET retire_time = s.moment, seal = '',
                               leak_report_time = coalesce(x.leak_report_time, s.moment)
                          FROM stamped s, live l
                         WHERE x.digest = l.digest AND x.retire_time IS NULL
                        RETURNING x.digest, l.id, l.account_id,
                                  coalesce(x.expire_time > $2, true) AS working),
                    changed AS (
                        UPDATE token t SET version = t.version + 1
                         WHERE t.id IN (SELECT id FROM ended)),
                    logged AS (
                        INSERT INTO invalidation (revision, mark, token_id)
                        SELECT DISTINCT s.revision, s.mark, l.id FROM stamped s, live l),
                    audited AS (
                        INSERT INTO audit (time, account_id, token_id, caller, method, peer,
                                           request_id, {DETAIL_COLUMNS})
                        SELECT DISTINCT s.moment, e.account_id, e.id, $3, $4, $5, $6,
                               {DETAIL_VALUES[7]}
                          FROM stamped s, ended e)
                    {self._announce_revoked}
                    SELECT s.revision, s.mark, s.moment, k.digest, coalesce(e.working, false),
                           e.digest IS NOT NULL
                      FROM secret k
                      LEFT JOIN ended e ON e.digest = k.digest
                      LEFT JOIN stamped s ON true
                     WHERE k.digest = ANY($1::bytea[])
                    """,  # noqa: S608 - constants only
                    list(digests),
                    now,
                    audit_context.caller,
                    audit_context.method,
                    audit_context.peer,
                    audit_context.request_id,
                    audit_context.details,
                )
        ended = {row[3]: row[4] for row in rows}
        audited = any(row[5] for row in rows)
        if not rows or rows[0][0] is None:
            return None, ended, audited
        changed = Changed(Position(rows[0][0], mark_in(rows[0][1])), rows[0][2], None)
        return changed, ended, audited

    @retry_on_conflict
    async def report_secrets(
        self, digests: Sequence[bytes], now: datetime, audit_context: AuditContext
    ) -> tuple[dict[bytes, bool], bool, Snapshot]:
        """Mark the secrets with these digests as leaked, unless they have ended or are marked.

        Returns three values: for each digest that the database has, whether its secret still works;
        whether there is an audit entry; and the snapshot of the read.
        """
        async with self._pool.session() as session:
            with require_durable_commit(session):
                rows = await session.fetch(
                    f"""
                    WITH live AS MATERIALIZED (
                        SELECT s.digest, t.id, t.account_id
                          FROM token t JOIN secret s ON s.token_id = t.id
                         WHERE s.digest = ANY($1::bytea[]) AND s.retire_time IS NULL
                           -- Not the token's: its owner can move that.
                           AND coalesce(s.expire_time > $2, true)
                           AND t.delete_time IS NULL AND {DURABLE}
                         ORDER BY t.id
                           FOR UPDATE OF t),
                    marked AS (
                        UPDATE secret x SET leak_report_time = clock_timestamp()
                          FROM live l
                         WHERE x.digest = l.digest AND x.leak_report_time IS NULL
                           AND x.retire_time IS NULL
                        RETURNING l.id, l.account_id),
                    audited AS (
                        INSERT INTO audit (time, account_id, token_id, caller, method, peer,
                                           request_id, {DETAIL_COLUMNS})
                        SELECT clock_timestamp(), account_id, id, $3, $4, $5, $6,
                               {DETAIL_VALUES[7]}
                          FROM (SELECT DISTINCT account_id, id FROM marked) m)
                    {self._announce_leaked}
                    SELECT h.revision, h.mark, h.timeline, k.digest, l.digest IS NOT NULL,
                           EXISTS (SELECT FROM marked)
                      FROM {SNAPSHOT}
                      LEFT JOIN secret k ON k.digest = ANY($1::bytea[])
                      LEFT JOIN live l ON l.digest = k.digest
                    """,  # noqa: S608 - constants only
                    list(digests),
                    now,
                    audit_context.caller,
                    audit_context.method,
                    audit_context.peer,
                    audit_context.request_id,
                    audit_context.details,
                )
        found = {row[3]: row[4] for row in rows if row[3] is not None}
        return found, rows[0][5], snapshot_of(rows[0])

    @retry_on_conflict
    async def find_secrets(self, digests: Sequence[bytes]) -> tuple[set[bytes], Snapshot]:
        """Return which of these digests the database has, and the snapshot of the read."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                f"""
                SELECT h.revision, h.mark, h.timeline, s.digest
                  FROM {SNAPSHOT}
                  LEFT JOIN secret s ON s.digest = ANY($1::bytea[])
                """,  # noqa: S608 - constants only
                list(digests),
            )
        return {row[3] for row in rows if row[3] is not None}, snapshot_of(rows[0])

    @retry_on_conflict
    async def scan(
        self, account_id: str, selected: Filter, now: datetime, after: Start | None, limit: int
    ) -> tuple[Scan, Snapshot]:
        """Find the tokens that match among the `SCANNED` oldest live ones after `after`.

        Returns up to `limit` ids, the oldest first, and the snapshot. The number of tokens that it
        reads is bounded, so it does not exceed the time limit of a statement, whatever the filter.
        """
        first = Start(datetime.min.replace(tzinfo=UTC), "")
        arguments = Arguments(account_id, limit, *astuple(after or first))
        condition = condition_of(selected, now, arguments)
        async with self._pool.session() as session:
            rows = await session.fetch(
                f"""
                WITH scanned AS MATERIALIZED (
                    SELECT t.create_time, t.id, ({condition}) AS matches,
                           row_number() OVER (ORDER BY t.create_time, t.id) AS n
                      FROM (SELECT * FROM token
                             WHERE account_id = $1 AND delete_time IS NULL
                               AND (create_time, id) > ($3::timestamptz, $4::text)
                             ORDER BY create_time, id
                             LIMIT {SCANNED}) t),
                last AS (SELECT create_time, id FROM scanned WHERE n = {SCANNED})
                SELECT h.revision, h.mark, h.timeline,
                       (SELECT count(*) FROM scanned WHERE matches),
                       (SELECT create_time FROM last), (SELECT id FROM last),
                       (SELECT array_agg(f.id ORDER BY f.n)
                          FROM (SELECT id, n FROM scanned WHERE matches ORDER BY n LIMIT $2) f)
                  FROM {SNAPSHOT}
                """,  # noqa: S608 - constants, and conditions without values
                *arguments.values,
            )
        _, _, _, count, last_time, last_id, ids = row = rows[0]
        following = None if last_id is None else Start(last_time, last_id)
        return Scan(count, ids or [], following), snapshot_of(row)

    @retry_on_conflict
    async def get_tokens(
        self, account_id: str, token_ids: Sequence[str]
    ) -> tuple[list[TokenRecord], Snapshot]:
        """Return the live ones of these tokens, the oldest first, and the snapshot."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                f"""
                SELECT h.revision, h.mark, h.timeline, page.*
                  FROM {SNAPSHOT}
                  LEFT JOIN (SELECT {COLUMNS}, {DETAILS}
                               FROM token t
                              {USES}
                              WHERE t.account_id = $1 AND t.delete_time IS NULL
                                AND t.id = ANY($2::text[])) page ON true
                 ORDER BY page.create_time, page.id
                """,  # noqa: S608 - constants only
                account_id,
                list(token_ids),
            )
        return [detailed_record_of(row) for row in rows if row[3] is not None], snapshot_of(rows[0])

    @retry_on_conflict
    async def delete_matching(
        self,
        account_id: str,
        selected: Filter,
        now: datetime,
        token_ids: Sequence[str],
        audit_context: AuditContext,
    ) -> tuple[Changed | None, list[str]]:
        """Turn those of these tokens that still match into tombstones under one revision.

        Returns the change, or None if no token matches, and the ids. Each token gets its own
        receipt and audit entry.
        """
        arguments = Arguments(
            account_id,
            list(token_ids),
            audit_context.caller,
            audit_context.method,
            audit_context.peer,
            audit_context.request_id,
            audit_context.details,
        )
        condition = condition_of(selected, now, arguments)
        async with self._pool.session() as session:
            with require_durable_commit(session):
                rows = await session.fetch(
                    f"""
                    WITH live AS MATERIALIZED (
                        SELECT t.id
                          FROM token t
                         WHERE t.id = ANY($2::text[]) AND t.account_id = $1
                           AND t.delete_time IS NULL AND {condition} AND {DURABLE}
                         ORDER BY t.id
                           FOR UPDATE),
                    next AS (
                        -- Counts, because EXISTS would take this lock after the first row, and lock
                        -- the others under it: a deadlock with each Delete of one of them.
                        UPDATE head h SET revision = h.revision + 1, mark = DEFAULT
                         WHERE (SELECT count(*) FROM live) > 0
                        RETURNING h.revision, h.mark),
                    stamped AS MATERIALIZED (
                        SELECT revision, mark, clock_timestamp() AS moment FROM next),
                    tombstone AS (
                        UPDATE token t SET delete_time = s.moment, seal = ''
                          FROM stamped s, live l WHERE t.id = l.id),
                    unsealed AS (
                        UPDATE secret x SET seal = ''
                          FROM stamped s, live l WHERE x.token_id = l.id),
                    logged AS (
                        INSERT INTO invalidation (revision, mark, token_id)
                        SELECT s.revision, s.mark, l.id FROM stamped s, live l),
                    audited AS (
                        INSERT INTO audit (time, account_id, token_id, caller, method, peer,
                                           request_id, {DETAIL_COLUMNS})
                        SELECT s.moment, $1, l.id, $3, $4, $5, $6, {DETAIL_VALUES[7]}
                          FROM stamped s, live l),
                    recorded AS (
                        INSERT INTO deletion (token_id, revision, mark, commit_time)
                        SELECT l.id, s.revision, s.mark, s.moment FROM stamped s, live l)
                    {self._announce_deleted}
                    SELECT s.revision, s.mark, s.moment, l.id FROM stamped s, live l
                    """,  # noqa: S608 - constants, and conditions without values
                    *arguments.values,
                )
        if not rows:
            return None, []
        changed = Changed(Position(rows[0][0], mark_in(rows[0][1])), rows[0][2], None)
        return changed, [row[3] for row in rows]

    @retry_on_conflict
    async def confirm_deletions(
        self, token_ids: Sequence[str], position: Position, acknowledgements: Acknowledgements
    ) -> Deletion:
        """Complete the receipts of tokens that one change has deleted, and return one of them.

        A repeated Delete of one of them may have completed its receipt before. Raises
        StoreUnavailable if the database has no deletion at `position`, because it follows another
        history (coherence rule 12).
        """
        async with self._pool.session() as session:
            with require_durable_commit(session):
                rows = await session.fetch(
                    f"""
                    UPDATE deletion d
                       SET effective_time = coalesce(
                               d.effective_time, greatest(d.commit_time, statement_timestamp())),
                           verifiers_acknowledged = CASE WHEN d.effective_time IS NULL
                               THEN $2 ELSE d.verifiers_acknowledged END,
                           verifiers_outwaited = CASE WHEN d.effective_time IS NULL
                               THEN $3 ELSE d.verifiers_outwaited END,
                           clients_acknowledged = CASE WHEN d.effective_time IS NULL
                               THEN $6 ELSE d.clients_acknowledged END,
                           clients_outwaited = CASE WHEN d.effective_time IS NULL
                               THEN $7 ELSE d.clients_outwaited END
                     WHERE d.token_id = ANY($1::text[]) AND d.revision = $4 AND d.mark = $5
                       AND {DURABLE}
                    RETURNING {RECEIPT}
                    """,  # noqa: S608 - constants only
                    list(token_ids),
                    acknowledgements.acknowledged,
                    acknowledgements.outwaited,
                    position.revision,
                    mark_out(position.mark),
                    acknowledgements.clients_acknowledged,
                    acknowledgements.clients_outwaited,
                )
        if not rows:
            raise StoreUnavailable("The receipt is missing; call again.")
        return deletion_of(rows[0])

    @retry_on_conflict
    async def position(self) -> Snapshot:
        """Return the snapshot of a read that finds everything committed so far."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                f"SELECT h.revision, h.mark, h.timeline FROM {SNAPSHOT}"  # noqa: S608 - constant
            )
        return snapshot_of(rows[0])

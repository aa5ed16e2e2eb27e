"""The SQL of tokens, secrets, peppers and deletions: one method per statement.

`TokenStore` serves management calls from a pool. The columns are in `token_table.py`, List in
`list_store.py`, and changes of existing tokens other than Delete in `lifecycle_store.py`. Does not
own the SQL of verifiers (`coherence/verifier_table.py`) or the reading of audit entries
(`audit/audit_table.py`).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from latchkey_coherence.verdict_cache import Position

from latchkey_service.audit.audit_log import AuditContext
from latchkey_service.audit.audit_table import DETAIL_COLUMNS, DETAIL_VALUES
from latchkey_service.coherence.ack_rules import Acknowledgements
from latchkey_service.coherence.snapshot import (
    POSITION_KNOWN,
    SNAPSHOT,
    Snapshot,
    mark_in,
    mark_out,
    snapshot_of,
)
from latchkey_service.coherence.verifier_state import EVERY_TOKEN
from latchkey_service.errors import CHANGING_OVER, StoreUnavailable
from latchkey_service.postgres.connections import (
    DURABLE,
    Connector,
    Pool,
    require_durable_commit,
    retry_on_conflict,
)
from latchkey_service.postgres.sessions import Pooler
from latchkey_service.secret_format import Digest
from latchkey_service.tokens.event_table import CREATED, DELETED, NO_EVENTS, Outbox
from latchkey_service.tokens.fleet import KnownPepper
from latchkey_service.tokens.receipt_table import RECEIPT, RECEIPT_COUNT, Deletion
from latchkey_service.tokens.token_table import (
    COLUMNS,
    DETAILS,
    USES,
    detailed_record_of,
    rate_columns,
)
from latchkey_service.tokens.verdict import TokenRecord

if TYPE_CHECKING:
    import asyncpg

__all__ = ["Request", "TokenStore", "deletion_of"]

# The peppers, oldest first, each with whether live tokens and registered verifiers use it.
_KNOWN_PEPPERS = """
SELECT p.id,
       EXISTS (SELECT FROM secret s JOIN token t ON t.id = s.token_id
                WHERE s.pepper_id = p.id AND t.delete_time IS NULL),
       EXISTS (SELECT FROM verifier v WHERE p.id = ANY(v.pepper_ids))
  FROM pepper p
 ORDER BY p.create_time, p.id
"""
# Any number works, as long as every release uses the same one and migrations use another.
_PEPPER_LOCK = 0x706570706572  # "pepper"
# Each host of a new fleet holds the lock for a few round trips, and all of them may start at once.
_PEPPER_LOCK_SECONDS = 10

_CREATED = "SELECT $6, account_id, id, $3, $7, $12 FROM token"
_DELETED = "SELECT moment, $1, id, name, expire_time, $3 FROM stamped JOIN token USING (id)"


@dataclass(frozen=True, slots=True)
class Request:
    """A request with an id that makes its retry safe."""

    id: UUID
    method: str
    body: bytes
    """A hash of its fields."""
    asked: datetime
    """When it arrived."""
    reusable_before: datetime
    """Requests that arrived before this time do not count any more."""


class TokenStore:
    """Reads and writes tokens. Every method raises StoreUnavailable if Postgres is too slow."""

    def __init__(self, pool: Pool, outbox: Outbox = NO_EVENTS) -> None:
        self._pool = pool
        # Parts of statements. A process writes the same events until it ends.
        self._announce_created = outbox.insert(CREATED, _CREATED)
        self._announce_deleted = outbox.insert(DELETED, _DELETED)

    @classmethod
    async def open(cls, database_url: str, pooler: Pooler = "none") -> "TokenStore":
        """Return a store on a new pool. It connects lazily, so it opens without a database."""
        return cls(await Pool.open(Connector(database_url, pooler=pooler)))

    async def close(self) -> None:
        """Close all connections, after a bounded wait for those in use."""
        await self._pool.close()

    @retry_on_conflict
    async def register_pepper(self, pepper_id: str) -> None:
        """Register a pepper. Idempotent."""
        async with self._pool.session() as session:
            await session.execute(
                "INSERT INTO pepper (id) VALUES ($1) ON CONFLICT DO NOTHING", pepper_id
            )

    @retry_on_conflict
    async def known_peppers(self) -> list[KnownPepper]:
        """Return the registered peppers, oldest first."""
        async with self._pool.session() as session:
            return [KnownPepper(*row) for row in await session.fetch(_KNOWN_PEPPERS)]

    @retry_on_conflict
    async def enrol_peppers(
        self, pepper_ids: list[str], check: Callable[[list[KnownPepper]], None]
    ) -> None:
        """Register a host's peppers unless `check` raises. It is passed those already registered.

        Only one host at a time does this, so no pepper is registered between the check and the
        commit. A conflict of transactions repeats both.
        """
        async with self._pool.session() as session:
            with require_durable_commit(session):
                # A snapshot from before the lock would miss the previous host's peppers.
                async with session.transaction(isolation="read_committed"):
                    await session.execute(
                        "SELECT set_config('lock_timeout', $1, true),"
                        " set_config('statement_timeout', $1, true)",
                        f"{_PEPPER_LOCK_SECONDS}s",
                    )
                    # Ends with the transaction, because a pooler may lend the session to others.
                    await session.execute(
                        "SELECT pg_advisory_xact_lock($1)",
                        _PEPPER_LOCK,
                        timeout=_PEPPER_LOCK_SECONDS,
                    )
                    rows = await session.fetch(_KNOWN_PEPPERS)
                    check([KnownPepper(*row) for row in rows])
                    await session.execute(
                        "INSERT INTO pepper (id) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING",
                        pepper_ids,
                    )

    @retry_on_conflict
    async def insert_token(
        self,
        record: TokenRecord,
        name_key: str,
        digest: Digest,
        audit_context: AuditContext,
        seal: bytes | None = None,
        token_seal: bytes | None = None,
        request: Request | None = None,
    ) -> bool:
        """Insert a token, its secret, the request's id and the audit entry in one statement.

        Returns False, and changes nothing, if the account has used the request's id. Raises
        AlreadyExists if the account already has a live token with this name.
        """
        async with self._pool.session() as session:
            with require_durable_commit(session):
                status = await session.execute(
                    f"""
                WITH asked AS (
                    -- Waits for a concurrent statement with this id, and then finds its row.
                    INSERT INTO request AS r (account_id, request_id, method, body, token_id,
                                              create_time)
                    SELECT $2, $21, $22, $23, $1, $24 WHERE $21::uuid IS NOT NULL
                    ON CONFLICT (account_id, request_id) DO UPDATE
                       SET method = excluded.method, body = excluded.body,
                           token_id = excluded.token_id, create_time = excluded.create_time
                     WHERE r.create_time < $25
                    RETURNING 1),
                token AS (
                    INSERT INTO token (id, account_id, name, name_key, scope, create_time,
                                       expire_time, hint, labels, description, allowed_networks,
                                       permissions, seal, seal_pepper_id, rate_count,
                                       rate_period_seconds, rate_burst)
                    SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $16, $17, $18, $26, $11, $27, $28,
                           $29
                     WHERE $21::uuid IS NULL OR EXISTS (SELECT FROM asked)
                    RETURNING id, account_id),
                audited AS (
                    INSERT INTO audit (account_id, token_id, caller, method, peer, request_id,
                                       {DETAIL_COLUMNS})
                    SELECT account_id, id, $12, $13, $14, $15, {DETAIL_VALUES[30]} FROM token),
                -- A database restored while this process runs may lack the process's pepper.
                known AS (INSERT INTO pepper (id) VALUES ($11) ON CONFLICT DO NOTHING)
                {self._announce_created}
                INSERT INTO secret (digest, pepper_id, token_id, hint, create_time, request_id,
                                    seal)
                SELECT $10, $11, id, $8, $6, $19, $20 FROM token WHERE {DURABLE}
                """,  # noqa: S608 - constants only
                    record.id,
                    record.account_id,
                    record.name,
                    name_key,
                    int(record.scope),
                    record.create_time,
                    record.expire_time,
                    record.hint,
                    json.dumps(dict(record.labels)),
                    digest.value,
                    digest.pepper_id,
                    audit_context.caller,
                    audit_context.method,
                    audit_context.peer,
                    audit_context.request_id,
                    record.description,
                    list(record.allowed_networks),
                    list(record.permissions),
                    None if request is None else request.id,
                    seal,
                    None if request is None else request.id,
                    "" if request is None else request.method,
                    b"" if request is None else request.body,
                    None if request is None else request.asked,
                    None if request is None else request.reusable_before,
                    token_seal,
                    *rate_columns(record.rate_limit),
                    audit_context.details,
                )
        return status != "INSERT 0 0"

    @retry_on_conflict
    async def get_token(
        self, account_id: str, token_id: str
    ) -> tuple[TokenRecord | None, Snapshot]:
        """Return the account's live token, or None, and the snapshot of the read."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                f"""
                SELECT h.revision, h.mark, h.timeline, {COLUMNS}, {DETAILS}
                  FROM {SNAPSHOT}
                  LEFT JOIN token t
                    ON t.account_id = $1 AND t.id = $2 AND t.delete_time IS NULL
                 {USES}
                """,  # noqa: S608 - constants only
                account_id,
                token_id,
            )
        row = rows[0]
        return (None if row[3] is None else detailed_record_of(row)), snapshot_of(row)

    @retry_on_conflict
    async def delete_token(
        self, account_id: str, token_id: str, audit_context: AuditContext
    ) -> Deletion | None:
        """Turn a live token into a tombstone under the next revision; return None if not live.

        One statement and thus one transaction writes the tombstone, the revision, the log entry and
        the audit entry, or none of them. From `next` until the commit it locks the row of `head`
        (coherence rule 1). It locks the token's row before that, always in this order, so there is
        no deadlock. Of two deletions of one token, the second waits at `live` and then finds no
        live token.
        """
        async with self._pool.session() as session:
            with require_durable_commit(session):
                row = await session.fetchrow(
                    f"""
                    WITH live AS (
                        SELECT t.id
                          FROM token t
                         WHERE t.account_id = $1 AND t.id = $2 AND t.delete_time IS NULL
                           AND {DURABLE}
                           FOR UPDATE),
                    next AS (
                        -- The default of a mark is a new random number.
                        UPDATE head h SET revision = h.revision + 1, mark = DEFAULT FROM live
                        RETURNING h.revision, h.mark, live.id),
                    -- Reads the clock under the lock, so that times follow the order of revisions.
                    stamped AS MATERIALIZED (
                        SELECT revision, mark, id, clock_timestamp() AS moment FROM next),
                    tombstone AS (
                        UPDATE token t SET delete_time = s.moment, seal = ''
                          FROM stamped s WHERE t.id = s.id),
                    -- Removing the tombstone's delete_time does not revive the token.
                    unsealed AS (
                        UPDATE secret x SET seal = '' FROM stamped s WHERE x.token_id = s.id),
                    logged AS (
                        INSERT INTO invalidation (revision, mark, token_id)
                        SELECT revision, mark, id FROM stamped),
                    audited AS (
                        INSERT INTO audit (time, account_id, token_id, caller, method, peer,
                                           request_id, {DETAIL_COLUMNS})
                        SELECT moment, $1, id, $3, $4, $5, $6, {DETAIL_VALUES[7]} FROM stamped)
                    {self._announce_deleted}
                    INSERT INTO deletion AS d (token_id, revision, mark, commit_time)
                    SELECT id, revision, mark, moment FROM stamped
                    RETURNING {RECEIPT}
                    """,  # noqa: S608 - constants only
                    account_id,
                    token_id,
                    audit_context.caller,
                    audit_context.method,
                    audit_context.peer,
                    audit_context.request_id,
                    audit_context.details,
                )
        return None if row is None else deletion_of(row)

    @retry_on_conflict
    async def get_deletion(
        self, account_id: str, token_id: str
    ) -> tuple[Deletion | None, Snapshot]:
        """Return the account's receipt for a deleted token, or None, and the read's snapshot."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                f"""
                SELECT h.revision, h.mark, h.timeline,
                       {RECEIPT}
                  FROM {SNAPSHOT}
                  LEFT JOIN (token t JOIN deletion d ON d.token_id = t.id)
                    ON t.account_id = $1 AND t.id = $2
                """,  # noqa: S608 - constants only
                account_id,
                token_id,
            )
        row = rows[0]
        return (None if row[3] is None else deletion_of(row)), snapshot_of(row)

    @retry_on_conflict
    async def confirm_deletion(
        self, token_id: str, position: Position, acknowledgements: Acknowledgements
    ) -> Deletion:
        """Record that no verifier can still answer VALID, and return the receipt.

        The first call completes the receipt. Later calls write the same receipt again, which makes
        sure that it, and with it the deletion, is durable. Raises StoreUnavailable if the database
        has no deletion at `position`, because it follows another history (coherence rule 12).
        """
        async with self._pool.session() as session:
            with require_durable_commit(session):
                row = await session.fetchrow(
                    f"""
                    UPDATE deletion d
                       SET effective_time = coalesce(
                               d.effective_time, greatest(d.commit_time, clock_timestamp())),
                           verifiers_acknowledged = CASE WHEN d.effective_time IS NULL
                               THEN $2 ELSE d.verifiers_acknowledged END,
                           verifiers_outwaited = CASE WHEN d.effective_time IS NULL
                               THEN $3 ELSE d.verifiers_outwaited END,
                           clients_acknowledged = CASE WHEN d.effective_time IS NULL
                               THEN $6 ELSE d.clients_acknowledged END,
                           clients_outwaited = CASE WHEN d.effective_time IS NULL
                               THEN $7 ELSE d.clients_outwaited END
                     WHERE d.token_id = $1 AND d.revision = $4 AND d.mark = $5 AND {DURABLE}
                    RETURNING {RECEIPT}
                    """,  # noqa: S608 - constants only
                    token_id,
                    acknowledgements.acknowledged,
                    acknowledgements.outwaited,
                    position.revision,
                    mark_out(position.mark),
                    acknowledgements.clients_acknowledged,
                    acknowledgements.clients_outwaited,
                )
        if row is None:
            # The database failed over, or the tombstone was removed in the meantime: 90 days after
            # the deletion, unless the configured retention is very short.
            raise StoreUnavailable("The receipt is missing; delete the token again.")
        return deletion_of(row)

    @retry_on_conflict
    async def invalidate_all(self, audit_context: AuditContext) -> tuple[Position, datetime]:
        """Take a revision that invalidates every token; return its position and commit time.

        Writes the log entry and the audit entry in the same transaction, as durably as a deletion.
        """
        async with self._pool.session() as session:
            with require_durable_commit(session):
                row = await session.fetchrow(
                    f"""
                    WITH next AS (
                        UPDATE head h SET revision = h.revision + 1, mark = DEFAULT
                         WHERE {DURABLE}
                        RETURNING h.revision, h.mark),
                    stamped AS MATERIALIZED (
                        SELECT revision, mark, clock_timestamp() AS moment FROM next),
                    logged AS (
                        INSERT INTO invalidation (revision, mark, token_id)
                        SELECT revision, mark, $5 FROM stamped),
                    audited AS (
                        INSERT INTO audit (time, account_id, token_id, caller, method, peer,
                                           request_id, {DETAIL_COLUMNS})
                        SELECT moment, '', '', $1, $2, $3, $4, {DETAIL_VALUES[6]} FROM stamped)
                    SELECT revision, mark, moment FROM stamped
                    """,  # noqa: S608 - constants only
                    audit_context.caller,
                    audit_context.method,
                    audit_context.peer,
                    audit_context.request_id,
                    EVERY_TOKEN,
                    audit_context.details,
                )
        if row is None:
            raise RuntimeError("the table `head` is empty")
        return Position(row[0], mark_in(row[1])), row[2]

    @retry_on_conflict
    async def settle(self, position: Position) -> None:
        """Return once no failover can undo what a read at this position has shown.

        A read also shows changes whose commits still wait for the standby, or have given up. The
        commit of this statement comes after theirs in the WAL, and waits in their place. Raises
        StoreUnavailable if the database's history does not hold the position (coherence rule 12).
        """
        async with self._pool.session() as session:
            with require_durable_commit(session):
                status = await session.execute(
                    f"""
                    UPDATE head h SET revision = h.revision
                     WHERE {POSITION_KNOWN} AND {DURABLE}
                    """,  # noqa: S608 - constants only
                    position.revision,
                    mark_out(position.mark),
                )
        if status != "UPDATE 1":
            raise StoreUnavailable(CHANGING_OVER)


def deletion_of(row: "asyncpg.Record") -> Deletion:
    """Return the receipt in the last columns of a row, those of `RECEIPT`."""
    revision, mark, *rest = row[-RECEIPT_COUNT:]
    return Deletion(Position(revision, mark_in(mark)), *rest)

"""The SQL of Import: which secrets and names the database has, and the insertion of tokens.

Decides nothing (`importing.py`).
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from asyncpg import UniqueViolationError
from latchkey_coherence.verdict_cache import Position

from latchkey_service.audit.audit_log import AuditContext
from latchkey_service.audit.audit_table import DETAIL_COLUMNS, DETAIL_VALUES
from latchkey_service.coherence.snapshot import SNAPSHOT, Snapshot, mark_in, snapshot_of
from latchkey_service.postgres.connections import (
    DURABLE,
    Pool,
    require_durable_commit,
    retry_on_conflict,
)
from latchkey_service.tokens.lifecycle_store import NAME_FREED
from latchkey_service.tokens.seal import TokenSeal
from latchkey_service.tokens.token_table import rate_columns
from latchkey_service.tokens.verdict import SecretRecord, TokenRecord

__all__ = ["ROWS_AT_ONCE", "ImportStore", "Inserted", "NewRow", "Present"]

ROWS_AT_ONCE = 25
"""Rows to convert, check or seal before others get the event loop: a millisecond or two."""


class NewRow(NamedTuple):
    """A token to insert, with its only secret."""

    record: TokenRecord
    name_key: str
    digests: tuple[bytes, ...]
    """All digests under which the database may have the secret. The first is that of `secret`."""
    secret: SecretRecord
    seal: TokenSeal


class Present(NamedTuple):
    """What the database has."""

    tokens: Mapping[bytes, tuple[str, str]]
    """The id and the account of the token with each digest."""
    names: frozenset[tuple[str, str]]
    """The accounts and keys of names that live tokens have, unless they have expired."""


class Inserted(NamedTuple):
    """The tokens that were inserted, and the position of the insertion, or None if there are
    none."""

    token_ids: frozenset[str]
    position: Position | None


class ImportStore:
    """Inserts tokens. Every method raises StoreUnavailable if Postgres is too slow."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @retry_on_conflict
    async def find(
        self,
        digests: Sequence[tuple[bytes, ...]],
        names: Sequence[tuple[str, str]],
        now: datetime,
    ) -> tuple[Present, Snapshot]:
        """Return which of these secrets and names the database has, and the read's snapshot.

        Ended secrets and deleted tokens count, so that an import does not revive one.
        """
        async with self._pool.session() as session:
            rows = await session.fetch(
                f"""
                SELECT h.revision, h.mark, h.timeline, f.*
                  FROM {SNAPSHOT}
                  LEFT JOIN (
                       SELECT s.digest, t.id, t.account_id, NULL
                         FROM secret s JOIN token t ON t.id = s.token_id
                        WHERE s.digest = ANY($1::bytea[])
                       UNION ALL
                       SELECT NULL, NULL, t.account_id, t.name_key
                         FROM unnest($2::text[], $3::text[]) AS n (account_id, name_key)
                         JOIN token t USING (account_id, name_key)
                        WHERE t.delete_time IS NULL
                          AND (t.expire_time IS NULL OR t.expire_time > $4)) f ON true
                """,  # noqa: S608 - constants only
                [digest for several in digests for digest in several],
                [account_id for account_id, _ in names],
                [key for _, key in names],
                now,
            )
        tokens = {row[3]: (row[4], row[5]) for row in rows if row[3] is not None}
        taken = frozenset((row[5], row[6]) for row in rows if row[6] is not None)
        return Present(tokens, taken), snapshot_of(rows[0])

    @retry_on_conflict
    async def insert(
        self, rows: Sequence[NewRow], now: datetime, audit_context: AuditContext
    ) -> Inserted | None:
        """Insert tokens, their secrets and audit entries, under one revision, in one statement.

        Leaves out tokens whose names live tokens have. Takes names from expired tokens first.
        Returns None, and changes nothing, if the database has one of the secrets.

        Locks names in their order, then the row of `head`. An Update takes its name before it locks
        `head` too, so the one waits for the other, without a deadlock.

        The revision names one of the tokens. No cache has a verdict on any of them, so there is
        nothing to drop, but servers forget which imported secrets are absent (`imported.py`).
        """
        document = await _document(rows)
        try:
            async with self._pool.session() as session:
                with require_durable_commit(session):
                    await session.execute(
                        _FREE_NAMES,
                        *_names(rows),
                        now,
                        audit_context.caller,
                        audit_context.method,
                        audit_context.peer,
                        audit_context.request_id,
                        NAME_FREED,
                        audit_context.details,
                    )
                    found = await session.fetch(
                        _INSERT,
                        document,
                        rows[0].secret.pepper_id,
                        audit_context.caller,
                        audit_context.method,
                        audit_context.peer,
                        audit_context.request_id,
                        audit_context.details,
                    )
        except UniqueViolationError:
            return None
        position = Position(found[0][0], mark_in(found[0][1])) if found else None
        return Inserted(frozenset(row[2] for row in found), position)


_FREE_NAMES = f"""
WITH expired AS MATERIALIZED (
    SELECT t.id
      FROM token t JOIN unnest($1::text[], $2::text[]) AS n (account_id, name_key)
           USING (account_id, name_key)
     WHERE t.delete_time IS NULL AND t.expire_time <= $3
     -- Concurrent calls lock rows in this order, which is that of `_INSERT`.
     ORDER BY t.account_id, t.name_key
       FOR UPDATE OF t),
freed AS (
    UPDATE token t
       -- As when one token takes the name of another (`LifecycleStore.free_expired_name`).
       SET name_key = chr(1) || t.id || chr(1) || t.name_key, version = t.version + 1
      FROM expired e WHERE t.id = e.id
    RETURNING t.id, t.account_id)
INSERT INTO audit (account_id, token_id, caller, method, peer, request_id, reason, {DETAIL_COLUMNS})
SELECT account_id, id, $4, $5, $6, $7, $8, {DETAIL_VALUES[9]} FROM freed
"""  # noqa: S608 - constants only
_INSERT = f"""
WITH rows AS MATERIALIZED (
    SELECT * FROM jsonb_to_recordset($1::jsonb) AS r (
        id text, account_id text, name text, name_key text, scope smallint,
        create_time timestamptz, expire_time timestamptz, disable_time timestamptz, hint text,
        labels jsonb, description text, allowed_networks text[], permissions text[],
        rate_count integer, rate_period_seconds integer, rate_burst integer,
        digest text, seal text, token_seal text, token_seal_pepper_id text)),
inserted AS (
    INSERT INTO token (id, account_id, name, name_key, scope, create_time, expire_time,
                       disable_time, hint, labels, description, allowed_networks, permissions,
                       seal, seal_pepper_id, rate_count, rate_period_seconds, rate_burst)
    SELECT id, account_id, name, name_key, scope, create_time, expire_time, disable_time, hint,
           labels, description, allowed_networks, permissions, decode(token_seal, 'hex'),
           token_seal_pepper_id, rate_count, rate_period_seconds, rate_burst
      FROM rows
     WHERE {DURABLE}
     -- Concurrent calls lock names in this order.
     ORDER BY account_id, name_key
    ON CONFLICT (account_id, name_key) WHERE delete_time IS NULL DO NOTHING
    RETURNING id, account_id),
known AS (INSERT INTO pepper (id) VALUES ($2) ON CONFLICT DO NOTHING),
secrets AS (
    INSERT INTO secret (digest, pepper_id, token_id, hint, create_time, seal)
    SELECT decode(r.digest, 'hex'), $2, r.id, r.hint, r.create_time, decode(r.seal, 'hex')
      FROM rows r JOIN inserted i ON i.id = r.id
     ORDER BY r.digest),
next AS (
    UPDATE head h SET revision = h.revision + 1, mark = DEFAULT
     WHERE (SELECT count(*) FROM inserted) > 0
    RETURNING h.revision, h.mark),
stamped AS MATERIALIZED (
    SELECT revision, mark, clock_timestamp() AS moment FROM next),
logged AS (
    INSERT INTO invalidation (revision, mark, token_id)
    SELECT revision, mark, (SELECT min(id) FROM inserted) FROM stamped),
audited AS (
    INSERT INTO audit (time, account_id, token_id, caller, method, peer, request_id,
                       {DETAIL_COLUMNS})
    SELECT s.moment, i.account_id, i.id, $3, $4, $5, $6, {DETAIL_VALUES[7]}
      FROM stamped s, inserted i)
SELECT s.revision, s.mark, i.id FROM stamped s, inserted i
"""  # noqa: S608 - constants only


async def _document(rows: Sequence[NewRow]) -> str:
    """Return the rows as a JSON list. Lets others run meanwhile."""
    parts = []
    for number, row in enumerate(rows):
        if number % ROWS_AT_ONCE == 0:
            await asyncio.sleep(0)
        parts.append(json.dumps(_fields(row)))
    return f"[{','.join(parts)}]"


def _names(rows: Sequence[NewRow]) -> tuple[list[str], list[str]]:
    return [row.record.account_id for row in rows], [row.name_key for row in rows]


def _fields(row: NewRow) -> dict[str, Any]:
    record, secret = row.record, row.secret
    calls, period_seconds, burst = rate_columns(record.rate_limit)
    return {
        "id": record.id,
        "account_id": record.account_id,
        "name": record.name,
        "name_key": row.name_key,
        "scope": int(record.scope),
        "create_time": record.create_time.isoformat(),
        "expire_time": None if record.expire_time is None else record.expire_time.isoformat(),
        "disable_time": None if record.disable_time is None else record.disable_time.isoformat(),
        "hint": record.hint,
        "labels": dict(record.labels),
        "description": record.description,
        "allowed_networks": list(record.allowed_networks),
        "permissions": list(record.permissions),
        "rate_count": calls,
        "rate_period_seconds": period_seconds,
        "rate_burst": burst,
        "digest": secret.digest.hex(),
        "seal": None if secret.seal is None else secret.seal.hex(),
        "token_seal": None if row.seal.seal is None else row.seal.seal.hex(),
        "token_seal_pepper_id": row.seal.pepper_id,
    }

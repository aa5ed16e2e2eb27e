"""The SQL of changes to existing tokens: one method per statement.

Each change takes a revision, names the token in the log and writes the audit entry in the statement
that makes it, as Delete does (`token_store.py`). Decides nothing: `lifecycle.py` computes the new
state from the one that it has read, and a change is made only if that one is still current.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from latchkey_coherence.verdict_cache import Position

from latchkey_service.audit.audit_log import AuditContext
from latchkey_service.audit.audit_table import DETAIL_COLUMNS, DETAIL_VALUES
from latchkey_service.coherence.snapshot import SNAPSHOT, Snapshot, mark_in, snapshot_of
from latchkey_service.coherence.verifier_table import LIFECYCLE_RULES
from latchkey_service.postgres.connections import (
    DURABLE,
    Pool,
    require_durable_commit,
    retry_on_conflict,
)
from latchkey_service.secret_format import Secret
from latchkey_service.tokens.event_table import NO_EVENTS, ROTATED, Outbox
from latchkey_service.tokens.seal import TokenSeal
from latchkey_service.tokens.token_store import Request
from latchkey_service.tokens.token_table import (
    COLUMNS,
    DETAILS,
    USES,
    detailed_record_of,
    rate_columns,
    record_of,
)
from latchkey_service.tokens.verdict import SecretRecord, TokenRecord, TokenSecret

__all__ = [
    "Change",
    "Changed",
    "LifecycleStore",
    "StoredRequest",
    "StoredSecret",
    "TokenState",
]

NAME_FREED = "NAME_FREED"
"""The reason in the audit entry of an expired token whose name another token has taken."""
_OLD_RULES = f"EXISTS (SELECT FROM verifier v WHERE v.rules < {LIFECYCLE_RULES})"


class StoredSecret(NamedTuple):
    """A secret that is not retired, with what a change of its token needs."""

    record: SecretRecord
    shown: TokenSecret
    request_id: UUID | None


class TokenState(NamedTuple):
    """A live token as a change finds it."""

    record: TokenRecord
    version: int
    secrets: tuple[StoredSecret, ...]
    """Those that are not retired, newest first."""
    newest_ordinal: int
    """Of all its secrets."""
    old_verifiers: bool
    """Whether a verifier is registered that does not know the rules of this release."""
    seal: TokenSeal
    """Of the token's row."""
    newest_pepper_id: str
    """That of its newest secret."""


@dataclass(frozen=True, slots=True)
class Change:
    """The new state of a token."""

    record: TokenRecord
    """A `disable_time` of any value means "disabled": the statement keeps or sets the time."""
    name_key: str | None
    """None: unchanged."""
    version: int
    """The version of the state that this was computed from."""
    seal: TokenSeal | None
    """The new seal of the token's row. None: unchanged."""
    kept: Sequence[SecretRecord]
    """The secrets that stay, with their new seals. Secrets that are listed nowhere stay as is."""
    retired: Sequence[bytes] = ()
    """Digests of the secrets that end."""
    minted: SecretRecord | None = None
    minted_hint: str = ""
    minted_at: datetime | None = None
    request: Request | None = None
    repeats: bool = False
    """Whether this replaces the secret of an earlier attempt of the request."""
    text: Secret | None = None
    """The new secret itself, which is stored nowhere."""


class Changed(NamedTuple):
    """A committed change."""

    position: Position
    moment: datetime
    record: TokenRecord | None
    """The token afterwards, without its secrets. None: several have changed, or none."""


class StoredRequest(NamedTuple):
    """An earlier request with an id."""

    method: str
    body: bytes
    token_id: str


class LifecycleStore:
    """Changes tokens. Every method raises StoreUnavailable if Postgres is too slow."""

    def __init__(self, pool: Pool, outbox: Outbox = NO_EVENTS) -> None:
        self._pool = pool
        self._outbox = outbox

    @retry_on_conflict
    async def read_state(
        self, account_id: str, token_id: str
    ) -> tuple[TokenState | None, Snapshot]:
        """Return the account's live token with its secrets, or None, and the read's snapshot."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                f"""
                SELECT h.revision, h.mark, h.timeline, t.version, {_OLD_RULES},
                       (SELECT ROW(s.ordinal, s.pepper_id) FROM secret s
                         WHERE s.token_id = t.id ORDER BY s.ordinal DESC LIMIT 1),
                       (SELECT array_agg(ROW(s.digest, s.pepper_id, s.expire_time, s.retire_time,
                                             s.retire_on_first_use, s.seal, s.ordinal,
                                             coalesce(nullif(s.hint, ''), t.hint),
                                             coalesce(s.create_time, t.create_time),
                                             s.request_id,
                                             u.times[array_position(
                                                 u.hints, coalesce(nullif(s.hint, ''), t.hint))],
                                             s.leak_report_time)
                                         ORDER BY s.ordinal DESC)
                          FROM secret s WHERE s.token_id = t.id AND s.retire_time IS NULL),
                       t.seal, t.seal_pepper_id, {COLUMNS}, {DETAILS}
                  FROM {SNAPSHOT}
                  LEFT JOIN token t
                    ON t.account_id = $1 AND t.id = $2 AND t.delete_time IS NULL
                 {USES}
                """,  # noqa: S608 - constants only
                account_id,
                token_id,
            )
        row = rows[0]
        snapshot = snapshot_of(row)
        version, old_verifiers, newest, secrets, *seal = row[3:9]
        if version is None:
            return None, snapshot
        stored = tuple(
            StoredSecret(
                SecretRecord(*secret[:7]),
                TokenSecret(secret[7], secret[8], secret[2], secret[4], *secret[10:12]),
                secret[9],
            )
            for secret in secrets or ()
        )
        record = detailed_record_of(row)
        ordinal, pepper_id = newest or (0, "")
        state = TokenState(
            record, version, stored, ordinal, old_verifiers, TokenSeal(*seal), pepper_id
        )
        return state, snapshot

    @retry_on_conflict
    async def change(self, change: Change, audit_context: AuditContext) -> Changed | None:
        """Make a change under the next revision; return None if the token has changed meanwhile.

        Returns None, too, if the request's id has been used, unless the change repeats it. Raises
        AlreadyExists if the account has another live token with the new name. Locks the token's
        row, then the new name, then the row of `head`, in the order of Create, Import and Delete.
        Two changes that swap names may wait for each other: Postgres ends one of them after its
        `deadlock_timeout`, a second, and it is repeated. No other call waits for them.
        """
        record, minted, request = change.record, change.minted, change.request
        rows = (
            "SELECT s.moment, c.account_id, c.id, c.name, c.expire_time, $25"
            " FROM stamped s, changed c"
        )
        announced = (
            # A repeated Create changes a token that exists.
            self._outbox.insert(ROTATED, rows)
            if change.repeats
            else self._outbox.insert_for(audit_context.method, rows)
        )
        async with self._pool.session() as session:
            with require_durable_commit(session):
                row = await session.fetchrow(
                    f"""
                    WITH asked AS (
                        INSERT INTO request AS r (account_id, request_id, method, body, token_id,
                                                  create_time)
                        SELECT $1, $26, $27, $28, $2, $29 WHERE $26::uuid IS NOT NULL
                        ON CONFLICT (account_id, request_id) DO UPDATE
                           SET method = excluded.method, body = excluded.body,
                               token_id = excluded.token_id, create_time = excluded.create_time
                         WHERE r.create_time < $30
                            OR ($34 AND r.method = $27 AND r.body = $28 AND r.token_id = $2)
                        RETURNING 1),
                    live AS (
                        SELECT t.id
                          FROM token t
                         WHERE t.account_id = $1 AND t.id = $2 AND t.delete_time IS NULL
                           AND t.version = $3 AND {DURABLE}
                           AND ($26::uuid IS NULL OR EXISTS (SELECT FROM asked))
                           FOR UPDATE),
                    -- Before `next`: another call may hold the new name until its commit. A wait
                    -- for it under the lock of `head` would hold up all changes of all accounts,
                    -- and never end if that call, an Import, needs this lock too.
                    changed AS (
                        UPDATE token t
                           SET name = $4, name_key = coalesce($5, t.name_key), scope = $6,
                               expire_time = $7, labels = $8, description = $9,
                               allowed_networks = $10, permissions = $11, hint = $12,
                               rate_count = $37, rate_period_seconds = $38, rate_burst = $39,
                               version = t.version + 1, seal = coalesce($35, t.seal),
                               seal_pepper_id = coalesce($36, t.seal_pepper_id),
                               disable_time = CASE WHEN $13 THEN coalesce(t.disable_time,
                                                                          clock_timestamp()) END
                          FROM live WHERE t.id = live.id
                        RETURNING {COLUMNS}, t.description),
                    next AS (
                        UPDATE head h SET revision = h.revision + 1, mark = DEFAULT FROM changed c
                        RETURNING h.revision, h.mark, c.id),
                    stamped AS MATERIALIZED (
                        SELECT revision, mark, id, clock_timestamp() AS moment FROM next),
                    -- Secrets of earlier releases have no hint, because the token had only one.
                    kept AS (
                        UPDATE secret x
                           SET expire_time = k.expire_time, seal = k.seal,
                               hint = coalesce(nullif(x.hint, ''), $14)
                          FROM stamped s, unnest($15::bytea[], $16::timestamptz[], $17::bytea[])
                               AS k (digest, expire_time, seal)
                         WHERE x.digest = k.digest AND x.token_id = s.id),
                    retired AS (
                        UPDATE secret x
                           SET retire_time = s.moment, seal = '',
                               hint = coalesce(nullif(x.hint, ''), $14)
                          FROM stamped s
                         WHERE x.digest = ANY($18::bytea[]) AND x.token_id = s.id),
                    known AS (
                        INSERT INTO pepper (id) SELECT $20 FROM stamped WHERE $19::bytea IS NOT NULL
                        ON CONFLICT DO NOTHING),
                    minted AS (
                        INSERT INTO secret (digest, pepper_id, token_id, hint, create_time,
                                            retire_on_first_use, ordinal, request_id, seal)
                        SELECT $19, $20, id, $12, $21, $22, $23, $26, $24
                          FROM stamped WHERE $19::bytea IS NOT NULL),
                    logged AS (
                        INSERT INTO invalidation (revision, mark, token_id)
                        SELECT revision, mark, id FROM stamped),
                    audited AS (
                        INSERT INTO audit (time, account_id, token_id, caller, method, peer,
                                           request_id, {DETAIL_COLUMNS})
                        SELECT moment, $1, id, $25, $31, $32, $33, {DETAIL_VALUES[40]}
                          FROM stamped)
                    {announced}
                    SELECT s.revision, s.mark, s.moment, c.* FROM stamped s, changed c
                    """,  # noqa: S608 - constants only
                    record.account_id,
                    record.id,
                    change.version,
                    record.name,
                    change.name_key,
                    int(record.scope),
                    record.expire_time,
                    json.dumps(dict(record.labels)),
                    record.description,
                    list(record.allowed_networks),
                    list(record.permissions),
                    change.minted_hint or record.hint,
                    record.disable_time is not None,
                    record.hint,
                    [secret.digest for secret in change.kept],
                    [secret.expire_time for secret in change.kept],
                    [secret.seal for secret in change.kept],
                    list(change.retired),
                    None if minted is None else minted.digest,
                    "" if minted is None else minted.pepper_id,
                    change.minted_at,
                    minted is not None and minted.retire_on_first_use,
                    0 if minted is None else minted.ordinal,
                    None if minted is None else minted.seal,
                    audit_context.caller,
                    None if request is None else request.id,
                    "" if request is None else request.method,
                    b"" if request is None else request.body,
                    None if request is None else request.asked,
                    None if request is None else request.reusable_before,
                    audit_context.method,
                    audit_context.peer,
                    audit_context.request_id,
                    change.repeats,
                    *(change.seal or (None, None)),
                    *rate_columns(record.rate_limit),
                    audit_context.details,
                )
        if row is None:
            return None
        position = Position(row[0], mark_in(row[1]))
        return Changed(position, row[2], record_of(row[:-1])._replace(description=row[-1]))

    @retry_on_conflict
    async def get_request(
        self, account_id: str, request: Request
    ) -> tuple[StoredRequest | None, Snapshot]:
        """Return what the account has used the request's id for, and the snapshot of the read."""
        async with self._pool.session() as session:
            rows = await session.fetch(
                f"""
                SELECT h.revision, h.mark, h.timeline, r.method, r.body, r.token_id
                  FROM {SNAPSHOT}
                  LEFT JOIN request r ON r.account_id = $1 AND r.request_id = $2
                   AND r.create_time >= $3
                """,  # noqa: S608 - constants only
                account_id,
                request.id,
                request.reusable_before,
            )
        row = rows[0]
        return (None if row[3] is None else StoredRequest(*row[3:])), snapshot_of(row)

    @retry_on_conflict
    async def has_old_verifiers(self, rules: int = LIFECYCLE_RULES) -> bool:
        """Return whether a verifier is registered that does not know these rules."""
        async with self._pool.session() as session:
            return bool(
                await session.fetchval(
                    "SELECT EXISTS (SELECT FROM verifier v WHERE v.rules < $1)", rules
                )
            )

    @retry_on_conflict
    async def free_expired_name(
        self, account_id: str, name_key: str, now: datetime, audit_context: AuditContext
    ) -> bool:
        """Take the name from a token that has expired; return whether there was one.

        The expired token gets an entry of the call that takes its name.
        """
        async with self._pool.session() as session:
            status = await session.execute(
                f"""
                WITH freed AS (
                    UPDATE token
                       -- Unique, and still found by a search for a part of the name.
                       SET name_key = chr(1) || id || chr(1) || name_key, version = version + 1
                     WHERE account_id = $1 AND name_key = $2 AND delete_time IS NULL
                       AND expire_time <= $3
                    RETURNING id)
                INSERT INTO audit (account_id, token_id, caller, method, peer, request_id, reason,
                                   {DETAIL_COLUMNS})
                SELECT $1, id, $4, $5, $6, $7, $8, {DETAIL_VALUES[9]} FROM freed
                """,  # noqa: S608 - constants only
                account_id,
                name_key,
                now,
                audit_context.caller,
                audit_context.method,
                audit_context.peer,
                audit_context.request_id,
                NAME_FREED,
                audit_context.details,
            )
        return bool(status != "INSERT 0 0")

"""The SQL of tokens, one method per statement, the statement beside its method.

`Store` serves management calls from a pool. `lookup.py` has Verify's own connection and uses
`FIND_BY_DIGEST` and `record_of` from here. The SQL of verifiers is in `coherence/table.py`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING

from latchkey_service.audit import Origin
from latchkey_service.database import Connector, Pool, durably, retrying, translated
from latchkey_service.errors import StoreUnavailable
from latchkey_service.fleet import KnownPepper
from latchkey_service.secrets import Digest
from latchkey_service.verdict import Scope, TokenRecord

if TYPE_CHECKING:
    import asyncpg

__all__ = ["FIND_BY_DIGEST", "Deletion", "Position", "Store", "record_of"]

_COLUMNS = """t.id, t.account_id, t.name, t.scope, t.create_time, t.expire_time,
       t.last_used_time, t.delete_time, t.hint, t.labels"""
_COLUMN_COUNT = 10
_SCOPES = tuple(Scope)
_NO_LABELS: Mapping[str, str] = MappingProxyType({})

# The records of up to 1,000 digests, with the revision of the same snapshot. One row at least:
# `head` comes first, so that the revision is known even when nothing matches.
FIND_BY_DIGEST = f"""
SELECT h.revision, s.digest, {_COLUMNS}
  FROM head h
  LEFT JOIN (secret s JOIN token t ON t.id = s.token_id) ON s.digest = ANY($1::bytea[])
"""  # nosec B608 # noqa: S608 - constants only

# Peppers by age, with whether live tokens and registered verifiers use each.
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


@dataclass(frozen=True, slots=True)
class Position:
    """A place in an account's list: that of its token with this creation time and id."""

    create_time: datetime
    id: str


@dataclass(frozen=True, slots=True)
class Deletion:
    """The receipt of a deletion. `effective_time` None: not confirmed yet."""

    revision: int
    commit_time: datetime
    effective_time: datetime | None
    verifiers_acknowledged: int
    verifiers_outwaited: int


class Store:
    """The tables, as methods. All raise StoreUnavailable when Postgres does not answer in time."""

    def __init__(self, pool: Pool, connector: Connector) -> None:
        self._pool = pool
        self._connector = connector
        self._probe: asyncpg.Connection[asyncpg.Record] | None = None

    @classmethod
    async def open(cls, database_url: str) -> "Store":
        """Return a store on a new pool. Connects lazily, so that it opens without a database."""
        connector = Connector(database_url)
        return cls(await Pool.open(connector), connector)

    async def close(self) -> None:
        """Give up all connections, waiting a bounded time for those in use."""
        self._drop_probe()
        await self._pool.close()

    async def ping(self) -> None:
        """Tell whether Postgres answers and is one that can be written to. One call at a time.

        On a connection of its own: that the pool's are all taken, by calls that wait for one row
        for example, is no outage of Postgres.
        """
        try:
            if self._probe is None or self._probe.is_closed():
                self._probe = await self._connector.connect()
            with translated():
                standby = await self._probe.fetchval("SELECT pg_is_in_recovery()")
        except BaseException:
            self._drop_probe()
            raise
        if standby:
            raise StoreUnavailable("The database is a standby that cannot be written to.")

    @retrying
    async def register_pepper(self, pepper_id: str) -> None:
        """Make a pepper known. Idempotent."""
        async with self._pool.session() as session:
            await session.execute(
                "INSERT INTO pepper (id) VALUES ($1) ON CONFLICT DO NOTHING", pepper_id
            )

    @retrying
    async def known_peppers(self) -> list[KnownPepper]:
        """Return the peppers that the database knows, the oldest first."""
        async with self._pool.session() as session:
            return [KnownPepper(*row) for row in await session.fetch(_KNOWN_PEPPERS)]

    @retrying
    async def enrol_peppers(
        self, pepper_ids: list[str], check: Callable[[list[KnownPepper]], None]
    ) -> None:
        """Make a host's peppers known, unless `check` raises when it sees those known already.

        One host at a time: nothing becomes known between the check and the commit. A conflict of
        transactions repeats both.
        """
        async with self._pool.session() as session:
            with durably(session):
                # A snapshot taken before the lock was granted would miss the last host's peppers.
                async with session.transaction(isolation="read_committed"):
                    await session.execute(
                        "SELECT set_config('lock_timeout', $1, true),"
                        " set_config('statement_timeout', $1, true)",
                        f"{_PEPPER_LOCK_SECONDS}s",
                    )
                    # Released with the transaction: a pooler may give the session to others.
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

    @retrying
    async def insert_token(
        self, record: TokenRecord, name_key: str, digest: Digest, origin: Origin
    ) -> None:
        """Add a token with its secret and the audit entry of `origin`, all or none.

        Raises AlreadyExists for a taken name.
        """
        async with self._pool.session() as session:
            await session.execute(
                """
                WITH token AS (
                    INSERT INTO token (id, account_id, name, name_key, scope, create_time,
                                       expire_time, hint, labels)
                    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
                    RETURNING id, account_id),
                audited AS (
                    INSERT INTO audit (account_id, token_id, caller, method, peer, request_id)
                    SELECT account_id, id, $12, $13, $14, $15 FROM token)
                INSERT INTO secret (digest, pepper_id, token_id)
                SELECT $10, $11, id FROM token
                """,
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
                origin.caller,
                origin.method,
                origin.peer,
                origin.request_id,
            )
        origin.token_id, origin.recorded = record.id, True

    @retrying
    async def get_token(self, account_id: str, token_id: str) -> TokenRecord | None:
        """Return the account's live token, or None."""
        async with self._pool.session() as session:
            row = await session.fetchrow(
                f"""
                SELECT {_COLUMNS}
                  FROM token t
                 WHERE t.account_id = $1 AND t.id = $2 AND t.delete_time IS NULL
                """,  # nosec B608 # noqa: S608 - constants only
                account_id,
                token_id,
            )
        return None if row is None else record_of(row)

    @retrying
    async def list_tokens(
        self, account_id: str, after: Position | None, limit: int
    ) -> list[TokenRecord]:
        """Return up to `limit` live tokens, newest first, that come after a position."""
        # Two statements and not `$2 IS NULL OR ...`: that would keep the planner from starting
        # the index scan at the position.
        start = "AND (t.create_time, t.id) < ($3, $4)" if after else ""
        arguments = [account_id, limit] + ([after.create_time, after.id] if after else [])
        async with self._pool.session() as session:
            rows = await session.fetch(
                f"""
                SELECT {_COLUMNS}
                  FROM token t
                 WHERE t.account_id = $1 AND t.delete_time IS NULL {start}
                 ORDER BY t.create_time DESC, t.id DESC
                 LIMIT $2
                """,  # nosec B608 # noqa: S608 - constants only
                *arguments,
            )
        return [record_of(row) for row in rows]

    async def delete_token(self, account_id: str, token_id: str, origin: Origin) -> Deletion | None:
        """Delete a token and return the receipt, the first one if it is deleted already.

        None: the account never had it.
        """
        buried = await self._bury(account_id, token_id, origin)
        return buried or await self._deletion(account_id, token_id)

    @retrying
    async def _bury(self, account_id: str, token_id: str, origin: Origin) -> Deletion | None:
        """Turn a live token into a tombstone under the next revision; None if it is not live.

        One statement, and so one transaction: the tombstone, the next revision, the log entry and
        the audit entry stand together or not at all. From `next` to its commit it holds head's row
        (coherence rule 1). The token's row is locked before that, always in this order: no
        deadlock. Of two deletions of one token, the second waits at `live`, and then finds it live
        no more.
        """
        async with self._pool.session() as session:
            with durably(session):
                row = await session.fetchrow(
                    """
                    WITH live AS (
                        SELECT t.id
                          FROM token t
                         WHERE t.account_id = $1 AND t.id = $2 AND t.delete_time IS NULL
                           FOR UPDATE),
                    next AS (
                        UPDATE head h SET revision = h.revision + 1 FROM live
                        RETURNING h.revision, live.id),
                    -- Read once the lock is held, so that times follow the order of revisions.
                    stamped AS MATERIALIZED (
                        SELECT revision, id, clock_timestamp() AS moment FROM next),
                    tombstone AS (
                        UPDATE token t SET delete_time = s.moment FROM stamped s WHERE t.id = s.id),
                    logged AS (
                        INSERT INTO invalidation (revision, token_id)
                        SELECT revision, id FROM stamped),
                    audited AS (
                        INSERT INTO audit (time, account_id, token_id, caller, method, peer,
                                           request_id)
                        SELECT moment, $1, id, $3, $4, $5, $6 FROM stamped)
                    INSERT INTO deletion (token_id, revision, commit_time)
                    SELECT id, revision, moment FROM stamped
                    RETURNING revision, commit_time, effective_time, verifiers_acknowledged,
                              verifiers_outwaited
                    """,
                    account_id,
                    token_id,
                    origin.caller,
                    origin.method,
                    origin.peer,
                    origin.request_id,
                )
        if row is None:
            return None
        origin.recorded = True
        return Deletion(**dict(row))

    @retrying
    async def _deletion(self, account_id: str, token_id: str) -> Deletion | None:
        """Return the receipt of the account's deleted token, or None."""
        async with self._pool.session() as session:
            row = await session.fetchrow(
                """
                SELECT d.revision, d.commit_time, d.effective_time, d.verifiers_acknowledged,
                       d.verifiers_outwaited
                  FROM token t
                  JOIN deletion d ON d.token_id = t.id
                 WHERE t.account_id = $1 AND t.id = $2
                """,
                account_id,
                token_id,
            )
        return None if row is None else Deletion(**dict(row))

    @retrying
    async def confirm_deletion(self, token_id: str, acknowledged: int, outwaited: int) -> Deletion:
        """Write that no verifier can answer VALID any more, and return the receipt.

        Whoever comes first writes it; from then on the receipt stays the same, and to write it
        again makes sure that it, and with it the deletion, is where a failover does not undo it.
        """
        async with self._pool.session() as session:
            with durably(session):
                row = await session.fetchrow(
                    """
                    UPDATE deletion d
                       SET effective_time = coalesce(
                               d.effective_time, greatest(d.commit_time, clock_timestamp())),
                           verifiers_acknowledged = CASE WHEN d.effective_time IS NULL
                               THEN $2 ELSE d.verifiers_acknowledged END,
                           verifiers_outwaited = CASE WHEN d.effective_time IS NULL
                               THEN $3 ELSE d.verifiers_outwaited END
                     WHERE d.token_id = $1
                    RETURNING revision, commit_time, effective_time, verifiers_acknowledged,
                              verifiers_outwaited
                    """,
                    token_id,
                    acknowledged,
                    outwaited,
                )
        if row is None:
            # Its tombstone was removed in between: 90 days old, unless someone set it very low.
            raise StoreUnavailable("The deletion stands, but its receipt is gone.")
        return Deletion(**dict(row))

    @retrying
    async def purge_tombstones(self, before: datetime, limit: int) -> int:
        """Remove up to `limit` tombstones deleted before a moment; return how many went."""
        async with self._pool.session() as session:
            status = await session.execute(
                """
                DELETE FROM token
                 WHERE id IN (SELECT id FROM token
                               WHERE delete_time < $1
                               ORDER BY delete_time
                               LIMIT $2
                                 FOR UPDATE SKIP LOCKED)
                """,
                before,
                limit,
            )
        return int(status.removeprefix("DELETE "))

    def _drop_probe(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            probe.terminate()


def record_of(row: "asyncpg.Record") -> TokenRecord:
    """Return the token that a row with the token's columns holds."""
    # The columns are the last of every row. By place, not by name: Verify does this for each.
    columns = row[-_COLUMN_COUNT:]
    token_id, account_id, name, scope, created, expires, last_used, deleted, hint, labels = columns
    return TokenRecord(
        token_id,
        account_id,
        name,
        _SCOPES[scope],
        created,
        expires,
        hint,
        _NO_LABELS if labels == "{}" else json.loads(labels),
        last_used,
        deleted,
    )

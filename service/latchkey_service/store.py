"""All SQL of the service, one method per statement, the statement beside its method.

`Store` serves management calls from a pool. `lookup.py` has Verify's own connection and uses
`FIND_BY_DIGEST` and `record_of` from here. Every wait on Postgres is bounded, and every error of
the driver is translated here, by class or SQLSTATE: nothing above knows asyncpg.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from latchkey_service.errors import AlreadyExists, StoreUnavailable
from latchkey_service.secrets import Digest
from latchkey_service.verdict import Scope, TokenRecord

__all__ = [
    "FIND_BY_DIGEST",
    "Deletion",
    "Position",
    "Store",
    "connect",
    "record_of",
    "translated",
]

# A statement of ours takes about a millisecond. Two seconds without an answer is a database that
# is frozen or gone, and a caller is better told so than kept.
STATEMENT_TIMEOUT_SECONDS = 2.0
CONNECT_TIMEOUT_SECONDS = 1.0
# A row lock is held for one commit; past this something is stuck and the caller may retry.
LOCK_TIMEOUT = "1500ms"
CLIENT_CHECK_INTERVAL = "250ms"
# Management calls are rare beside verifies; ten connections keep 2 cores of Postgres busy.
POOL_SIZE_MAX = 10

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

# After these nothing is known of the connection, and it is not used again.
_BROKEN = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,  # TimeoutError included
    asyncio.CancelledError,
)


class _Connection(asyncpg.Connection):
    """A connection whose release to the pool costs no round trip: our statements leave no state."""

    def get_reset_query(self) -> str:
        return ""


if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    _Session = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]


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

    def __init__(self, pool: asyncpg.Pool, database_url: str) -> None:
        self._pool = pool
        self._database_url = database_url
        self._probe: asyncpg.Connection[asyncpg.Record] | None = None

    @classmethod
    async def open(cls, database_url: str) -> "Store":
        """Return a store on a new pool. Connects lazily, so that it opens without a database."""
        pool = await asyncpg.create_pool(
            database_url,
            min_size=0,
            max_size=POOL_SIZE_MAX,
            connection_class=_Connection,
            **_options(),
        )
        return cls(pool, database_url)

    async def close(self) -> None:
        """Give up all connections, waiting a bounded time for those in use."""
        self._drop_probe()
        try:
            async with asyncio.timeout(STATEMENT_TIMEOUT_SECONDS):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    async def ping(self) -> None:
        """Tell whether Postgres answers and is one that can be written to. One call at a time.

        On a connection of its own: that the pool's are all taken, by calls that wait for one row
        for example, is no outage of Postgres.
        """
        try:
            if self._probe is None or self._probe.is_closed():
                self._probe = await connect(self._database_url)
            with translated():
                standby = await self._probe.fetchval("SELECT pg_is_in_recovery()")
        except BaseException:
            self._drop_probe()
            raise
        if standby:
            raise StoreUnavailable("The database is a standby that cannot be written to.")

    async def register_pepper(self, pepper_id: str) -> None:
        """Make a pepper known. Idempotent."""
        async with self._session() as session:
            await session.execute(
                "INSERT INTO pepper (id) VALUES ($1) ON CONFLICT DO NOTHING", pepper_id
            )

    async def missing_peppers(self, known: list[str]) -> list[str]:
        """Return the ids of peppers that live tokens' secrets use and that are not in `known`."""
        async with self._session() as session:
            rows = await session.fetch(
                """
                SELECT p.id
                  FROM pepper p
                 WHERE p.id <> ALL($1::text[])
                   AND EXISTS (SELECT FROM secret s JOIN token t ON t.id = s.token_id
                                WHERE s.pepper_id = p.id AND t.delete_time IS NULL)
                 ORDER BY p.create_time
                """,
                known,
            )
        return [row["id"] for row in rows]

    async def insert_token(self, record: TokenRecord, name_key: str, digest: Digest) -> None:
        """Add a token with its secret, both or neither. Raises AlreadyExists for a taken name."""
        async with self._session() as session:
            await session.execute(
                """
                WITH token AS (
                    INSERT INTO token (id, account_id, name, name_key, scope, create_time,
                                       expire_time, hint, labels)
                    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
                    RETURNING id)
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
            )

    async def get_token(self, account_id: str, token_id: str) -> TokenRecord | None:
        """Return the account's live token, or None."""
        async with self._session() as session:
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

    async def list_tokens(
        self, account_id: str, after: Position | None, limit: int
    ) -> list[TokenRecord]:
        """Return up to `limit` live tokens, newest first, that come after a position."""
        # Two statements and not `$2 IS NULL OR ...`: that would keep the planner from starting
        # the index scan at the position.
        start = "AND (t.create_time, t.id) < ($3, $4)" if after else ""
        arguments = [account_id, limit] + ([after.create_time, after.id] if after else [])
        async with self._session() as session:
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

    async def delete_token(self, account_id: str, token_id: str) -> Deletion | None:
        """Delete a token and return the receipt, the first one if it is deleted already.

        None: the account never had it. One transaction: the tombstone, the next revision and the
        log entry stand together or not at all.
        """
        async with self._transaction() as session:
            # The token's row is locked before head's, always in this order: no deadlock. Of two
            # deletions of one token, the second waits here and then finds delete_time set.
            deleted = await session.fetchrow(
                """
                SELECT t.delete_time IS NOT NULL AS already
                  FROM token t
                 WHERE t.account_id = $1 AND t.id = $2
                   FOR UPDATE
                """,
                account_id,
                token_id,
            )
            if deleted is None:
                return None
            if not deleted["already"]:
                await _bury(session, token_id)
            row = await session.fetchrow(
                """
                SELECT revision, commit_time, effective_time, verifiers_acknowledged,
                       verifiers_outwaited
                  FROM deletion
                 WHERE token_id = $1
                """,
                token_id,
            )
        assert row is not None, "every tombstone has its deletion"  # noqa: S101 - invariant
        return Deletion(**dict(row))

    async def purge_tombstones(self, before: datetime, limit: int) -> int:
        """Remove up to `limit` tombstones deleted before a moment; return how many went."""
        async with self._session() as session:
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

    @contextlib.asynccontextmanager
    async def _transaction(self) -> "AsyncIterator[_Session]":
        """Lend a connection in a transaction: committed at the end, rolled back on an error."""
        async with self._session() as session:
            transaction = session.transaction()
            await transaction.start()
            try:
                yield session
            except _BROKEN:
                # Rolled back by Postgres when the connection ends, as it does in `_session`. To
                # wait for the answer to a ROLLBACK would be another wait on a frozen server.
                raise
            except BaseException:
                await transaction.rollback()
                raise
            await transaction.commit()

    @contextlib.asynccontextmanager
    async def _session(self) -> "AsyncIterator[_Session]":
        """Lend a connection; translate what goes wrong with it, waiting for one included."""
        with translated():
            async with self._pool.acquire(timeout=STATEMENT_TIMEOUT_SECONDS) as session:
                try:
                    yield session
                except _BROKEN:
                    # Else the release would wait until a frozen server has cancelled the query,
                    # or hand on a connection that is ended but has not been told so yet.
                    session.terminate()
                    raise


async def connect(database_url: str) -> "asyncpg.Connection[asyncpg.Record]":
    """Return a connection of one's own. Raises StoreUnavailable."""
    with translated():
        return await asyncpg.connect(database_url, **_options())


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's errors into the domain's. Its messages stay in `__cause__`, for the log."""
    try:
        yield
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name != "token_live_name":
            raise
        raise AlreadyExists("The account has a live token of this name.") from error
    except (
        asyncpg.PostgresConnectionError,  # 08xxx: broken off
        asyncpg.OperatorInterventionError,  # 57xxx: shutting down, starting up, cancelled
        asyncpg.InsufficientResourcesError,  # 53xxx: too many connections, disk full
        asyncpg.LockNotAvailableError,  # 55P03: lock_timeout
        asyncpg.TransactionRollbackError,  # 40xxx: serialisation, deadlock
        asyncpg.ReadOnlySQLTransactionError,  # 25006: a standby, or a deposed primary
        asyncpg.InvalidAuthorizationSpecificationError,  # 28xxx: also while roles are restored
        asyncpg.InvalidCatalogNameError,  # 3D000: also while the database is restored
        asyncpg.InterfaceError,  # the driver's own word for a connection that is closing
        asyncpg.InternalClientError,  # and for one that ended between two of its messages
        OSError,  # TimeoutError included
    ) as error:
        raise StoreUnavailable("The database does not answer; try again shortly.") from error


def record_of(row: asyncpg.Record) -> TokenRecord:
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


async def _bury(session: "_Session", token_id: str) -> None:
    """Turn a live token into a tombstone under the next revision, in the caller's transaction."""
    # From here to the commit this transaction holds head's row (coherence rule 1).
    revision = await session.fetchval("UPDATE head SET revision = revision + 1 RETURNING revision")
    # Read once the lock is held, so that times follow the order of revisions. No server answers
    # from memory, so the deletion is in effect as soon as it is committed.
    await session.execute(
        """
        WITH now AS (SELECT clock_timestamp() AS moment),
             tombstone AS (UPDATE token SET delete_time = moment FROM now WHERE id = $1),
             logged AS (INSERT INTO invalidation (revision, token_id) VALUES ($2, $1))
        INSERT INTO deletion (token_id, revision, commit_time, effective_time)
        SELECT $1, $2, moment, moment FROM now
        """,
        token_id,
        revision,
    )


def _options() -> dict[str, Any]:
    """Return the connection settings that both kinds of connection share."""
    return {
        "timeout": CONNECT_TIMEOUT_SECONDS,
        # Never a standby, which may be behind: it would answer VALID for a token that is deleted.
        "target_session_attrs": SessionAttribute.primary,
        "command_timeout": STATEMENT_TIMEOUT_SECONDS,
        "server_settings": {
            "application_name": "latchkey",
            "lock_timeout": LOCK_TIMEOUT,
            # A second bound, on the server: work that nobody waits for any more must end too.
            "statement_timeout": f"{int(STATEMENT_TIMEOUT_SECONDS * 1000)}ms",
            "idle_in_transaction_session_timeout": "10s",
            # A connection that was given up ends by this also while it waits for a lock. Else
            # callers with short deadlines would pile up connections behind one row.
            "client_connection_check_interval": CLIENT_CHECK_INTERVAL,
            "jit": "off",
        },
    }

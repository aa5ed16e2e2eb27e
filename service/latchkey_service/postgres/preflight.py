"""Checks a database when the service starts: the pooler's mode and the durability settings.

Owns detection and advice; it changes no setting. A pooler that shares server connections by
transaction loses LISTEN, settings and prepared statements without an error. So it is recognised by
its behaviour, not by what it reports.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import asyncpg

from latchkey_service.postgres.circuit_breaker import ATTEMPTS_MAX
from latchkey_service.postgres.sessions import SETTINGS
from latchkey_service.settings.logs import logger

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = [
    "ONE_WORKER",
    "DatabaseError",
    "PoolerError",
    "Workers",
    "check_capacity",
    "check_database",
    "check_pooler",
    "few_connections",
    "lost_writes",
    "needs_transactions",
    "unbounded_settings",
    "warn_of_lost_writes",
    "warn_of_unbounded_role",
]

# Of a worker with a lease: for the lease, for look-ups, and for background work.
IDLE_CONNECTIONS: Final = 3
# Of workers that share a lease: worker 0 holds these for all, and each of the others holds one
# while worker 0 is away.
SHARED_IDLE_CONNECTIONS: Final = 2
# In each round the pooler chooses a server connection three times. To go unnoticed, a pooler in
# transaction mode would have to choose like one in session mode every time.
ROUNDS: Final = 5
# An answer takes one round trip. A pooler without a free server connection waits for minutes.
ANSWER_TIMEOUT_SECONDS: Final = 5.0

_BY_TRANSACTION: Final = (
    "the database is behind a pooler that shares connections by transaction; set "
    "LATCHKEY_POOLER=transaction, or switch the pooler to session mode (PgBouncer: "
    "pool_mode = session)"
)
_BY_STATEMENT: Final = (
    "the database is behind a pooler that allows no transactions; switch it to session or "
    "transaction mode (PgBouncer: pool_mode)"
)
_EXHAUSTED: Final = (
    "the database is behind a pooler that had no server connection for a second client; raise the "
    "size of its pool (PgBouncer: default_pool_size): in session mode each worker needs up to "
    f"{ATTEMPTS_MAX} connections"
)
_UNSAFE: Final = {
    "fsync": "fsync is off: a crash of the database's machine can undo "
    "confirmed deletions, or destroy the database",
    "full_page_writes": "full_page_writes is off: a crash of the database's machine can destroy "
    "the database or undo confirmed deletions",
}


class Workers(NamedTuple):
    """The workers of a host, which open connections."""

    number: int = 1
    share_lease: bool = False

    @property
    def idle_connections(self) -> int:
        """How many connections they hold when idle, at most."""
        if self.share_lease:
            return SHARED_IDLE_CONNECTIONS + self.number - 1
        return self.number * IDLE_CONNECTIONS


ONE_WORKER: Final = Workers()


class DatabaseError(Exception):
    """The service cannot work with this database. The message says what to do.

    DatabaseError
    └── PoolerError
    """


class PoolerError(DatabaseError):
    """The service cannot work through this pooler."""


async def check_pooler(
    connection: "Connection", connect: Callable[[], "Awaitable[Connection]"]
) -> None:
    """Raise PoolerError if `connection` does not have a server session to itself.

    Alternates between this connection and a second one. If each connection has its own session,
    the first always reaches the same server process and the second never reaches that one. This
    works with a pool of any size: a pool of one gives both the same process at once.
    """
    process = await _server_process(connection)
    # Postgres reports its process id to a new connection. A pooler reports a made-up number.
    if process == connection.get_server_pid():
        return
    try:
        other = await connect()
    except TimeoutError as error:
        raise PoolerError(_EXHAUSTED) from error
    try:
        for _ in range(ROUNDS):
            await other.execute("BEGIN", timeout=ANSWER_TIMEOUT_SECONDS)
            # During the second one's transaction, the first one cannot get the same process.
            if await _server_process(other) == process:
                raise PoolerError(_BY_TRANSACTION)
            if await _server_process(connection) != process:
                raise PoolerError(_BY_TRANSACTION)
            await other.execute("ROLLBACK", timeout=ANSWER_TIMEOUT_SECONDS)
            if await _server_process(connection) != process:
                raise PoolerError(_BY_TRANSACTION)
    finally:
        other.terminate()


@contextlib.contextmanager
def needs_transactions() -> Iterator[None]:
    """Raise PoolerError if the pooler closes a connection because it began a transaction."""
    try:
        yield
    except asyncpg.PostgresConnectionError as error:
        # PgBouncer's words; its SQLSTATE only says that the connection was lost.
        if "statement pooling" in str(error):
            raise PoolerError(_BY_STATEMENT) from error
        raise


async def warn_of_unbounded_role(connection: "Connection") -> None:
    """Log which time-outs the role lacks. Behind transaction pooling, no session can set them."""
    missing, statements = await unbounded_settings(connection)
    if missing:
        logger().warning(
            "the database role lacks settings that the pooler does not let the service set",
            settings=missing,
            run=statements,
        )


async def unbounded_settings(connection: "Connection") -> tuple[list[str], str]:
    """Return which time-outs the role lacks, and the statements that set them."""
    rows = await connection.fetch(
        """
        SELECT name FROM pg_catalog.pg_settings
         WHERE name = ANY($1::text[]) AND setting = CASE name WHEN 'jit' THEN 'on' ELSE '0' END
        """,
        list(SETTINGS),
    )
    role = await connection.fetchval("SELECT quote_ident(current_user)")
    missing = [row["name"] for row in rows]
    return missing, "; ".join(
        f"ALTER ROLE {role} SET {name} = '{SETTINGS[name]}'" for name in missing
    )


async def warn_of_lost_writes(connection: "Connection") -> None:
    """Log settings with which Postgres may lose committed transactions in a crash."""
    for text in await lost_writes(connection):
        logger().warning(text)


async def lost_writes(connection: "Connection") -> list[str]:
    """Return a sentence for each setting with which Postgres may lose committed transactions."""
    rows = await connection.fetch(
        "SELECT name FROM pg_catalog.pg_settings WHERE name = ANY($1::text[]) AND setting = 'off'",
        list(_UNSAFE),
    )
    return [_UNSAFE[row["name"]] for row in rows]


async def check_database(connection: "Connection") -> None:
    """Raise DatabaseError if Latchkey cannot work in this database."""
    row = await connection.fetchrow(
        """
        SELECT current_setting('server_encoding') AS encoding,
               quote_ident(current_database()) AS database,
               quote_ident(current_user) AS role,
               current_setting('default_transaction_read_only') = 'on' AS read_only,
               current_schema() AS schema,
               to_regclass('schema_migration') IS NOT NULL AS migrated,
               has_schema_privilege(current_schema(), 'CREATE') AS may_create
        """
    )
    assert row is not None, "a SELECT without FROM has one row"  # noqa: S101 - for the type checker
    if row["encoding"] != "UTF8":
        raise DatabaseError(
            f"the database {row['database']} has the encoding {row['encoding']}, and names of "
            "tokens need UTF8; create another one: createdb --encoding=UTF8 --template=template0 "
            "latchkey"
        )
    if row["read_only"]:
        raise DatabaseError(
            f"the role {row['role']} may only read, because default_transaction_read_only is on; "
            f"ALTER ROLE {row['role']} SET default_transaction_read_only = off, or use another role"
        )
    if row["schema"] is None:
        raise DatabaseError(
            f"no schema of the role's search_path exists, or the role {row['role']} may not use "
            "it; create the schema, or change search_path"
        )
    if not row["migrated"] and not row["may_create"]:
        schema = f'"{row["schema"]}"'
        raise DatabaseError(
            f"the role {row['role']} may not create tables in the schema {schema}; "
            f"GRANT CREATE ON SCHEMA {schema} TO {row['role']}, or make the role the owner of the "
            "database"
        )


async def check_capacity(connection: "Connection", workers: Workers) -> None:
    """Raise DatabaseError if Postgres allows fewer connections than the workers hold when idle.

    Logs a warning if it allows fewer than they may open.
    """
    if (sentence := await few_connections(connection, workers)) is not None:
        logger().warning("few connections to Postgres", what_to_do=sentence)


async def few_connections(connection: "Connection", workers: Workers) -> str | None:
    """Return a sentence if Postgres allows fewer connections than the workers may open, or None.

    Raises DatabaseError if it allows fewer than they hold when idle. Only for a direct connection:
    a pooler shares connections between its clients.
    """
    if await _server_process(connection) != connection.get_server_pid():
        return None
    row = await connection.fetchrow(
        """
        SELECT current_setting('max_connections')::int
               - current_setting('superuser_reserved_connections')::int
               - coalesce(current_setting('reserved_connections', true)::int, 0) AS all_roles,
               (SELECT CASE WHEN rolconnlimit >= 0 THEN rolconnlimit END
                  FROM pg_catalog.pg_roles WHERE rolname = current_user) AS role,
               (SELECT CASE WHEN datconnlimit >= 0 THEN datconnlimit END
                  FROM pg_catalog.pg_database WHERE datname = current_database()) AS database
        """
    )
    assert row is not None, "a SELECT without FROM has one row"  # noqa: S101 - for the type checker
    limits = {
        "max_connections": row["all_roles"],
        "the role's CONNECTION LIMIT": row["role"],
        "the database's CONNECTION LIMIT": row["database"],
    }
    name, limit = min(
        ((name, limit) for name, limit in limits.items() if limit is not None),
        key=lambda pair: pair[1],
    )
    idle, most = workers.idle_connections, workers.number * ATTEMPTS_MAX
    sentence = (
        f"Postgres allows {limit} connections, and {workers.number} workers may hold {idle} when "
        f"idle and open up to {most}; raise {name}, or lower LATCHKEY_WORKERS"
    )
    if limit < idle:
        raise DatabaseError(sentence)
    return sentence if limit < most else None


async def _server_process(connection: "Connection") -> int:
    process: int = await connection.fetchval(
        "SELECT pg_backend_pid()", timeout=ANSWER_TIMEOUT_SECONDS
    )
    return process

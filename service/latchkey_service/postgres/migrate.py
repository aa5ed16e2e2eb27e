"""Brings the database to this release's schema: applies numbered SQL files in order, once each.

Owns the table `schema_migration`; the SQL files own the schema. Each file runs in one transaction
under an advisory lock that ends with the transaction. If several servers start at once, one applies
a file and the others find it applied. A database that has all of them is only read, without a lock.
Which releases work with which schema is decided in `schema.py`.
"""

import asyncio
import contextlib
import random
import ssl
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import asyncpg

from latchkey_service.postgres import schema
from latchkey_service.postgres.circuit_breaker import jittered
from latchkey_service.postgres.connections import translate_errors
from latchkey_service.postgres.grants import grant, statements
from latchkey_service.postgres.hosts import CONNECT_ERRORS, Hosts, is_permanent
from latchkey_service.postgres.preflight import (
    ONE_WORKER,
    DatabaseError,
    Workers,
    check_capacity,
    check_database,
    check_pooler,
    needs_transactions,
    warn_of_lost_writes,
    warn_of_unbounded_role,
)
from latchkey_service.postgres.schema import Applied, Migration, MigrationError, bundled
from latchkey_service.postgres.sessions import Pooler, driver_options
from latchkey_service.settings import database_url
from latchkey_service.settings.logs import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Migration",
    "MigrationError",
    "applied",
    "bundled",
    "grant_statements",
    "migrate",
    "pending",
    "refusal",
]

# Any number works, as long as every release uses the same one.
ADVISORY_LOCK = 0x6C61746368  # "latch"
# Longest wait for another server's migration, and for a table lock: while this migration waits for
# a lock, every later query on that table queues behind it.
LOCK_TIMEOUT_SECONDS = 30
# A schema change on a large table takes a while. After this long, a person should investigate.
STATEMENT_TIMEOUT_SECONDS = 600.0
CONNECT_TIMEOUT_SECONDS = 5.0
# Time for a database that starts together with the service (compose, a reboot).
START_TIMEOUT_SECONDS = 30.0
RETRY_SECONDS = 0.5
SERVER_VERSION_MIN = 15


_JOURNAL = """
CREATE TABLE IF NOT EXISTS schema_migration (
    version        integer PRIMARY KEY,
    name           text NOT NULL,
    checksum       text NOT NULL,
    apply_time     timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- The lowest schema number whose release works with this migration.
    oldest_release integer);
-- For databases from before the column.
ALTER TABLE schema_migration ADD COLUMN IF NOT EXISTS oldest_release integer;
"""


async def migrate(
    url: str,
    migrations: "Sequence[Migration]",
    pooler: Pooler = "none",
    workers: Workers = ONE_WORKER,
    service_role: str | None = None,
) -> "list[Migration]":
    """Apply the missing migrations and return them. Raises MigrationError and StoreUnavailable.

    First checks that the service can work with the database through `pooler`, and has enough
    connections for `workers`. Gives `service_role` the rights that the service needs.
    """
    async with _database(url, pooler, workers) as connection:
        done = await _apply(connection, migrations)
        if service_role is not None:
            await grant(connection, service_role)
        return done


async def pending(
    url: str,
    migrations: "Sequence[Migration]",
    pooler: Pooler = "none",
    workers: Workers = ONE_WORKER,
) -> "list[Migration]":
    """Return the migrations that `migrate` would apply, after the same checks. Changes nothing.

    Raises MigrationError and StoreUnavailable.
    """
    async with _database(url, pooler, workers) as connection:
        return await _missing(connection, migrations)


async def grant_statements(url: str, role: str) -> list[str]:
    """Return what `migrate` would run for the rights of `role` on the tables that exist now.

    Raises MigrationError and StoreUnavailable.
    """
    async with _database(url, "transaction", ONE_WORKER) as connection:
        return await statements(connection, role)


@contextlib.asynccontextmanager
async def _database(
    url: str, pooler: Pooler, workers: Workers
) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
    """Connect and check the database. Raises MigrationError for its errors in the body too."""
    if problems := database_url.file_problems(url):
        raise MigrationError("; ".join(problems))
    for text in database_url.warnings(url):
        logger().warning("the database URL has a parameter without effect", what_to_do=text)
    try:
        hosts = Hosts(url)
    except (OSError, ValueError) as error:
        raise MigrationError(f"the TLS files of the database are invalid: {error}") from None
    connection = await _connect(hosts)
    try:
        with translate_errors():
            try:
                with needs_transactions():
                    await _check(connection, hosts, pooler, workers)
                    yield connection
            except asyncpg.LockNotAvailableError as error:
                raise MigrationError(
                    f"could not get a lock within {LOCK_TIMEOUT_SECONDS} s: another migration or a "
                    "long transaction is still running; try again when it has ended"
                ) from error
    except DatabaseError as error:
        raise MigrationError(str(error)) from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise MigrationError(
            f"the database needs a migration, and this role may not change its tables ({error}); "
            "run 'latchkey migrate --grant ROLE' as their owner, with the role of the service"
        ) from error
    except asyncpg.PostgresError as error:
        raise MigrationError(f"a migration failed and was rolled back: {error}") from error
    finally:
        connection.terminate()


async def _connect(hosts: Hosts) -> "asyncpg.Connection[asyncpg.Record]":
    """Connect, with retries while the database starts."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + START_TIMEOUT_SECONDS
    warned = False
    while True:
        try:
            connection = await _attempt(hosts)
            break
        except CONNECT_ERRORS as error:
            if is_permanent(error):
                raise MigrationError(refusal(error)) from error
            if loop.time() > give_up:
                message = f"cannot connect to the database: {type(error).__name__}: {error}"
                raise MigrationError(message) from error
            if not warned:
                warned = True
                logger().warning(
                    "waiting for the database",
                    seconds_max=START_TIMEOUT_SECONDS,
                    error=f"{type(error).__name__}: {error}",
                )
            await asyncio.sleep(jittered(RETRY_SECONDS, random.random()))  # noqa: S311 - jitter
    version = connection.get_server_version().major
    if version < SERVER_VERSION_MIN:
        connection.terminate()
        raise MigrationError(
            f"Postgres {SERVER_VERSION_MIN} or newer is required; this is {version}"
        )
    return connection


async def _attempt(hosts: Hosts) -> "asyncpg.Connection[asyncpg.Record]":
    """Connect in a way that works through any pooler and leaves no state in it."""
    return await hosts.connect(
        timeout=CONNECT_TIMEOUT_SECONDS,
        command_timeout=STATEMENT_TIMEOUT_SECONDS,
        server_settings={"application_name": "latchkey migrate"},
        **driver_options("transaction"),
    )


def refusal(error: Exception) -> str:
    """Return the message, with advice, for a permanent failure to connect."""
    message = f"cannot connect to the database: {error}"
    if isinstance(error, asyncpg.ProtocolViolationError):
        message += (
            ". If PgBouncer refuses a startup parameter, remove it from LATCHKEY_DATABASE_URL or "
            "add it to ignore_startup_parameters in pgbouncer.ini"
        )
    elif isinstance(error, ssl.SSLCertVerificationError):
        message += (
            ". The server's certificate must contain the name in LATCHKEY_DATABASE_URL, and "
            "sslrootcert must contain its CA"
        )
    elif isinstance(error, ConnectionError):
        message += ". Turn on TLS in Postgres, or set sslmode=disable on a trusted network"
    return message


async def _check(
    connection: "asyncpg.Connection[asyncpg.Record]", hosts: Hosts, pooler: Pooler, workers: Workers
) -> None:
    """Raise DatabaseError if the service cannot work with the database; log unsafe settings."""
    await check_database(connection)
    if pooler == "none":
        await check_pooler(connection, lambda: _attempt(hosts))
        await check_capacity(connection, workers)
    else:
        await warn_of_unbounded_role(connection)
    await warn_of_lost_writes(connection)


async def _apply(
    connection: "asyncpg.Connection[asyncpg.Record]", migrations: "Sequence[Migration]"
) -> "list[Migration]":
    # Without the lock, so that an ordinary start neither waits nor needs the right to change
    # anything.
    if not await _missing(connection, migrations):
        return []
    async with _locked(connection):
        await connection.execute(_JOURNAL)
    done: list[Migration] = []
    while True:
        async with _locked(connection):
            lacking = schema.missing(migrations, await applied(connection))
            if not lacking:
                return done
            migration = lacking[0]
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO schema_migration (version, name, checksum, oldest_release)"
                " VALUES ($1, $2, $3, $4)",
                migration.version,
                migration.name,
                migration.checksum,
                migration.oldest_release,
            )
        done.append(migration)


async def _missing(
    connection: "asyncpg.Connection[asyncpg.Record]", migrations: "Sequence[Migration]"
) -> "list[Migration]":
    # A transaction, which a pooler in statement mode rejects: `needs_transactions`.
    async with connection.transaction(isolation="read_committed"):
        return schema.missing(migrations, await applied(connection))


async def applied(connection: "asyncpg.Connection[asyncpg.Record]") -> list[Applied]:
    """Return the migrations that the database has, in order."""
    if not await connection.fetchval("SELECT to_regclass('schema_migration') IS NOT NULL"):
        return []
    rows = await connection.fetch(
        # Through JSON, because a database from an early release lacks the column.
        "SELECT version, checksum, (to_jsonb(m) ->> 'oldest_release')::integer AS oldest_release"
        " FROM schema_migration m ORDER BY version"
    )
    return [Applied(row["version"], row["checksum"], row["oldest_release"]) for row in rows]


@contextlib.asynccontextmanager
async def _locked(connection: "asyncpg.Connection[asyncpg.Record]") -> AsyncIterator[None]:
    """Run a transaction that does not overlap with any other migration.

    Lock and time-outs end with the transaction. Behind a pooler in transaction mode, session state
    would stay on a server connection that others use. The isolation level is READ COMMITTED,
    whatever the role's default, because reads after the wait for the lock must see the commits made
    during the wait.
    """
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(
            f"SET LOCAL lock_timeout = {int(LOCK_TIMEOUT_SECONDS * 1000)};"
            f"SET LOCAL statement_timeout = {int(STATEMENT_TIMEOUT_SECONDS * 1000)}"
        )
        await connection.execute("SELECT pg_advisory_xact_lock($1)", ADVISORY_LOCK)
        yield

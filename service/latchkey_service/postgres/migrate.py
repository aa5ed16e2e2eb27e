"""Brings the database to this release's schema: applies numbered SQL files in order, once each.

Owns the table `schema_migration`; the SQL files own the schema. Each file runs in one transaction
under an advisory lock that ends with the transaction. If several servers start at once, one applies
a file and the others find it applied. An applied file must never change, and a database with
migrations that this release does not know is rejected.
"""

import asyncio
import contextlib
import hashlib
import random
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import asyncpg

from latchkey_service.postgres.circuit_breaker import jittered
from latchkey_service.postgres.connections import translate_errors
from latchkey_service.postgres.grants import grant
from latchkey_service.postgres.hosts import CONNECT_ERRORS, Hosts, is_permanent
from latchkey_service.postgres.preflight import (
    DatabaseError,
    check_capacity,
    check_database,
    check_pooler,
    needs_transactions,
    warn_of_lost_writes,
    warn_of_unbounded_role,
)
from latchkey_service.postgres.sessions import Pooler, driver_options
from latchkey_service.settings import database_url
from latchkey_service.settings.logs import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Migration", "MigrationError", "bundled", "migrate"]

# Any number works, as long as every release uses the same one.
ADVISORY_LOCK = 0x6C61746368  # "latch"
# Longest wait for another server's migration. Also the longest wait for a table lock: while this
# migration waits for one, every later query on that table queues behind it.
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
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    apply_time timestamptz NOT NULL DEFAULT clock_timestamp())
"""


class MigrationError(Exception):
    """The database cannot be used with this release. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Migration:
    """A numbered SQL file."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the file's text, in hexadecimal."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def bundled() -> "list[Migration]":
    """Return this release's migrations, in order."""
    found = []
    for file in resources.files("latchkey_service").joinpath("postgres", "migrations").iterdir():
        match = re.fullmatch(r"(\d{4})_(\w+)\.sql", file.name)
        if match:
            found.append(Migration(int(match[1]), match[2], file.read_text("utf-8")))
    found.sort(key=lambda migration: migration.version)
    return found


async def migrate(
    url: str,
    migrations: "Sequence[Migration]",
    pooler: Pooler = "none",
    workers: int = 1,
    service_role: str | None = None,
) -> "list[Migration]":
    """Apply the missing migrations and return them. Raises MigrationError and StoreUnavailable.

    First checks that the service can work with the database through `pooler`, and has enough
    connections for `workers`. Gives `service_role` the rights that the service needs.
    """
    if problems := database_url.file_problems(url):
        raise MigrationError("; ".join(problems))
    for text in database_url.warnings(url):
        logger().warning("the database URL promises more than it holds", what_to_do=text)
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
                    done = await _apply(connection, migrations)
                    if service_role is not None:
                        await grant(connection, service_role)
                    return done
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
                raise MigrationError(_refusal(error)) from error
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


def _refusal(error: Exception) -> str:
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
    connection: "asyncpg.Connection[asyncpg.Record]", hosts: Hosts, pooler: Pooler, workers: int
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
    async with _locked(connection):
        # Not IF NOT EXISTS alone, which requires the right to create tables even where it exists.
        exists = await connection.fetchval("SELECT to_regclass('schema_migration') IS NOT NULL")
        if not exists:
            await connection.execute(_JOURNAL)
    done: list[Migration] = []
    while True:
        async with _locked(connection):
            migration = await _next_migration(connection, migrations)
            if migration is None:
                return done
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO schema_migration (version, name, checksum) VALUES ($1, $2, $3)",
                migration.version,
                migration.name,
                migration.checksum,
            )
        done.append(migration)


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


async def _next_migration(
    connection: "asyncpg.Connection[asyncpg.Record]", migrations: "Sequence[Migration]"
) -> Migration | None:
    """Return the first migration that the database lacks, or None. Raises MigrationError."""
    rows = await connection.fetch("SELECT version, checksum FROM schema_migration")
    applied = {row["version"]: row["checksum"] for row in rows}
    if ahead := sorted(set(applied) - {m.version for m in migrations}):
        raise MigrationError(
            f"the database has migration {ahead[-1]}, which this release does not know; "
            "run the release that applied it, or a newer one"
        )
    missing = None
    for migration in migrations:
        if migration.version not in applied:
            missing = missing or migration
        elif applied[migration.version] != migration.checksum:
            raise MigrationError(
                f"migration {migration.version:04} ({migration.name}) differs from the one that "
                "was applied to this database; a released migration must never change"
            )
    return missing

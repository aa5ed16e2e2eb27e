"""Bring the database to this release's schema: numbered SQL files, applied in order, each once.

One transaction per file, under an advisory lock: of servers that start at once, one migrates and
the others find it done. A file that was applied may not change afterwards, and a database that is
ahead of this release is refused.
"""

import asyncio
import hashlib
import random
import re
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import asyncpg

from latchkey_service.database import translated
from latchkey_service.hosts import Hosts
from latchkey_service.reconnection import spread

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Migration", "MigrationError", "bundled", "migrate"]

# Any number will do, as long as it is always the same.
ADVISORY_LOCK = 0x6C61746368  # "latch"
# How long another server's migration is waited for, and how long this one may wait for table locks
# before it gives up rather than queue every query behind itself.
LOCK_TIMEOUT_SECONDS = 30
# A schema change over a large table takes a while; past this somebody should look.
STATEMENT_TIMEOUT_SECONDS = 600.0
CONNECT_TIMEOUT_SECONDS = 5.0
# A database that starts beside the service (compose, a reboot) is given this long to come up.
START_TIMEOUT_SECONDS = 30.0
RETRY_SECONDS = 0.5
SERVER_VERSION_MIN = 15


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
    for file in resources.files("latchkey_service").joinpath("migrations").iterdir():
        match = re.fullmatch(r"(\d{4})_(\w+)\.sql", file.name)
        if match:
            found.append(Migration(int(match[1]), match[2], file.read_text("utf-8")))
    found.sort(key=lambda migration: migration.version)
    return found


async def migrate(database_url: str, migrations: "Sequence[Migration]") -> "list[Migration]":
    """Apply what is missing and return it. Raises MigrationError and StoreUnavailable."""
    connection = await _connect(database_url)
    try:
        with translated():
            try:
                return await _apply(connection, migrations)
            except asyncpg.LockNotAvailableError as error:
                raise MigrationError(
                    f"a lock was not to be had in {LOCK_TIMEOUT_SECONDS} s: another migration is "
                    "still at work, or a long transaction uses a table; try again once it has ended"
                ) from error
    except asyncpg.PostgresError as error:
        raise MigrationError(f"a migration failed, nothing of it was applied: {error}") from error
    finally:
        connection.terminate()


async def _connect(database_url: str) -> "asyncpg.Connection[asyncpg.Record]":
    """Connect, waiting for a database that is still starting."""
    loop, hosts = asyncio.get_running_loop(), Hosts(database_url)
    give_up = loop.time() + START_TIMEOUT_SECONDS
    while True:
        try:
            connection = await hosts.connect(
                timeout=CONNECT_TIMEOUT_SECONDS,
                command_timeout=STATEMENT_TIMEOUT_SECONDS,
                server_settings={
                    "application_name": "latchkey migrate",
                    "lock_timeout": f"{LOCK_TIMEOUT_SECONDS}s",
                },
            )
            break
        except (
            asyncpg.InvalidAuthorizationSpecificationError,  # a wrong password included
            asyncpg.InvalidCatalogNameError,
            asyncpg.ClientConfigurationError,  # the URL
        ) as error:
            raise MigrationError(f"cannot connect to the database: {error}") from error
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            if loop.time() > give_up:
                message = f"cannot connect to the database: {type(error).__name__}: {error}"
                raise MigrationError(message) from error
            await asyncio.sleep(spread(RETRY_SECONDS, random.random()))  # noqa: S311 - a spread
    version = connection.get_server_version().major
    if version < SERVER_VERSION_MIN:
        connection.terminate()
        raise MigrationError(f"Postgres {SERVER_VERSION_MIN} or newer is needed, this is {version}")
    return connection


async def _apply(
    connection: "asyncpg.Connection[asyncpg.Record]", migrations: "Sequence[Migration]"
) -> "list[Migration]":
    # Of the session, so that it spans the transactions; it ends with the connection at the latest.
    await connection.execute("SELECT pg_advisory_lock($1)", ADVISORY_LOCK)
    await connection.execute(
        """
        CREATE TABLE IF NOT EXISTS schema_migration (
            version    integer PRIMARY KEY,
            name       text NOT NULL,
            checksum   text NOT NULL,
            apply_time timestamptz NOT NULL DEFAULT clock_timestamp())
        """
    )
    rows = await connection.fetch("SELECT version, name, checksum FROM schema_migration")
    applied = {row["version"]: row for row in rows}
    if ahead := sorted(set(applied) - {m.version for m in migrations}):
        raise MigrationError(
            f"the database has migration {ahead[-1]}, which this release does not know: "
            "run the release that made it, or a newer one"
        )
    done = []
    for migration in migrations:
        row = applied.get(migration.version)
        if row is None:
            async with connection.transaction():
                await connection.execute(migration.sql)
                await connection.execute(
                    "INSERT INTO schema_migration (version, name, checksum) VALUES ($1, $2, $3)",
                    migration.version,
                    migration.name,
                    migration.checksum,
                )
            done.append(migration)
        elif row["checksum"] != migration.checksum:
            raise MigrationError(
                f"migration {migration.version:04} ({migration.name}) differs from the one that "
                "was applied to this database; migrations never change once released"
            )
    return done

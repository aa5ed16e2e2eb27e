"""Migrations on a real Postgres: once, whole, in order, by one of many, with bounded waits."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres import migrate as migrate_module
from latchkey_service.postgres.embedded_cluster import EmbeddedPostgres
from latchkey_service.postgres.migrate import Migration, MigrationError, bundled, migrate
from structlog.testing import capture_logs

from tests.conftest import with_database
from tests.support import drop_database, session

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

_names = itertools.count(1)
ONE = Migration(1, "one", "CREATE TABLE one (n int); INSERT INTO one VALUES (1);")
TWO = Migration(2, "two", "CREATE TABLE two (n int);")


@pytest.fixture
async def empty_url(postgres_url: str) -> AsyncIterator[str]:
    """An empty database."""
    name = f"migrate_{next(_names)}"
    async with session(postgres_url) as connection:
        await connection.execute(f"CREATE DATABASE {name}")
    yield with_database(postgres_url, name)
    await drop_database(postgres_url, name)


async def tables(url: str) -> set[str]:
    async with session(url) as connection:
        rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    return {row["tablename"] for row in rows}


async def applied(url: str) -> list[int]:
    async with session(url) as connection:
        rows = await connection.fetch("SELECT version FROM schema_migration ORDER BY version")
    return [row["version"] for row in rows]


@pytest.mark.parametrize("round_", range(5))
async def test_servers_that_start_at_once_migrate_once(empty_url: str, round_: int) -> None:
    """Of several servers that start on one fresh database, one applies each file; all succeed."""
    results = await asyncio.gather(*(migrate(empty_url, bundled()) for _ in range(2 + round_)))
    by_version = sorted(itertools.chain(*results), key=lambda migration: migration.version)
    assert by_version == bundled()
    assert await applied(empty_url) == [m.version for m in bundled()]
    assert await migrate(empty_url, bundled()) == []


async def test_only_what_is_missing_is_applied(empty_url: str) -> None:
    """A database that is behind gets the newer ones only, in order."""
    assert await migrate(empty_url, [ONE]) == [ONE]
    assert await migrate(empty_url, [ONE, TWO]) == [TWO]
    assert await applied(empty_url) == [1, 2]


async def test_a_changed_migration_is_refused(empty_url: str) -> None:
    """A file that differs from what was applied is named, and nothing newer is applied."""
    await migrate(empty_url, [ONE])
    changed = Migration(1, "one", ONE.sql + " ")
    with pytest.raises(MigrationError, match=r"0001 \(one\) differs"):
        await migrate(empty_url, [changed, TWO])
    assert "two" not in await tables(empty_url)


async def test_a_database_ahead_is_refused(empty_url: str) -> None:
    """A release older than the database says so, and by which migration."""
    await migrate(empty_url, [ONE, TWO])
    with pytest.raises(MigrationError, match="has migration 2, which this release does not know"):
        await migrate(empty_url, [ONE])


@pytest.mark.parametrize(
    "bad", ["CREATE TABLE bad (n int); SELECT 1 / 0;", "CREATE TABLE bad (n int); nonsense;"]
)
async def test_a_failing_migration_leaves_nothing(empty_url: str, bad: str) -> None:
    """What comes before it stays, of itself there is nothing; mended, it is applied."""
    with pytest.raises(MigrationError, match="was rolled back"):
        await migrate(empty_url, [ONE, Migration(2, "bad", bad)])
    assert await tables(empty_url) == {"schema_migration", "one"}
    assert await applied(empty_url) == [1]
    assert await migrate(empty_url, [ONE, TWO]) == [TWO]


@pytest.mark.parametrize("holds", ["migration", "table"])
async def test_a_wait_for_a_lock_is_bounded(
    empty_url: str, holds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a migration that does not end, or a table that somebody has locked, it gives up in
    bounded time, says that it was a lock, and leaves nothing; then it can be run again."""
    await migrate(empty_url, [ONE])
    monkeypatch.setattr(migrate_module, "LOCK_TIMEOUT_SECONDS", 0.3)
    alter = Migration(2, "alter", "ALTER TABLE one ADD m int;")
    async with session(empty_url) as connection:
        if holds == "migration":
            await connection.execute("SELECT pg_advisory_lock($1)", migrate_module.ADVISORY_LOCK)
        else:
            await connection.execute("BEGIN; LOCK TABLE one")
        start = time.monotonic()
        with pytest.raises(MigrationError, match="lock"):
            await migrate(empty_url, [ONE, alter])
        assert time.monotonic() - start < 10.0
    assert await applied(empty_url) == [1]
    assert await migrate(empty_url, [ONE, alter]) == [alter]


@pytest.mark.parametrize("part", ["password", "user", "database", "nonsense"])
async def test_a_refused_connection_is_told_at_once(
    empty_url: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waiting cannot mend (a wrong password, user, database, or URL) is told without waiting,
    and without the password."""
    monkeypatch.setattr(migrate_module, "START_TIMEOUT_SECONDS", 30.0)
    parts = urlsplit(empty_url)
    netloc, path, query = parts.netloc, parts.path, parts.query
    if part == "password":
        netloc = "latchkey:wrong-pass@"
    elif part == "user":
        netloc = "nobody_at_all:wrong-pass@"
    elif part == "database":
        path = "/no_such_database"
    else:
        query += "&sslmode=wrong-mode"
    url = urlunsplit(parts._replace(netloc=netloc, path=path, query=query))
    start = time.monotonic()
    with pytest.raises(MigrationError) as caught:
        await migrate(url, [ONE])
    assert time.monotonic() - start < 5.0
    assert "wrong-pass" not in str(caught.value)


async def test_a_postgres_that_starts_is_waited_for(scratch: Path) -> None:
    """A database that comes up a moment later is migrated all the same."""
    postgres = EmbeddedPostgres(scratch / "late")
    url = postgres.start()
    postgres.stop()
    waiting = asyncio.create_task(migrate(url, [ONE]))
    try:
        await asyncio.sleep(0.2)
        assert not waiting.done()
        postgres.start()
        assert await waiting == [ONE]
    finally:
        waiting.cancel()
        postgres.stop()


async def test_a_postgres_that_does_not_come_is_given_up(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for a database is bounded. It is told once, when it begins, and its end says what
    was wrong; neither shows the password."""
    monkeypatch.setattr(migrate_module, "START_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(migrate_module, "RETRY_SECONDS", 0.01)
    with capture_logs() as lines, pytest.raises(MigrationError) as caught:
        await migrate(f"postgresql://a:wrong-pass@/b?host={scratch}", [ONE])
    assert "cannot connect to the database" in str(caught.value)
    # Servers that other tests share may have something to say, too.
    (line,) = [line for line in lines if line["event"] == "waiting for the database"]
    assert line["seconds_max"] == 0.3
    assert "FileNotFoundError" in line["error"]
    assert "wrong-pass" not in f"{lines} {caught.value}"


async def test_a_connection_that_breaks_is_told_as_such(empty_url: str) -> None:
    """A backend that is killed in the middle is no fault of the migration, and leaves nothing."""
    slow = Migration(1, "slow", "CREATE TABLE slow (n int); SELECT pg_sleep(20);")
    task = asyncio.create_task(migrate(empty_url, [slow]))
    async with session(empty_url) as connection:
        while not await connection.fetchval(
            "SELECT bool_or(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE application_name = 'latchkey migrate' AND wait_event = 'PgSleep'"
            " AND datname = current_database()"
        ):
            assert not task.done()
            await asyncio.sleep(0.02)
    with pytest.raises((StoreUnavailable, MigrationError)):
        await task
    assert await tables(empty_url) == {"schema_migration"}
    with pytest.raises(asyncpg.UndefinedTableError):
        async with session(empty_url) as connection:
            await connection.execute("TABLE slow")

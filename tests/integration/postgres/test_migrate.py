"""Migrations on a real Postgres: each file is applied once, completely, in order, by one of several
servers, and every wait is bounded."""

import asyncio
import itertools
import time
import unicodedata
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres import migrate as migrate_module
from latchkey_service.postgres.embedded_cluster import EmbeddedPostgres
from latchkey_service.postgres.migrate import Migration, MigrationError, bundled, migrate
from latchkey_service.tokens.names import name_key
from structlog.testing import capture_logs

from tests.helpers.databases import drop_database, session
from tests.helpers.made_cluster import copy_cluster
from tests.helpers.servers import with_database

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
    """If several servers start at once on an empty database, one of them applies each file and all
    succeed."""
    results = await asyncio.gather(*(migrate(empty_url, bundled()) for _ in range(2 + round_)))
    by_version = sorted(itertools.chain(*results), key=lambda migration: migration.version)
    assert by_version == bundled()
    assert await applied(empty_url) == [m.version for m in bundled()]
    assert await migrate(empty_url, bundled()) == []


async def test_only_missing_migrations_are_applied(empty_url: str) -> None:
    """A database that is behind gets only the newer migrations, in order."""
    assert await migrate(empty_url, [ONE]) == [ONE]
    assert await migrate(empty_url, [ONE, TWO]) == [TWO]
    assert await applied(empty_url) == [1, 2]


async def test_a_changed_migration_is_rejected(empty_url: str) -> None:
    """A file that differs from the applied one is named, and no newer file is applied."""
    await migrate(empty_url, [ONE])
    changed = Migration(1, "one", ONE.sql + " ")
    with pytest.raises(MigrationError, match=r"0001 \(one\) differs"):
        await migrate(empty_url, [changed, TWO])
    assert "two" not in await tables(empty_url)


async def test_a_newer_database_is_rejected(empty_url: str) -> None:
    """A release older than the database fails and names the unknown migration."""
    await migrate(empty_url, [ONE, TWO])
    with pytest.raises(MigrationError, match="has migration 2, which this release does not know"):
        await migrate(empty_url, [ONE])


@pytest.mark.parametrize(
    "bad", ["CREATE TABLE bad (n int); SELECT 1 / 0;", "CREATE TABLE bad (n int); nonsense;"]
)
async def test_a_failing_migration_leaves_nothing(empty_url: str, bad: str) -> None:
    """A failed migration is rolled back, earlier ones stay, and the corrected file is applied."""
    with pytest.raises(MigrationError, match="was rolled back"):
        await migrate(empty_url, [ONE, Migration(2, "bad", bad)])
    assert await tables(empty_url) == {"schema_migration", "one"}
    assert await applied(empty_url) == [1]
    assert await migrate(empty_url, [ONE, TWO]) == [TWO]


@pytest.mark.parametrize("holds", ["migration", "table"])
async def test_a_wait_for_a_lock_is_bounded(
    empty_url: str, holds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind another migration that does not end, or a locked table, a migration fails within a
    bound, names the lock as the cause, and changes nothing. It can be run again later."""
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
async def test_a_permanent_failure_is_reported_at_once(
    empty_url: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure that waiting cannot fix (wrong password, user, database or URL) is reported at
    once, without the password."""
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


async def test_a_starting_postgres_is_awaited(scratch: Path) -> None:
    """A database that comes up a moment later is migrated."""
    copy_cluster(scratch / "late")
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


async def test_the_wait_for_postgres_is_bounded(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for a database is bounded. One log line reports its start, and the error reports the
    cause. Neither contains the password."""
    monkeypatch.setattr(migrate_module, "START_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(migrate_module, "RETRY_SECONDS", 0.01)
    with capture_logs() as lines, pytest.raises(MigrationError) as caught:
        await migrate(f"postgresql://a:wrong-pass@/b?host={scratch}", [ONE])
    assert "cannot connect to the database" in str(caught.value)
    # Servers that other tests share may log lines too.
    (line,) = [line for line in lines if line["event"] == "waiting for the database"]
    assert line["seconds_max"] == 0.3
    assert "FileNotFoundError" in line["error"]
    assert "wrong-pass" not in f"{lines} {caught.value}"


async def test_a_lost_connection_rolls_back(empty_url: str) -> None:
    """If the backend is killed in the middle of a migration, the migration fails and leaves nothing
    behind."""
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


async def name_keys(connection: "asyncpg.Connection[asyncpg.Record]") -> dict[str, str]:
    rows = await connection.fetch("SELECT id, name_key FROM token")
    return {row["id"]: row["name_key"] for row in rows}


async def test_names_that_look_the_same(empty_url: str) -> None:
    """The keys of existing names get the form that new names have. If two live tokens then have the
    same, the older one gets it, and both stay. Deleted tokens and ASCII names keep theirs. The key
    of an expired token whose name was taken over keeps its prefix."""
    migrations = bundled()
    earlier = [m for m in migrations if m.name != "names"]
    await migrate(empty_url, earlier)
    # Account, name, and whether it gets the new key.
    rows = [
        ("a", "de\u200bploy", False),
        ("a", "deploy", True),
        ("b", "de\u200bploy", True),
        ("b", "dep\u200bloy", False),
        ("c", "ｆull", True),
        ("c", "𝐃\U000e0041 \u00a0x", True),
        ("c", "\u200b", False),
        ("c", "İstanbul ﬁ Ⅷ ß", True),
        ("d", "漢字", True),
    ]
    insert = """INSERT INTO token (id, account_id, name, name_key, scope, create_time, hint)
                VALUES ($1, $2, $3, $4, 1, now() + $5 * interval '1 second', '')"""
    async with session(empty_url) as connection:
        for number, (account, name, _) in enumerate(rows):
            old = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
            await connection.execute(insert, f"tok_{number}", account, name, old, number)
        await connection.execute(insert, "gone", "e", "x\u200b", "x\u200b", 0)
        freed = "\x01tok_freed\x01"
        await connection.execute(insert, "tok_freed", "f", "y\u200b", freed + "y\u200b", 0)
        await connection.execute("UPDATE token SET delete_time = now() WHERE id = 'gone'")
        before = await name_keys(connection)
    assert (await migrate(empty_url, migrations))[0].name == "names"
    async with session(empty_url) as connection:
        after = await name_keys(connection)
    for number, (_, name, new) in enumerate(rows):
        expected = name_key(name) if new else before[f"tok_{number}"]
        assert after[f"tok_{number}"] == expected, name
    assert after["gone"] == before["gone"]
    assert after["tok_freed"] == freed + "y"


async def test_a_database_with_tokens_is_migrated(empty_url: str) -> None:
    """A database of an earlier release, with tokens and secrets, gets all newer tables and columns,
    in order, and keeps its rows."""
    migrations = bundled()
    await migrate(empty_url, [m for m in migrations if m.version <= 5])
    async with session(empty_url) as connection:
        await connection.execute(
            """
            INSERT INTO pepper (id) VALUES ('p');
            INSERT INTO token (id, account_id, name, name_key, scope, create_time, hint)
            VALUES ('tok_1', 'a', 'N', 'n', 1, now(), 'lk_…abcd');
            INSERT INTO secret (digest, pepper_id, token_id)
            VALUES (decode(repeat('00', 32), 'hex'), 'p', 'tok_1');
            """
        )
    newer = await migrate(empty_url, migrations)
    assert newer == [m for m in migrations if m.version > 5]
    async with session(empty_url) as connection:
        row = await connection.fetchrow(
            """
            SELECT t.name, t.name_key, t.version, t.permissions, t.seal, t.seal_pepper_id,
                   s.ordinal, s.hint, s.seal, (SELECT count(*) FROM token_usage)
              FROM token t JOIN secret s ON s.token_id = t.id
            """
        )
    assert row is not None
    assert tuple(row) == ("N", "n", 0, [], None, None, 0, "lk_…abcd", None, 0)


async def test_the_order_by_last_use_covers_tokens_of_earlier_releases(empty_url: str) -> None:
    """After the migration, each live token has a last use: those from before, with their uses, and
    those that a host of the previous release creates, uses, deletes or removes afterwards."""
    migrations = bundled()
    add = """
        INSERT INTO token (id, account_id, name, name_key, scope, create_time, delete_time, hint)
        SELECT id, 'a', id, id, 1, '2026-01-01Z', CASE WHEN id LIKE 'dead%' THEN now() END, 'h'
          FROM unnest($1::text[]) id
    """
    async with session(empty_url) as connection:
        await migrate(empty_url, [m for m in migrations if m.version < 10])
        await connection.execute(add, ["dead-1", "used", "unused"])
        await connection.execute(
            """
            INSERT INTO token_usage (token_id, hint, caller, first_time, last_time)
            VALUES ('used', '', 'a', '2026-02-01Z', '2026-02-02Z'),
                   ('used', '', 'b', '2026-02-01Z', '2026-02-03Z')
            """
        )
        await migrate(empty_url, migrations)
        await connection.execute(add, ["dead-2", "new-1", "new-2", "new-3"])
        await connection.execute(
            """
            INSERT INTO token_usage (token_id, hint, caller, first_time, last_time)
            VALUES ('unused', '', 'a', '2026-03-01Z', '2026-03-02Z'),
                   ('unused', '', 'b', '2026-03-01Z', '2026-03-03Z'),
                   ('used', '', 'c', '2026-03-01Z', '2026-03-04Z')
                ON CONFLICT (token_id, hint, caller) DO NOTHING
            """
        )
        await connection.execute("UPDATE token SET delete_time = now() WHERE id = 'new-1'")
        await connection.execute("DELETE FROM token WHERE id = 'new-2'")
        await connection.execute("UPDATE token SET delete_time = now() WHERE id = 'dead-1'")
        rows = await connection.fetch(
            "SELECT token_id, account_id, last_used_time::text FROM token_last_use ORDER BY 1"
        )
    assert [tuple(row) for row in rows] == [
        ("new-3", "a", "-infinity"),
        ("unused", "a", "2026-03-03 00:00:00+00"),
        ("used", "a", "2026-02-03 00:00:00+00"),
    ]

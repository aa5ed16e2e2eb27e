"""`latchkey migrate` with the URL of the owner or without effects, and a service that must not
migrate."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest
from latchkey_service.postgres.migrate import Migration, MigrationError, bundled, migrate, pending
from latchkey_service.process import schema_at_start
from latchkey_service.process.schema_at_start import prepare_schema
from latchkey_service.settings.settings import Settings
from structlog.testing import capture_logs

from tests.helpers.databases import session
from tests.helpers.fork_server import Forked
from tests.helpers.postgres_node import Node, Template

COMMAND_SECONDS_MAX = 60.0
OPTIONAL = Migration(
    9_998,
    "early",
    "-- Releases from schema 0001 work with this.\n-- This release works without it too.\n"
    "CREATE TABLE early (n int)",
)
NEEDED = Migration(9_999, "more", "CREATE TABLE more (n int)")


Command = Callable[..., Awaitable[tuple[int, str]]]


@pytest.fixture
def command(forked: Forked, tmp_path: Path) -> Command:
    """Run `migrate` as people do; return its exit code and its output."""

    async def run(*arguments: str, stdin: str = "", **settings: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *forked("latchkey_service", "migrate", *arguments),
            cwd=tmp_path,
            env={**os.environ, **{f"LATCHKEY_{k.upper()}": v for k, v in settings.items()}},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(COMMAND_SECONDS_MAX):
            output, errors = await process.communicate(stdin.encode())
        code = process.returncode
        assert code is not None
        return code, (output if code == 0 else output + errors).decode()

    return run


async def tables(url: str) -> int:
    """Return how many tables the database has."""
    async with session(url) as connection:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
        )
    return count


async def test_the_command_has_a_url_of_its_own(
    node: Node, node_template: Template, tmp_path: Path, command: Command
) -> None:
    """The owner's URL comes from a variable, a file or standard input, beside the URL of the
    service. `--check` and `--dry-run` change nothing, and `--check` has an exit code."""
    await node.execute(f"CREATE ROLE service LOGIN PASSWORD '{node_template.password}'")
    service = {"database_url": node.url_at(node.address, role="service")}
    owner = {**service, "migration_url": node.url}
    code, output = await command("--check", **owner)
    assert code == 1
    assert "missing: migration 0001 (tokens); no earlier release works with it" in output
    code, output = await command("--dry-run", "--grant", "service", **owner)
    assert code == 0
    assert bundled()[0].sql.strip() in output
    # The log goes to standard error.
    assert "fsync is off" not in output
    assert "GRANT USAGE ON SCHEMA public TO service;" in output
    assert await tables(node.url) == 0
    file = tmp_path / "url"
    file.write_text(node.url + "\n")
    code, output = await command("--database-url-file", str(file), "--grant", "service", **service)
    assert code == 0, output
    # The service itself may check: it needs no right to change anything.
    code, output = await command("--check", **service)
    up_to = bundled()[-1].version
    assert code == 0, output
    assert output.endswith(f"all migrations of this release, up to {up_to:04}\n")
    code, output = await command("--database-url-file", "-", stdin=node.url, **service)
    assert code == 0, output
    assert output.endswith("the database has all migrations\n")
    # And it starts, even if it may migrate.
    for migrating in ("on", "off"):
        settings = Settings(
            database_url=service["database_url"], migrate=migrating, data_dir=tmp_path
        )
        await prepare_schema(settings, service["database_url"])


@pytest.mark.parametrize(
    ("arguments", "variable", "problem"),
    [
        (("--database-url-file", "missing"), "", "--database-url-file: cannot read missing"),
        ((), "mysql://u:hunter2@h/d", "LATCHKEY_MIGRATION_URL: must be postgresql://"),
        (("--check", "--grant", "r"), "", "use --dry-run --grant ROLE"),
        (("--check", "--dry-run"), "", "not allowed with argument"),
    ],
)
async def test_wrong_arguments(
    command: Command, arguments: tuple[str, ...], variable: str, problem: str
) -> None:
    """A wrong argument is a usage error, which quotes no URL."""
    code, output = await command(*arguments, migration_url=variable)
    assert code == 2
    assert problem in output
    assert "hunter2" not in output


async def test_an_ordinary_start_takes_no_lock(node: Node) -> None:
    """A service whose database is complete starts while another migration holds the lock."""
    await migrate(node.url, bundled())
    async with node.session() as connection:
        await connection.execute("SELECT pg_advisory_lock($1)", 0x6C61746368)
        assert await migrate(node.url, bundled()) == []


async def test_a_service_that_must_not_migrate(
    node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With LATCHKEY_MIGRATE=off, the owner of the tables changes none. The service starts if it can
    do without the missing migrations, and names the command otherwise.
    """
    settings = Settings(database_url=node.url, migrate="off", data_dir=tmp_path)
    with pytest.raises(MigrationError, match=r"lacks migration 0001 \(tokens\).*latchkey migrate"):
        await prepare_schema(settings, node.url)
    assert await tables(node.url) == 0
    await migrate(node.url, bundled())
    await prepare_schema(settings, node.url)
    monkeypatch.setattr(schema_at_start, "bundled", lambda: [*bundled(), OPTIONAL])
    with capture_logs() as logs:
        await prepare_schema(settings, node.url)
    assert [line["version"] for line in logs if "missing" in line["event"]] == [9_998]
    monkeypatch.setattr(schema_at_start, "bundled", lambda: [*bundled(), OPTIONAL, NEEDED])
    with pytest.raises(MigrationError, match="lacks migration 9999"):
        await prepare_schema(settings, node.url)


async def test_a_database_from_before_the_column(node: Node) -> None:
    """A database whose migrations recorded no oldest release can be migrated, and the new rows
    record it."""
    await migrate(node.url, bundled())
    await node.execute("ALTER TABLE schema_migration DROP COLUMN oldest_release")
    assert await migrate(node.url, bundled()) == []
    assert await migrate(node.url, [*bundled(), OPTIONAL]) == [OPTIONAL]
    assert await pending(node.url, bundled()) == []
    async with node.session() as connection:
        row: asyncpg.Record | None = await connection.fetchrow(
            "SELECT oldest_release FROM schema_migration WHERE version = 9998"
        )
    assert row is not None
    assert row["oldest_release"] == 1

"""`latchkey migrate` and `latchkey audit verify`: commands for the operator of the database."""

import argparse
import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import asyncpg
from pydantic import SecretStr

from latchkey_service.audit.audit_chain import ChainKeys, Head
from latchkey_service.audit.audit_check import Report, check
from latchkey_service.audit.chain_table import ChainReader
from latchkey_service.postgres.embedded_cluster import DataDirInUse, EmbeddedPostgres
from latchkey_service.postgres.embedded_host import EmbeddedError
from latchkey_service.postgres.hosts import CONNECT_ERRORS, Hosts
from latchkey_service.postgres.migrate import (
    MigrationError,
    bundled,
    grant_statements,
    migrate,
    pending,
)
from latchkey_service.postgres.preflight import Workers
from latchkey_service.postgres.schema import Migration, newest
from latchkey_service.postgres.sessions import driver_options
from latchkey_service.settings import database_url, loading, logs
from latchkey_service.settings.settings import PREFIX, Settings
from latchkey_service.tokens import pepper_file
from latchkey_service.tokens.pepper_file import PepperFileError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["audit_command", "migrate_command"]

# Not a setting of the service, which must not have the rights of the owner.
MIGRATION_URL: Final = f"{PREFIX}MIGRATION_URL"
CONNECT_TIMEOUT_SECONDS: Final = 5.0
# A check of a million entries takes about a minute, in many statements.
STATEMENT_TIMEOUT_SECONDS: Final = 600.0
_HEAD: Final = re.compile(r"([0-9]{1,18}):([0-9a-f]{64})")


def migrate_command(arguments: list[str]) -> int:
    """Run `migrate` and return the exit code: 2 for a wrong setting or argument.

    With `--check`, 1 if a migration is missing.
    """
    parser = argparse.ArgumentParser("latchkey migrate", allow_abbrev=False)
    parser.add_argument("--grant", metavar="ROLE", help="the role of the service")
    parser.add_argument("--database-url-file", metavar="FILE", help="file with the owner's URL")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="report what is missing")
    mode.add_argument("--dry-run", action="store_true", help="print the SQL, and change nothing")
    given = parser.parse_args(arguments)
    if given.check and given.grant is not None:
        parser.error("--check does not look at rights; use --dry-run --grant ROLE")
    return _run(_migrate(given))


def audit_command(arguments: list[str]) -> int:
    """Run `audit` and return the exit code: 1 if something is wrong with the audit log."""
    parser = argparse.ArgumentParser("latchkey audit", allow_abbrev=False)
    parser.add_argument("action", choices=["verify"])
    parser.add_argument(
        "--noted", metavar="NUMBER:DIGEST", help="the newest batch at an earlier time"
    )
    noted: str | None = parser.parse_args(arguments).noted
    head = None
    if noted is not None:
        match = _HEAD.fullmatch(noted)
        if match is None:
            return _fail("--noted: give the NUMBER:DIGEST that the log or an earlier check shows")
        head = Head(int(match[1]), bytes.fromhex(match[2]))
    return _run(_verify(head))


def _run(command: Coroutine[Any, Any, int]) -> int:
    try:
        return asyncio.run(command)
    except loading.ConfigError as error:
        return _fail(f"invalid settings:\n{error}")
    except (MigrationError, PepperFileError, EmbeddedError) as error:
        return _fail(str(error), 1)
    except CONNECT_ERRORS as error:
        return _fail(f"the database failed: {type(error).__name__}: {error}", 1)


async def _migrate(given: argparse.Namespace) -> int:
    settings = loading.load()
    # To standard error: the output of --dry-run is SQL.
    logs.configure(logs.format_of(settings.log_format), settings.log_level)
    url = _migration_url(settings, given.database_url_file)
    if url is None:
        return _fail(
            f"set {MIGRATION_URL} or {PREFIX}DATABASE_URL: the embedded database needs no such "
            "command"
        )
    of = (url, bundled(), settings.pooler, Workers(settings.workers, settings.shares_lease))
    if given.check:
        return _report_missing(await pending(*of))
    if given.dry_run:
        for migration in await pending(*of):
            _say(f"-- migration {migration}\n{migration.sql.rstrip()}\n")
        if given.grant is not None:
            _say("-- rights on the tables that exist now")
            for statement in await grant_statements(url, given.grant):
                _say(f"{statement};")
        return 0
    done = await migrate(*of, given.grant)
    for migration in done:
        _say(f"applied migration {migration}")
    if not done:
        _say("the database has all migrations")
    if given.grant is not None:
        _say(f"granted the rights of the service to {given.grant}")
    return 0


def _migration_url(settings: Settings, path: str | None) -> str | None:
    """Return the URL of the owner of the tables. Raises ConfigError.

    A file or a variable, because other users can read the arguments of a process.
    """
    if path is not None:
        name = "--database-url-file"
        try:
            text = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise loading.ConfigError(f"{name}: cannot read {path}: {error}") from None
    elif text := os.environ.get(MIGRATION_URL, ""):
        name = MIGRATION_URL
    else:
        url = settings.database_url
        return None if url is None else url.get_secret_value()
    try:
        return database_url.valid(SecretStr(text.strip())).get_secret_value()
    except ValueError as error:
        raise loading.ConfigError(f"{name}: {error}") from None


def _report_missing(lacking: "Sequence[Migration]") -> int:
    for migration in lacking:
        oldest = migration.oldest_release
        works = (
            "no earlier release works with it"
            if oldest == migration.version
            else f"releases from schema {oldest:04} work with it"
        )
        _say(f"missing: migration {migration}; {works}")
    if lacking:
        return 1
    _say(f"the database has all migrations of this release, up to {newest(bundled()):04}")
    return 0


async def _verify(noted: Head | None) -> int:
    settings = loading.load()
    keys = ChainKeys(pepper_file.load(settings.pepper_path))
    with _database_url(settings) as url:
        async with _snapshot(url) as connection:
            report = await check(ChainReader(connection), keys, datetime.now(UTC), noted)
    _print(report)
    return 1 if report.problems else 0


def _print(report: Report) -> None:
    for problem in report.problems:
        _say(f"WRONG: {problem}")
    if report.start.number:
        _say(f"retention has removed the entries up to batch {report.start.number}")
    _say(
        f"{report.entries} entries in {report.batches} batches"
        + ("" if report.problems else " are intact")
        + (f"; {report.unsealed} are not sealed yet" if report.unsealed else "")
    )
    _say(f"newest batch: {report.head}")


@contextmanager
def _database_url(settings: Settings) -> "Iterator[str]":
    """Yield the URL of the database; start the embedded one meanwhile if it does not run."""
    if settings.database_url is not None:
        yield settings.database_url.get_secret_value()
        return
    postgres = EmbeddedPostgres(settings.data_dir)
    try:
        yield postgres.start()
    except DataDirInUse:
        # The service runs, and its database with it.
        yield postgres.dsn()
    finally:
        postgres.stop()


@asynccontextmanager
async def _snapshot(url: str) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
    """Open a connection on which all reads see the same state."""
    connection = await Hosts(url).connect(
        timeout=CONNECT_TIMEOUT_SECONDS,
        command_timeout=STATEMENT_TIMEOUT_SECONDS,
        server_settings={"application_name": "latchkey audit"},
        **driver_options("transaction"),
    )
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            yield connection
    finally:
        connection.terminate()


def _fail(message: str, code: int = 2) -> int:
    print(f"latchkey: {message}", file=sys.stderr)  # noqa: T201 - output of a command
    return code


def _say(message: str) -> None:
    print(message)  # noqa: T201 - output of a command

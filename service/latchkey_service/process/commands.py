"""`latchkey migrate` and `latchkey audit verify`: commands for the operator of the database."""

import argparse
import asyncio
import re
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from latchkey_service.audit.audit_chain import ChainKeys, Head
from latchkey_service.audit.audit_check import Report, check
from latchkey_service.audit.chain_table import ChainReader
from latchkey_service.postgres.embedded_cluster import DataDirInUse, EmbeddedPostgres
from latchkey_service.postgres.embedded_host import EmbeddedError
from latchkey_service.postgres.hosts import CONNECT_ERRORS, Hosts
from latchkey_service.postgres.migrate import MigrationError, bundled, migrate
from latchkey_service.postgres.sessions import driver_options
from latchkey_service.settings import settings as settings_module
from latchkey_service.settings.settings import PREFIX, Settings
from latchkey_service.tokens import pepper_file
from latchkey_service.tokens.pepper_file import PepperFileError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["audit_command", "migrate_command"]

CONNECT_TIMEOUT_SECONDS: Final = 5.0
# A check of a million entries takes about a minute, in many statements.
STATEMENT_TIMEOUT_SECONDS: Final = 600.0
_HEAD: Final = re.compile(r"([0-9]{1,18}):([0-9a-f]{64})")


def migrate_command(arguments: list[str]) -> int:
    """Run `migrate` and return the exit code: 2 for a wrong setting or argument."""
    parser = argparse.ArgumentParser("latchkey migrate", allow_abbrev=False)
    parser.add_argument("--grant", metavar="ROLE", help="the role of the service")
    role: str | None = parser.parse_args(arguments).grant
    return _run(_migrate(role))


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
    except settings_module.ConfigError as error:
        return _fail(f"invalid settings:\n{error}")
    except (MigrationError, PepperFileError, EmbeddedError) as error:
        return _fail(str(error), 1)
    except CONNECT_ERRORS as error:
        return _fail(f"the database failed: {type(error).__name__}: {error}", 1)


async def _migrate(role: str | None) -> int:
    settings = settings_module.load()
    if settings.database_url is None:
        return _fail(f"set {PREFIX}DATABASE_URL: the embedded database needs no such command")
    url = settings.database_url.get_secret_value()
    done = await migrate(url, bundled(), settings.pooler, settings.workers, role)
    for migration in done:
        _say(f"applied migration {migration.version:04} ({migration.name})")
    if not done:
        _say("the database has all migrations")
    if role is not None:
        _say(f"granted the rights of the service to {role}")
    return 0


async def _verify(noted: Head | None) -> int:
    settings = settings_module.load()
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

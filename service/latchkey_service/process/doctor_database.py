"""Checks of `latchkey doctor` on the database. They read, and change nothing."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import TYPE_CHECKING, Final

import asyncpg

from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres import inspection, migrate, preflight, schema
from latchkey_service.postgres.hosts import CONNECT_ERRORS, Hosts, is_permanent
from latchkey_service.postgres.migrate import SERVER_VERSION_MIN
from latchkey_service.postgres.preflight import Workers
from latchkey_service.postgres.sessions import driver_options, protection
from latchkey_service.process.finding import Finding, failure, ok, split, warning
from latchkey_service.settings import database_url
from latchkey_service.settings.settings import PREFIX, Settings
from latchkey_service.tokens import fleet
from latchkey_service.tokens.token_store import TokenStore

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["database_findings"]

# Time limits for one host and for one statement: short, because a person waits.
CONNECT_SECONDS: Final = 5.0
STATEMENT_SECONDS: Final = 5.0
# Difference between the clocks. Expiry is judged by the clock of each host, so a wrong one lets
# expired tokens live longer. NTP keeps clocks within milliseconds.
CLOCK_WARNING_SECONDS: Final = 1.0
CLOCK_FAILURE_SECONDS: Final = 30.0
_URL: Final = f"{PREFIX}DATABASE_URL"

Clock = Callable[[], datetime]


async def database_findings(
    settings: Settings, url: str, pepper_ids: list[str] | None, clock: Clock
) -> list[Finding]:
    """Check the database at `url`, and the host's peppers against those that it needs."""
    check = "database"
    if problems := database_url.file_problems(url):
        return [failure(check, "; ".join(problems), f"correct {_URL}")]
    found = [
        warning("database TLS", text, f"correct {_URL}") for text in database_url.warnings(url)
    ]
    try:
        hosts = Hosts(url)
    except (OSError, ValueError) as error:
        return [failure(check, f"the TLS files are invalid: {error}", f"correct {_URL}")]
    async with contextlib.AsyncExitStack() as stack:
        attempts = [await _attempt(hosts, host) for host in hosts.names()]
        for attempt in attempts:
            if not isinstance(attempt, Exception):
                stack.callback(attempt.terminate)
        found += _hosts(hosts.names(), attempts)
        primary = next((each for each in attempts if not isinstance(each, Exception)), None)
        if primary is None:
            return found
        for inspect in (_server, _preflight, _pooler, _capacity, _durability, _rights):
            async with _reported(found):
                found += await inspect(primary, settings, hosts)
        async with _reported(found):
            found.append(await _clock(primary, clock))
        async with _reported(found):
            migrations, usable = await _migrations(primary, settings)
            found.append(migrations)
            if usable and pepper_ids is not None:
                found.append(await _peppers(settings, url, pepper_ids))
    return found


@contextlib.asynccontextmanager
async def _reported(found: list[Finding]) -> AsyncIterator[None]:
    """Turn an error of the database into a finding, so that the other checks still run."""
    try:
        yield
    except (*CONNECT_ERRORS, StoreUnavailable) as error:
        text = f"a check failed: {type(error).__name__}: {error}"
        found.append(failure("database", text, "see the other findings, and the log of Postgres"))


async def _attempt(hosts: Hosts, host: str) -> "Connection | Exception":
    try:
        return await hosts.connect_to(
            host,
            timeout=CONNECT_SECONDS,
            command_timeout=STATEMENT_SECONDS,
            server_settings={"application_name": "latchkey doctor"},
            **driver_options("transaction"),
        )
    except CONNECT_ERRORS as error:
        return error


def _hosts(names: list[str], attempts: "list[Connection | Exception]") -> list[Finding]:
    """Report which hosts are primaries, and why the others are not."""
    check = "database"
    primaries = [n for n, a in zip(names, attempts, strict=True) if not isinstance(a, Exception)]
    found = []
    for name, attempt in zip(names, attempts, strict=True):
        where = name or "the database"
        if isinstance(attempt, asyncpg.TargetServerAttributeNotMatched):
            text = f"{where} is a standby"
            if primaries:
                found.append(ok(check, text))
            else:
                found.append(failure(check, text, f"name the primary in {_URL}, or promote it"))
        elif isinstance(attempt, Exception):
            text = f"{where}: {type(attempt).__name__}: {attempt}"
            if is_permanent(attempt):
                text = f"{where}: {migrate.refusal(attempt)}"
            elif type(attempt) is TimeoutError:
                text = f"{where} did not answer within {CONNECT_SECONDS:g} s"
            make = warning if primaries else failure
            found.append(make(check, text, _remedy(attempt)))
    if len(primaries) > 1:
        text = f"several hosts say that they are the primary: {', '.join(primaries)}"
        remedy = "stop the one with the lower timeline, or make it a standby (docs/postgres.md)"
        found.append(failure(check, text, remedy))
    return found


def _remedy(error: Exception) -> str:
    """Return what to do about a failure to connect."""
    if isinstance(error, asyncpg.InvalidCatalogNameError):
        return "create the database: createdb --encoding=UTF8 --template=template0 latchkey"
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return f"correct user and password in {_URL} or its passfile, or allow them in pg_hba.conf"
    if isinstance(error, asyncpg.CannotConnectNowError):
        return "Postgres starts, stops or recovers: try again, and see its log"
    if isinstance(error, asyncpg.TooManyConnectionsError):
        return "raise max_connections, or close connections of other programs"
    if isinstance(error, ssl.SSLError):
        return f"correct sslmode and sslrootcert in {_URL}, or the server's certificate"
    if is_permanent(error):
        return f"correct {_URL}"
    return f"start Postgres, or correct host and port in {_URL}; then look at firewalls"


async def _server(connection: "Connection", _: Settings, hosts: Hosts) -> list[Finding]:
    server = await inspection.server_of(connection)
    where = hosts.name_of(connection) or "the database"
    major = connection.get_server_version().major
    if major < SERVER_VERSION_MIN:
        text = f"{where} is Postgres {server.version}; {SERVER_VERSION_MIN} or later is required"
        found = [failure("database", text, "upgrade it (pg_upgrade)")]
    else:
        text = (
            f"{where} is the primary: Postgres {server.version}, timeline {server.timeline}, role "
            f"{server.role}, database {server.database}"
        )
        found = [ok("database", text)]
    tls, local = protection(connection)
    if tls is not None:
        found.append(ok("database TLS", f"the connection uses {tls}"))
    elif local:
        found.append(ok("database TLS", "the connection does not leave this machine"))
    else:
        text = "the connection is not encrypted: the network can read and change everything"
        remedy = f"add sslmode=verify-full and sslrootcert to {_URL}"
        found.append(warning("database TLS", text, remedy))
    if server.standbys_missing:
        text = "commits wait for a synchronous standby, and none is connected"
        remedy = "start the standby, or change synchronous_standby_names"
        found.append(failure("durability", text, remedy))
    used = f"{server.connections} of {server.connections_max} connections are in use"
    return [*found, ok("connections", used)]


async def _preflight(connection: "Connection", _: Settings, __: Hosts) -> list[Finding]:
    try:
        await preflight.check_database(connection)
    except preflight.DatabaseError as error:
        return _of(error, "database")
    return [ok("database", "encoding, schema and mode are correct")]


async def _pooler(connection: "Connection", settings: Settings, hosts: Hosts) -> list[Finding]:
    check = "pooler"
    shared = settings.pooler == "transaction"
    try:
        with preflight.needs_transactions():
            if shared:
                # A separate connection, because a pooler in statement mode closes it.
                trial = await _again(hosts, connection)
                try:
                    await trial.execute("BEGIN")
                finally:
                    trial.terminate()
            else:
                await preflight.check_pooler(connection, lambda: _again(hosts, connection))
    except preflight.DatabaseError as error:
        return _of(error, check)
    if shared:
        missing, statements = await preflight.unbounded_settings(connection)
        if missing:
            return [warning(check, f"the role lacks {', '.join(missing)}", statements)]
        return [ok(check, "LATCHKEY_POOLER=transaction, and the role has the time-outs")]
    return [ok(check, "each connection has its own session")]


async def _again(hosts: Hosts, connection: "Connection") -> "Connection":
    attempt = await _attempt(hosts, hosts.name_of(connection))
    if isinstance(attempt, Exception):
        raise attempt
    return attempt


async def _capacity(connection: "Connection", settings: Settings, _: Hosts) -> list[Finding]:
    if settings.pooler == "transaction":
        return []
    try:
        workers = Workers(settings.workers, settings.shares_lease)
        sentence = await preflight.few_connections(connection, workers)
    except preflight.DatabaseError as error:
        return _of(error, "connections")
    return [] if sentence is None else [split(warning, "connections", sentence)]


async def _durability(connection: "Connection", _: Settings, __: Hosts) -> list[Finding]:
    remedy = "turn it on in postgresql.conf, and reload Postgres"
    unsafe = await preflight.lost_writes(connection)
    if not unsafe:
        return [ok("durability", "fsync and full_page_writes are on")]
    return [warning("durability", text, remedy) for text in unsafe]


async def _rights(connection: "Connection", settings: Settings, _: Hosts) -> list[Finding]:
    check = "privileges"
    rights = await inspection.rights_of(connection)
    if rights.missing:
        remedy = "run 'latchkey migrate --grant ROLE' as the owner of the tables"
        return [failure(check, f"the role lacks {'; '.join(rights.missing)}", remedy)]
    if settings.database_url is None:
        return [ok(check, "the embedded database belongs to the service")]
    if rights.superuser or rights.owner:
        who = "a superuser" if rights.superuser else "the owner of the tables"
        text = f"the role is {who}, and can change the audit log"
        remedy = "in production, use two roles (docs/postgres.md)"
        return [warning(check, text, remedy)]
    return [
        ok(check, "the role has the rights that the service needs, and does not own the tables")
    ]


async def _clock(connection: "Connection", clock: Clock) -> Finding:
    """Compare the clocks of this host and of the database."""
    check = "clock"
    before, began = clock(), time.monotonic()
    theirs = await inspection.clock_of(connection)
    trip = time.monotonic() - began
    # The server read its clock at some moment of the round trip.
    ahead = (before - theirs).total_seconds() + trip / 2
    off = max(0.0, abs(ahead) - trip / 2)
    way = "ahead of" if ahead > 0 else "behind"
    text = f"this host's clock is {off:.1f} s {way} the database's"
    remedy = "synchronise both clocks with NTP (chronyc tracking)"
    if off >= CLOCK_FAILURE_SECONDS:
        return failure(check, text, remedy)
    if off >= CLOCK_WARNING_SECONDS:
        return warning(check, text, remedy)
    return ok(check, f"the clocks of this host and the database agree within {off + trip:.1g} s")


async def _migrations(connection: "Connection", settings: Settings) -> tuple[Finding, bool]:
    """Check the schema. Return whether this release works with it, too."""
    check = "migrations"
    own = schema.bundled()
    number = f"{schema.newest(own):04}"
    applied = await migrate.applied(connection)
    try:
        lacking = schema.missing(own, applied)
    except schema.MigrationError as error:
        return split(failure, check, str(error)), False
    if not lacking:
        newest = max((row.version for row in applied), default=0)
        return ok(check, f"the database has schema {newest:04}, and this release {number}"), True
    text = f"the database lacks {len(lacking)} migrations, from {lacking[0]}, to schema {number}"
    usable = not any(migration.needed for migration in lacking)
    if settings.migrate == "on":
        return warning(check, text, "the service applies them when it starts, if it may"), usable
    make = warning if usable else failure
    return make(check, text, "run 'latchkey migrate' as the owner of the tables"), usable


async def _peppers(settings: Settings, url: str, own_ids: list[str]) -> Finding:
    """Compare the host's peppers with those that live tokens need."""
    check = "peppers"
    # As through a pooler, which would lend settings of this session to others.
    store = await TokenStore.open(url, "transaction")
    try:
        async with asyncio.timeout(STATEMENT_SECONDS):
            known = await store.known_peppers()
    finally:
        await store.close()
    generated = settings.pepper_file is None and settings.database_url is not None
    reason = fleet.refusal(
        settings.pepper_path, own_ids, known, generated=generated, new=not own_ids
    )
    if reason is not None:
        return split(failure, check, reason)
    return ok(check, "this host has the peppers that live tokens need")


def _of(error: preflight.DatabaseError, check: str) -> list[Finding]:
    return [split(failure, check, str(error))]

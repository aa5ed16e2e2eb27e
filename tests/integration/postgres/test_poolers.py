"""Latchkey behind a real PgBouncer, in each of its modes."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import grpc
import pytest
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.coherence.notify_listener import Notifications, NotifyListener
from latchkey_service.coherence.verifier_table import VerifierTable
from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres import embedded_cluster
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.postgres.embedded_cluster import EmbeddedPostgres
from latchkey_service.postgres.migrate import MigrationError, bundled, migrate
from latchkey_service.postgres.sessions import GENERIC_PLAN, SETTINGS

from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.databases import drop_database, session
from tests.helpers.made_cluster import copy_cluster
from tests.helpers.pgbouncer import PgBouncer
from tests.helpers.programs import INSTALLS
from tests.helpers.servers import with_database
from tests.helpers.service_process import Service
from tests.helpers.waiting import eventually

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

# What users configure for programs that set time-outs by start-up parameters.
IGNORED = "extra_float_digits,lock_timeout,statement_timeout,options"
LEASE_SECONDS = 3.0
# A start that fails does not wait for anything.
AT_ONCE_SECONDS = 10.0
_names = itertools.count(1)

Start = Callable[..., Awaitable[PgBouncer]]
Run = Callable[..., Service]


@pytest.fixture
async def pgbouncer(scratch: Path, database_url: str) -> AsyncIterator[Start]:
    """Start PgBouncers in front of a fresh database; the fixture stops them."""
    started: list[PgBouncer] = []

    async def start(mode: str, **settings: object) -> PgBouncer:
        folder = scratch / f"pgbouncer-{next(_names)}"
        started.append(PgBouncer(folder, database_url, pool_mode=mode, **settings))
        await started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.fixture
def run(tmp_path: Path, pepper_file: Path) -> Iterator[Run]:
    """Start services as users do; the fixture stops them."""
    started: list[Service] = []

    def run(url: str, **settings: object) -> Service:
        defaults = {
            "listen": "127.0.0.1:0",
            "database_url": url,
            "data_dir": tmp_path / "data",
            "pepper_file": pepper_file,
            "lease_seconds": LEASE_SECONDS,
            "log_format": "json",
        }
        started.append(Service(tmp_path / f"service {len(started)}", **defaults | settings))
        return started[-1]

    yield run
    for service in started:
        service.clean_up()


class Asker:
    """Sends calls to one service."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.tokens: Any = pb_grpc.TokenServiceStub(self.channel)
        self.status: Any = status_pb_grpc.StatusServiceStub(self.channel)

    async def verdict(self, secret: str) -> str:
        answer = await self.tokens.Verify(pb.VerifyRequest(secret=secret), timeout=5)
        return pb.Verdict.Name(answer.verdict).removeprefix("VERDICT_")

    async def create(self, name: str) -> Any:
        request = pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ)
        return await self.tokens.Create(request, timeout=5)

    async def delete(self, token: pb.Token) -> Any:
        request = pb.DeleteRequest(account_id="acme", id=token.id)
        return (await self.tokens.Delete(request, timeout=15)).receipt

    async def notifications(self) -> list[int]:
        answer = await self.status.GetStatus(status_pb.GetStatusRequest(), timeout=5)
        return [verifier.notifications for verifier in answer.verifiers]


async def use(*services: Service) -> list[Asker]:
    """Create, verify and delete tokens on services that share a database. Leaves the connections
    open."""
    askers = [Asker(await service.welcome()) for service in services]

    async def registered() -> bool:
        return len(await askers[0].notifications()) == len(services)

    await eventually(registered, "all verifiers have registered")

    async def live_and_die(number: int) -> None:
        asker = askers[number % len(askers)]
        made = await asker.create(f"token {number}")
        for each in askers * 2:
            assert await each.verdict(made.secret) == "VALID"
        receipt = await asker.delete(made.token)
        assert receipt.HasField("effective_time")
        for each in askers * 2:
            assert await each.verdict(made.secret) == "DELETED"

    await asyncio.gather(*(live_and_die(number) for number in range(12)))
    return askers


async def refusal(service: Service) -> str:
    """Return the error of a service that fails to start."""
    began = time.monotonic()
    assert await service.ended() == 1
    assert time.monotonic() - began < AT_ONCE_SECONDS
    assert "Traceback" not in service.err
    return service.err


@pytest.mark.parametrize("ignored", ["", IGNORED], ids=["plain", "ignoring parameters"])
async def test_session_mode_works(pgbouncer: Start, run: Run, ignored: str) -> None:
    """Two services behind PgBouncer in session mode work as they do without it, including
    notifications, whether PgBouncer rejects start-up parameters or ignores them."""
    pooler = await pgbouncer("session", ignore_startup_parameters=ignored)
    askers = await use(run(pooler.url()), run(pooler.url()))

    async def arrive() -> bool:
        return await askers[0].notifications() == [Notifications.ARRIVE] * 2

    await eventually(arrive, "notifications arrive")
    for asker in askers:
        await asker.channel.close()


@pytest.mark.usefixtures("own_timeouts")
@pytest.mark.parametrize("ignored", ["", IGNORED], ids=["plain", "ignoring parameters"])
async def test_session_mode_has_all_settings(pgbouncer: Start, ignored: str) -> None:
    """Each connection has the same settings as without PgBouncer."""
    pooler = await pgbouncer("session", ignore_startup_parameters=ignored)
    connector = Connector(pooler.url())
    for connection, wanted in (
        (await connector.connect(), SETTINGS),
        (await connector.connect_with_generic_plans(), {**SETTINGS, **GENERIC_PLAN}),
    ):
        for name, value in wanted.items():
            found = await connection.fetchval("SELECT current_setting($1)", name)
            # 1500ms and 2s: Postgres writes them in the same way.
            assert found == value
        connection.terminate()


async def test_a_start_through_an_exhausted_pool_fails(pgbouncer: Start) -> None:
    """In session mode, a pool that is too small makes the start fail, and the message says what to
    change."""
    pooler = await pgbouncer("session", default_pool_size=1)
    with pytest.raises(MigrationError, match="default_pool_size"):
        await migrate(pooler.url(), bundled())


@pytest.mark.parametrize("round_robin", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 20])
async def test_transaction_mode_is_recognised(
    pgbouncer: Start, size: int, round_robin: int
) -> None:
    """A pooler that shares connections by transaction is recognised, whatever the size of its pool
    and the order in which it uses it, with idle connections or without. The check leaves no state
    in the pooler."""
    pooler = await pgbouncer("transaction", default_pool_size=size, server_round_robin=round_robin)

    async def occupy() -> None:
        connection = await asyncpg.connect(pooler.url(), statement_cache_size=0)
        await connection.execute("SELECT pg_sleep(0.2)")
        await connection.close()

    # Now the pool is full of idle server connections.
    await asyncio.gather(*(occupy() for _ in range(min(size, 6))))
    for _ in range(3):
        with pytest.raises(MigrationError, match="LATCHKEY_POOLER=transaction"):
            await migrate(pooler.url(), bundled())


async def test_transaction_mode_is_recognised_while_others_use_it(pgbouncer: Start) -> None:
    """The same holds for a pool whose connections constantly change hands."""
    pooler = await pgbouncer("transaction", default_pool_size=4)
    busy = True

    async def others() -> None:
        connection = await asyncpg.connect(pooler.url(), statement_cache_size=0)
        while busy:
            await connection.execute("SELECT pg_sleep(0.003)")
        connection.terminate()

    users = [asyncio.create_task(others()) for _ in range(8)]
    try:
        for _ in range(5):
            with pytest.raises(MigrationError, match="LATCHKEY_POOLER=transaction"):
                await migrate(pooler.url(), bundled())
    finally:
        busy = False
        await asyncio.gather(*users)


async def test_transaction_mode_requires_the_setting(pgbouncer: Start, run: Run) -> None:
    """The start fails, and one sentence says what the pooler does and what to set."""
    pooler = await pgbouncer("transaction")
    said = await refusal(run(pooler.url()))
    assert "shares connections by transaction; set LATCHKEY_POOLER=transaction, or switch" in said


@pytest.mark.parametrize("setting", ["none", "transaction"])
async def test_statement_mode_is_rejected(pgbouncer: Start, run: Run, setting: str) -> None:
    """A pooler without transactions is rejected, whatever the setting."""
    pooler = await pgbouncer("statement")
    said = await refusal(run(pooler.url(), pooler=setting))
    assert "allows no transactions" in said


@pytest.mark.parametrize("size", [2, 20])
async def test_transaction_mode_works_with_the_setting(
    pgbouncer: Start, run: Run, size: int, database_url: str
) -> None:
    """Two services share server connections by transaction. They set, prepare and lock nothing
    there, and their status reports that notifications are off."""
    pooler = await pgbouncer("transaction", default_pool_size=size)
    services = [run(pooler.url(), pooler="transaction") for _ in range(2)]
    askers = await use(*services)

    async def off() -> bool:
        return await askers[0].notifications() == [Notifications.OFF] * 2

    await eventually(off, "notifications are off")
    async with session(database_url) as direct:
        # asyncpg itself turns jit off while it reads the types of a statement, and back on
        # another server connection.
        names = {*SETTINGS, *GENERIC_PLAN} - {"jit"}
        plain = {name: await setting(direct, name) for name in names}
        assert (
            await direct.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
        )
        # Other tests listen in other databases of this server.
        listening = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE query LIKE 'LISTEN%' AND datname = current_database()"
        )
        assert await direct.fetchval(listening) == 0
    others = [await asyncpg.connect(pooler.url(), statement_cache_size=0) for _ in range(size)]
    for other in others:
        # One transaction each, so that each uses another server connection.
        await other.execute("BEGIN")
        assert {name: await setting(other, name) for name in plain} == plain
        assert await other.fetchval("SELECT count(*) FROM pg_prepared_statements") <= 1
        other.terminate()
    for asker in askers:
        await asker.channel.close()


async def test_transaction_mode_names_what_the_role_lacks(
    pgbouncer: Start, run: Run, database_url: str
) -> None:
    """A start warns of time-outs that only the role can have in this mode, and names the statements
    that set them. After those statements it does not warn."""
    pooler = await pgbouncer("transaction")

    def warnings(service: Service) -> list[dict[str, Any]]:
        return [line for line in service.log if "role lacks settings" in line["event"]]

    first = run(pooler.url(), pooler="transaction")
    await first.welcome()
    (warning,) = warnings(first)
    assert set(warning["settings"]) == set(SETTINGS)
    await first.end()
    name = urlsplit(database_url).path.removeprefix("/")
    # Only for this database, so that the sessions of other tests keep theirs.
    statements = warning["run"].replace(" SET ", f" IN DATABASE {name} SET ")
    async with session(database_url) as direct:
        await direct.execute(statements)
    again = await pgbouncer("transaction")
    second = run(again.url(), pooler="transaction")
    await second.welcome()
    assert warnings(second) == []


async def test_a_direct_connection_works_with_the_setting(run: Run, database_url: str) -> None:
    """Without a pooler, the setting only costs speed."""
    (asker,) = await use(run(database_url, pooler="transaction"))
    await asker.channel.close()


async def test_migrations_lock_by_transaction(
    pgbouncer: Start, postgres_url: str, database_url: str
) -> None:
    """If several servers start at once through transaction pooling, one applies each file, and no
    lock is left on a server connection."""
    pooler = await pgbouncer("transaction", default_pool_size=3)
    name = f"pooled_{next(_names)}"
    async with session(postgres_url) as direct:
        await direct.execute(f"CREATE DATABASE {name}")
    try:
        url = pooler.url(database=name)
        done = await asyncio.gather(*(migrate(url, bundled(), "transaction") for _ in range(4)))
        applied = sorted(itertools.chain(*done), key=lambda migration: migration.version)
        assert applied == bundled()
        async with session(with_database(database_url, name)) as direct:
            locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
            assert await direct.fetchval(locks) == 0
    finally:
        await drop_database(postgres_url, name)


async def test_a_rejected_parameter_is_reported_at_once(pgbouncer: Start, run: Run) -> None:
    """If PgBouncer rejects a start-up parameter in the URL (08P01), the start does not treat the
    database as unreachable: it fails at once and names PgBouncer's setting for the parameter."""
    pooler = await pgbouncer("session")
    said = await refusal(run(pooler.url("&search_path=public")))
    assert "unsupported startup parameter: search_path" in said
    assert "ignore_startup_parameters" in said
    tolerant = await pgbouncer("session", ignore_startup_parameters="search_path")
    (asker,) = await use(run(tolerant.url("&search_path=public")))
    await asker.channel.close()


async def test_a_wrong_password_is_reported_at_once(pgbouncer: Start, run: Run) -> None:
    """PgBouncer's own errors for wrong logins, which also have SQLSTATE 08P01, are reported at
    once."""
    pooler = await pgbouncer("session")
    before, _, after = pooler.url().partition("@")
    wrong = before.rpartition(":")[0] + ":wrong-pass@" + after
    said = await refusal(run(wrong))
    assert "authentication failed" in said
    assert "wrong-pass" not in said


@pytest.mark.parametrize("size", [1, 20])
async def test_a_swallowed_listen_is_noticed(pgbouncer: Start, size: int) -> None:
    """Within one renewal interval, a verifier notices that no notifications arrive, even if the
    pooler returns a probe to its sender."""
    pooler = await pgbouncer("transaction", default_pool_size=size)
    connector = Connector(pooler.url(), pooler="transaction")
    pool = await Pool.open(connector)
    # Do not measure the pool's first connection.
    async with pool.session() as own:
        await own.execute("SELECT 1")
    notify = VerifierTable(pool).notify
    listener = NotifyListener(
        "test", connector.connect, notify, lambda: None, LEASE_SECONDS / 3, enabled=True
    )
    connection = await listener.connect()
    began = time.monotonic()
    listening = asyncio.create_task(listener.run())
    await eventually(lambda: listener.state is Notifications.SILENT, "the verifier notices")
    assert time.monotonic() - began < LEASE_SECONDS / 3
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    connection.terminate()
    await pool.close()


async def test_a_pooler_that_changes_its_mode_is_an_outage(pgbouncer: Start) -> None:
    """If a prepared statement no longer exists, the call fails as a database error that the caller
    may retry, not as an unknown error."""
    pooler = await pgbouncer("transaction", default_pool_size=2)
    # As if the pooler had been in session mode at the start.
    pool = await Pool.open(Connector(pooler.url()))

    async def ask() -> int:
        async with pool.session() as own:
            return int(await own.fetchval("SELECT 1"))

    assert await ask() == 1
    other = await asyncpg.connect(pooler.url(), statement_cache_size=0)
    # This takes the server connection with the prepared statement, and keeps it.
    await other.execute("BEGIN")
    with pytest.raises(StoreUnavailable):
        await ask()
    # On a new connection, which prepares the statement again.
    assert await ask() == 1
    other.terminate()
    await pool.close()


@INSTALLS
async def test_a_standby_behind_a_pooler_is_not_used(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that has become a standby is not mistaken for a primary, although PgBouncer still
    reports what the server said when PgBouncer first connected."""
    data_dir = scratch / "deposed"
    copy_cluster(data_dir)
    postgres = EmbeddedPostgres(data_dir)
    pooler = PgBouncer(scratch / f"pgbouncer-{next(_names)}", postgres.start(), pool_mode="session")
    await pooler.start()
    try:
        connector = Connector(pooler.url())
        (await connector.connect()).terminate()
        postgres.stop()
        (data_dir / "postgres/standby.signal").touch()
        # A standby is never "ready", which the embedded Postgres must be.
        monkeypatch.setattr(embedded_cluster, "_is_ready", is_up)
        postgres.start()

        async def refused() -> bool:
            try:
                (await connector.connect()).terminate()
            except StoreUnavailable as error:
                return isinstance(error.__cause__, asyncpg.TargetServerAttributeNotMatched)
            raise RuntimeError("a standby was used")

        await eventually(refused, "the standby is recognised")
        plain = await asyncpg.connect(pooler.url())
        assert plain.get_settings().in_hot_standby == "off"
        plain.terminate()
    finally:
        pooler.stop()
        postgres.stop()


def is_up(status: Sequence[str], pid: int) -> bool:
    """Return whether Postgres accepts connections, as a primary or as a standby."""
    return len(status) >= 8 and status[0] == str(pid) and status[7].strip() in ("ready", "standby")


async def setting(connection: "asyncpg.Connection[asyncpg.Record]", name: str) -> str:
    """Return a setting of the session that this query reaches."""
    return str(await connection.fetchval("SELECT current_setting($1)", name))

"""Connections to databases that do not answer, and callers that leave early."""

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import asyncpg
import pytest
from latchkey_service.errors import NotReplicated, StoreUnavailable
from latchkey_service.postgres.connections import (
    Connector,
    Pool,
    require_durable_commit,
)
from latchkey_service.postgres.hosts import Hosts, each_host

from tests.helpers.databases import backends, session
from tests.helpers.fake_connections import replace_connect
from tests.helpers.waiting import eventually


class Made(str):
    """Replaces a connection to the host of this name. A plain str has no weak references."""

    __slots__ = ("__weakref__",)


class Silent:
    """Accepts connections but never answers, like a frozen Postgres."""

    def __init__(self) -> None:
        self.taken = 0
        self.open = 0

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.taken += 1
        self.open += 1
        with contextlib.suppress(OSError):
            while await reader.read(1024):
                pass
        self.open -= 1
        writer.close()


@pytest.fixture
async def silent() -> AsyncIterator[tuple[Silent, str]]:
    """Return a silent server and a URL that leads to it."""
    silent = Silent()
    server = await asyncio.start_server(silent.take, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield silent, f"postgresql://nobody:nothing@127.0.0.1:{port}/none?sslmode=disable"


@pytest.fixture
async def primary(database_url: str) -> AsyncIterator[str]:
    """Return the address of the database over TCP, as HOST:PORT."""
    where = dict(parse_qsl(urlsplit(database_url).query))

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(
            f"{where['host']}/.s.PGSQL.{where.get('port', 5432)}"
        )

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65_536):
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(pump(reader, back), pump(there, writer))

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.usefixtures("own_timeouts")
async def test_a_silent_host_does_not_block_the_primary(
    silent: tuple[Silent, str], primary: str, database_url: str
) -> None:
    """A host that accepts connections but never answers, like a frozen or lost machine, costs the
    first connection one time-out and later ones nothing."""
    frozen, silent_url = silent
    before, own = urlsplit(silent_url).netloc.rpartition("@")[2], urlsplit(database_url)
    user = own.netloc.rpartition("@")[0]
    connector = Connector(f"postgresql://{user}@{before},{primary}{own.path}?sslmode=disable")
    first = await connector.connect()
    assert await first.fetchval("SELECT NOT pg_is_in_recovery()")
    assert frozen.taken == 1
    others = await asyncio.gather(*(connector.connect() for _ in range(3)))
    assert frozen.taken == 1
    for connection in (first, *others):
        connection.terminate()


@pytest.mark.parametrize(
    "failure",
    [
        asyncpg.InvalidCatalogNameError("not restored yet"),
        asyncpg.InvalidPasswordError("no roles yet"),
        asyncpg.TooManyConnectionsError("full"),
        asyncpg.ConnectionDoesNotExistError("no server behind it"),
        asyncpg.TargetServerAttributeNotMatched("a standby"),
        ConnectionRefusedError(),
    ],
    ids=lambda failure: type(failure).__name__,
)
async def test_a_former_primary_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """Whatever error the former primary returns, the other hosts are tried too. If no host is
    the primary, a permanent error is reported in preference to a transient one.
    """
    primary, asked = "h1", list[str]()

    async def connect(url: str, **_: object) -> object:
        host = url.removeprefix("postgresql://").partition("/")[0]
        asked.append(host)
        if host == primary:
            return Made(host)
        raise failure if host == "h1" else asyncpg.CannotConnectNowError("starting")

    replace_connect(monkeypatch, lambda url: "://h" in url, connect)
    hosts: Any = Hosts("postgresql://h2,h1,h3/db")
    assert await hosts.connect() == "h1"
    primary = "h3"
    asked.clear()
    assert await hosts.connect() == "h3"
    assert asked == ["h1", "h2", "h3"]
    assert await hosts.connect() == "h3"
    assert asked[3:] == ["h3"]
    primary = ""
    with pytest.raises(Exception, match=r".*") as caught:
        await hosts.connect()
    passes = not isinstance(failure, asyncpg.InvalidCatalogNameError | asyncpg.InvalidPasswordError)
    assert passes or caught.value is failure


async def test_a_mistake_in_the_url_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the URL is reported after one attempt."""
    asked = 0

    async def connect(*_: object, **__: object) -> None:
        nonlocal asked
        asked += 1
        raise asyncpg.ClientConfigurationError("no such option")

    replace_connect(monkeypatch, lambda url: "://h" in url, connect)
    with pytest.raises(asyncpg.ClientConfigurationError):
        await Hosts("postgresql://h1,h2/db").connect()
    assert asked == 1


def test_each_host_of_a_url() -> None:
    """Each host keeps the whole rest of the URL, whatever characters it contains."""
    assert each_host("postgresql://u:a%2Cb@h1:1,[::1]:2,h3/db?a=b,c") == [
        "postgresql://u:a%2Cb@h1:1/db?a=b,c",
        "postgresql://u:a%2Cb@[::1]:2/db?a=b,c",
        "postgresql://u:a%2Cb@h3/db?a=b,c",
    ]
    for url in ("postgresql:///db?host=/run/a,b", "postgres://h", "postgresql://u,v@h/db"):
        assert each_host(url) == [url]


async def test_a_cancelled_caller_leaves_no_connection(database_url: str) -> None:
    """A caller that is cancelled at any point of an attempt leaves no connection open, and others
    can connect."""
    connector = Connector(database_url)
    randomness = random.Random(1)  # noqa: S311 - repeatable
    kept: list[asyncpg.Connection] = []

    async def leave_early() -> None:
        attempt = asyncio.create_task(connector.connect())
        await asyncio.sleep(randomness.uniform(0.0, 0.02))
        attempt.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            kept.append(await attempt)

    for _ in range(4):
        await asyncio.gather(*(leave_early() for _ in range(5)))

    async def only_the_kept() -> bool:
        return len(await backends(database_url)) == len(kept)

    await eventually(only_the_kept, "the other connections are closed")
    kept.append(await connector.connect())
    for connection in kept:
        await connection.close()


async def test_a_brief_failure_affects_no_later_caller(database_url: str) -> None:
    """If simultaneous attempts fail, later callers wait for the probe and then connect."""
    async with session(database_url) as own:
        connector = Connector(database_url)
        closed = itertools.chain([True] * 3, itertools.repeat(False))
        attempts = 0

        async def attempt(*_: object, **options: object) -> object:
            nonlocal attempts
            attempts += 1
            if next(closed):
                await asyncio.sleep(0.05)
                raise asyncpg.AdminShutdownError("ended while connecting")
            return own

        with pytest.MonkeyPatch.context() as patch:
            replace_connect(patch, lambda url: url == database_url, attempt)
            hurt = [asyncio.create_task(connector.connect()) for _ in range(3)]
            ends = await asyncio.gather(*hurt, return_exceptions=True)
            assert all(isinstance(end, StoreUnavailable) for end in ends)
            later = await asyncio.gather(*(connector.connect() for _ in range(5)))
        assert later == [own] * 5
        assert attempts == 3 + 5


async def test_a_connection_in_use_does_not_outlive_a_move(database_url: str) -> None:
    """A connection that is in use while the lease moves to another server may lead to the old
    server, and so may one whose attempt began before. The pool lends neither again, however
    recently it was used."""
    connector = Connector(database_url)
    pool = await Pool.open(connector)
    async with pool.session() as lent:
        before = await lent.fetchval("SELECT pg_backend_pid()")
        pool.reconnect()
    async with pool.session() as lent:
        after = await lent.fetchval("SELECT pg_backend_pid()")
    async with pool.session() as lent:
        assert await lent.fetchval("SELECT pg_backend_pid()") == after
    assert after != before

    attempt, made = connector.attempt, list[int]()

    async def moved_meanwhile(*arguments: Any) -> "asyncpg.Connection[asyncpg.Record]":
        connection = await attempt(*arguments)
        made.append(await connection.fetchval("SELECT pg_backend_pid()"))
        if len(made) == 1:
            pool.reconnect()
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connector, "attempt", moved_meanwhile)
        pool.reconnect()
        async with pool.session() as lent:
            assert await lent.fetchval("SELECT pg_backend_pid()") == made[-1]
    assert len(made) == 2
    await pool.close()


async def test_a_connection_with_an_unreplicated_commit_is_closed(database_url: str) -> None:
    """Its server may be a deposed primary, so the pool does not lend it again."""
    pool = await Pool.open(Connector(database_url))
    processes = set()

    async def write() -> None:
        async with pool.session() as lent:
            processes.add(await lent.fetchval("SELECT pg_backend_pid()"))
            with require_durable_commit(lent):
                await lent.execute("DO $$ BEGIN RAISE WARNING 'not replicated'; END $$")

    try:
        for _ in range(2):
            with pytest.raises(NotReplicated):
                await write()
        assert len(processes) == 2
    finally:
        await pool.close()

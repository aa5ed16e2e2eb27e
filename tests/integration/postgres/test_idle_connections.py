"""TCP connections to Postgres through a firewall that drops idle connections."""

import asyncio
import contextlib
import math
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres import connections
from latchkey_service.postgres.connections import IDLE_SECONDS, Connector, Pool, answers

from tests.helpers.calls import CHANNEL_OPTIONS, Outcome, outcome
from tests.helpers.service_process import service
from tests.helpers.waiting import WAIT_SECONDS, eventually

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

CREATES = 12
# Those of the lease, health and notifications, and their probes, which use the pool.
USED_ALWAYS = 4
# Slightly longer than a connection may be idle before it is tested.
FORGETS_SECONDS = IDLE_SECONDS + 0.5
# State of a connection and timer of one with keepalive, as in /proc/net/tcp.
ESTABLISHED, KEEPALIVE = "01", "02"


class Firewall:
    """A relay to Postgres. After a connection was idle for too long, or after `forget`, the relay
    drops all data on it without notice to either end."""

    def __init__(self, socket_path: str, forgets_seconds: float) -> None:
        self._socket_path = socket_path
        self._forgets_seconds = forgets_seconds
        self._seen: dict[object, float] = {}
        self.dropped: set[object] = set()
        """Connections that something was dropped of."""

    def forget(self) -> None:
        """Drop all data of the connections that are open now."""
        for connection in self._seen:
            self._seen[connection] = -math.inf

    @property
    def forgotten(self) -> int:
        """Return how many open connections it has dropped."""
        now = time.monotonic()
        return sum(now - seen > self._forgets_seconds for seen in self._seen.values())

    @property
    def known(self) -> int:
        return len(self._seen) - self.forgotten

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = object()
        there, back = await asyncio.open_unix_connection(self._socket_path)
        self._seen[connection] = time.monotonic()

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65_536):
                    now = time.monotonic()
                    if now - self._seen[connection] > self._forgets_seconds:
                        self.dropped.add(connection)
                    else:
                        self._seen[connection] = now
                        sink.write(data)
                        await sink.drain()

        pumps = [asyncio.create_task(pump(reader, back)), asyncio.create_task(pump(there, writer))]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for each in pumps:
            each.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        del self._seen[connection]
        for end in (writer, back):
            end.transport.abort()


@contextlib.asynccontextmanager
async def firewall(url: str, forgets_seconds: float) -> AsyncIterator[tuple[Firewall, str]]:
    """Return a firewall in front of a database, and the URL of the database through it."""
    parts = urlsplit(url)
    where = dict(parse_qsl(parts.query))
    made = Firewall(f"{where['host']}/.s.PGSQL.{where['port']}", forgets_seconds)
    server = await asyncio.start_server(made.carry, "127.0.0.1", 0)
    async with server:
        place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        user = parts.netloc.rpartition("@")[0]
        yield made, f"postgresql://{user}@{place}{parts.path}?sslmode=disable"


def timers(port: int) -> list[str]:
    """Return the kernel's timer of each connection to a port of 127.0.0.1."""
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, _, remote, state, _, timer, *_ = line.split()
        if remote == f"0100007F:{port:04X}" and state == ESTABLISHED:
            found.append(timer.partition(":")[0])
    return found


async def test_keepalive_is_set(database_url: str) -> None:
    """A TCP connection notices a dead peer within two minutes, idle or not."""
    async with firewall(database_url, 3600.0) as (_, url):
        connection = await Connector(url).connect()
        sock: Any = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        if sys.platform == "linux":
            option = {
                name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            }
            assert option["TCP_KEEPIDLE"] == 60
            seconds = option["TCP_KEEPIDLE"] + option["TCP_KEEPINTVL"] * option["TCP_KEEPCNT"]
            assert seconds == 120
            assert option["TCP_USER_TIMEOUT"] == 120_000
        connection.terminate()


async def test_a_unix_socket_is_left_alone(database_url: str) -> None:
    """A UNIX socket has no keepalive options, and connecting through it works."""
    connection = await Connector(database_url).connect()
    assert await connection.fetchval("SELECT 1") == 1
    connection.terminate()


async def test_idle_connections_are_tested_before_use(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a pooled connection does not answer its test, the pool replaces all idle ones: one caller
    waits for that test, and no caller waits for a statement's time-out."""
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(connections, "TRIAL_TIMEOUT_SECONDS", 1.5)
    tests: list[bool] = []

    async def counted(session: Any) -> bool:
        tests.append(await answers(session))
        return tests[-1]

    monkeypatch.setattr(connections, "answers", counted)
    async with firewall(database_url, 3600.0) as (wall, url):
        pool = await Pool.open(Connector(url))

        async def ask() -> int:
            async with pool.session() as own:
                return int(await own.fetchval("SELECT 1 FROM pg_sleep(0.05)"))

        assert await asyncio.gather(*(ask() for _ in range(8))) == [1] * 8
        wall.forget()
        assert await ask() == 1
        # Each gets another connection.
        assert await asyncio.gather(*(ask() for _ in range(8))) == [1] * 8
        # A statement that waited for its time-out would have failed.
        assert tests.count(False) == 1
        await pool.close()


async def test_a_caller_cancelled_during_a_test_leaks_no_connection(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that is cancelled while its connection is being tested returns it to the pool.
    Otherwise the pool would shrink with time."""
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(connections, "TRIAL_TIMEOUT_SECONDS", WAIT_SECONDS)
    monkeypatch.setattr(connections, "POOL_SIZE_MAX", 1)
    async with firewall(database_url, 3600.0) as (wall, url):
        pool = await Pool.open(Connector(url))

        async def ask() -> int:
            async with pool.session() as own:
                return int(await own.fetchval("SELECT 1"))

        for _ in range(3):
            assert await ask() == 1
            wall.forget()
            leaving = asyncio.create_task(ask())
            drops = len(wall.dropped)

            def tried(drops: int = drops) -> bool:
                return len(wall.dropped) > drops

            await eventually(tried, "the connection is tested")
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
        assert await ask() == 1
        await pool.close()


async def test_a_service_survives_a_firewall_that_forgets(
    tmp_path: Path, database_url: str, pepper_file: Path
) -> None:
    """After a firewall has dropped its idle connections without notice, a service answers Creates,
    cold Verifies and Deletes, each on a working connection. All its sockets use keepalive."""
    async with firewall(database_url, FORGETS_SECONDS) as (wall, url):
        with service(
            tmp_path / "service",
            listen="127.0.0.1:0",
            database_url=url,
            pepper_file=pepper_file,
            data_dir=tmp_path / "data",
            log_format="json",
            # Each Verify reads the database.
            cache="off",
        ) as running:
            address = await running.welcome()
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            stub: Any = pb_grpc.TokenServiceStub(channel)
            made: list[pb.CreateResponse] = []

            async def create(name: str) -> Outcome:
                request = pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ)
                end = await outcome(stub.Create(request, timeout=5))
                if end.ok:
                    made.append(end.response)
                return end

            async def delete(token: pb.Token) -> Outcome:
                request = pb.DeleteRequest(account_id="acme", id=token.id)
                return await outcome(stub.Delete(request, timeout=5))

            for round_ in range(2):
                # All at once, so that each uses a separate connection.
                ends = await asyncio.gather(*(create(f"{round_} {n}") for n in range(CREATES)))
                assert [end.code for end in ends] == [grpc.StatusCode.OK] * CREATES
                question = pb.VerifyRequest(secret=made[-1].secret)
                assert (await outcome(stub.Verify(question, timeout=5))).ok
                assert (await delete(made.pop().token)).ok
                if sys.platform == "linux":
                    port = urlsplit(url).port
                    assert port is not None

                    def all_kept_alive(port: int = port) -> bool:
                        found = timers(port)
                        return len(found) > USED_ALWAYS and set(found) == {KEEPALIVE}

                    await eventually(all_kept_alive, "every socket uses keepalive")
                if round_ == 0:
                    await eventually(
                        lambda: wall.forgotten >= 2 and wall.known <= USED_ALWAYS,
                        "the firewall has dropped idle connections",
                    )
            assert wall.dropped
            await channel.close()

"""The return of Postgres under load from two workers: connections, calls and their times.

The service runs in separate processes. The load is an open loop: calls start at a fixed rate,
whether or not earlier ones were answered, as users' calls do.
"""

import asyncio
import datetime
import itertools
import os
import re
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres.circuit_breaker import ATTEMPTS_MAX
from latchkey_service.postgres.connections import POOL_SIZE_MAX
from latchkey_service.tokens import pepper_file as pepper_files

from tests.faults.open_loop import OpenLoop
from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.calls import CHANNEL_OPTIONS, server_only_deadline
from tests.helpers.service_process import Service, service
from tests.helpers.waiting import RESUME_SECONDS, eventually

pytestmark = [
    pytest.mark.slow("loads a service through an outage"),
    # The tests take turns to break one Postgres.
    pytest.mark.xdist_group("recovery"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

WORKERS = 2
# Per worker: the management pool, and one each for Verify, health, the lease, notifications, and
# waiting Deletes.
CONNECTIONS_MAX = POOL_SIZE_MAX + 5
# Connections that a worker may attempt in the second after Postgres' return: those that it needs,
# those that were in progress when Postgres went silent and still wait, and the single attempts
# since, of which there are at most eight a second.
KNOCKS_MAX = CONNECTIONS_MAX + ATTEMPTS_MAX + 8
# Calls per second, of each kind.
RATES = {"remembered": 40, "missing": 40, "List": 20, "Create": 10, "Delete": 10}
# Upper bound for a call during an outage: one wait for a connection and two statements, plus a
# margin. The deadline is later still, so that no call ends because its caller gives up.
ANSWER_SECONDS_MAX = 6.0
DEADLINE_SECONDS = 8.0
# Calls during a known outage are answered at once, so at most so many seconds' worth of calls may
# be in progress then on a busy machine.
UNDER_WAY_SECONDS = 1.0
BEFORE_SECONDS, OUTAGE_SECONDS = 2.0, 4.5
# Measured from Postgres' return: no call fails after the first time, which includes a margin for
# the second worker on a busy machine. The second is how long the test checks this.
SETTLED_SECONDS, AFTER_SECONDS = RESUME_SECONDS + 2.0, 2.0
LEASE_SECONDS = 1.0
# Ratio of the median call times after and before.
SLOWER_MAX = 3
SLACK_SECONDS = 0.2
# How a call is refused. On a slow machine, too many may wait for a slot at once.
REFUSALS = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}


class Asker:
    """Calls a service over connections to each worker."""

    def __init__(self, address: str, pepper_file: Path) -> None:
        self._keyring = pepper_files.load_or_create(pepper_file, create=False)
        self._channels = [
            grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for _ in range(4)
        ]
        self._stubs = itertools.cycle([pb_grpc.TokenServiceStub(c) for c in self._channels])
        self._numbers = itertools.count()
        self.secret = ""

    async def prepare(self) -> None:
        async def created() -> str:
            return str((await self("Create")).secret)

        self.secret = await eventually(created, "a token")
        for _ in self._channels:
            await self("remembered")

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def __call__(self, kind: str) -> Any:
        stub: Any = next(self._stubs)
        within = server_only_deadline(DEADLINE_SECONDS)
        if kind == "remembered":
            answer = await stub.Verify(pb.VerifyRequest(secret=self.secret), **within)
            assert answer.verdict == pb.VERDICT_VALID
            return answer
        if kind == "missing":
            secret = self._keyring.mint("lk", os.urandom).secret.reveal()
            return await stub.Verify(pb.VerifyRequest(secret=secret), **within)
        if kind == "List":
            return await stub.List(pb.ListRequest(account_id="acme", page_size=5), **within)
        if kind == "Create":
            name = f"token {next(self._numbers)}"
            request = pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ)
            return await stub.Create(request, **within)
        try:
            return await stub.Delete(pb.DeleteRequest(account_id="a", id="tok_1"), **within)
        except grpc.aio.AioRpcError as error:
            # Postgres was queried, which is enough here.
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return error
            raise


class Knocks:
    """Start times of connections to Postgres, rejected ones included, from its log."""

    def __init__(self, postgres: BreakablePostgres) -> None:
        self._log = postgres.log_path
        self._offset = self._log.stat().st_size

    def times(self) -> list[float]:
        """Return the times since this object was created, in seconds of Unix time, in order."""
        with self._log.open("rb") as log:
            log.seek(self._offset)
            text = log.read().decode("utf-8", "replace")
        found = re.findall(r"^(\S+ \S+) UTC \[\d+\] LOG:  connection received", text, re.MULTILINE)
        return sorted(
            datetime.datetime.fromisoformat(at).replace(tzinfo=datetime.UTC).timestamp()
            for at in found
        )


@pytest.fixture
def running(tmp_path: Path, database_url: str, pepper_file: Path) -> Iterator[Service]:
    """Two workers on a dedicated database."""
    settings: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "database_url": database_url,
        "data_dir": tmp_path / "unused",
        "pepper_file": pepper_file,
        "workers": WORKERS,
        "lease_seconds": LEASE_SECONDS,
        "grace_seconds": 1,
        "log_format": "json",
    }
    with service(tmp_path / "service", **settings) as running:
        yield running


@pytest.fixture
async def ask(running: Service, pepper_file: Path) -> AsyncIterator[Asker]:
    asker = Asker(await running.welcome(), pepper_file)
    running.favour()
    await asker.prepare()
    yield asker
    await asker.close()


@pytest.fixture
async def knocks(postgres: BreakablePostgres) -> AsyncIterator[Callable[[], Knocks]]:
    """Make Postgres log each connection attempt."""
    postgres.configure("log_connections = on\nlog_timezone = 'UTC'")
    yield lambda: Knocks(postgres)
    postgres.configure("")


@pytest.mark.parametrize("fault", ["stopped", "frozen"])
async def test_recovery_causes_no_stampede(
    fault: str,
    postgres: BreakablePostgres,
    ask: Asker,
    knocks: Callable[[], Knocks],
) -> None:
    """Under an open loop each call during an outage ends in time, and calls do not pile up. On its
    return Postgres receives a bounded number of connections. Calls succeed again in time, none
    fails after that, and they are as fast as before."""
    loop = OpenLoop(ask, RATES)
    async with loop.running():
        await asyncio.sleep(BEFORE_SECONDS)
        broken = time.monotonic()
        knocking = knocks()
        async with postgres.broken_by(fault) as bring_back:
            await asyncio.sleep(OUTAGE_SECONDS)
            under_way = loop.under_way
            returning = time.time()
            bring_back()
            back, back_at = time.monotonic(), time.time()

            async def all_kinds_work() -> bool:
                await asyncio.gather(*(ask(kind) for kind in RATES))
                return True

            await eventually(all_kinds_work, "all calls work", RESUME_SECONDS)
        await asyncio.sleep(back + SETTLED_SECONDS + AFTER_SECONDS - time.monotonic())
    for call in loop.calls:
        told = (call.kind, call.began - broken, call.end.code, call.end.seconds)
        assert call.end.seconds < ANSWER_SECONDS_MAX, told
        assert call.end.ok or (call.end.code in REFUSALS and call.end.retry_info), told
    assert under_way <= sum(RATES.values()) * UNDER_WAY_SECONDS
    met = [at for at in knocking.times() if returning <= at <= back_at + 1.0]
    assert 0 < len(met) <= WORKERS * KNOCKS_MAX, len(met)
    late = [call for call in loop.calls if call.began > back + SETTLED_SECONDS]
    assert [call for call in late if not call.end.ok] == []
    early = [call for call in loop.calls if call.began < broken]
    for kind in RATES:
        before, after = (
            statistics.median(call.end.seconds for call in calls if call.kind == kind)
            for calls in (early, late)
        )
        assert after < SLOWER_MAX * before + SLACK_SECONDS, (kind, before, after)

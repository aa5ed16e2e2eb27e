"""A fleet of client libraries through an outage of Postgres, and through the end of a worker."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import latchkey
import psutil
import pytest

from tests.faults.open_loop import OpenLoop
from tests.support import (
    RESUME_SECONDS,
    BreakablePostgres,
    Service,
    eventually,
    outcome,
    service,
)

pytestmark = [
    # They take turns in breaking one Postgres.
    pytest.mark.xdist_group("faults"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

CLIENTS = 200
LEASE_SECONDS = 1.0
# Long enough that streams without a grant are taken for held up, over and over again.
OUTAGE_SECONDS = 9.0
# All answer from memory again: as soon as the service is back, and a stream's first grant.
WATCHING_SECONDS = RESUME_SECONDS + 3.0
RATES = {"verify": 100}


@pytest.fixture
def running(tmp_path: Path, database_url: str, pepper_file: Path) -> Iterator[Service]:
    """Two workers on a database of their own."""
    settings: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "database_url": database_url,
        "data_dir": tmp_path / "unused",
        "pepper_file": pepper_file,
        "workers": 2,
        "lease_seconds": LEASE_SECONDS,
        "grace_seconds": 1,
        "log_format": "json",
    }
    with service(tmp_path / "service", **settings) as running:
        yield running


class Fleet:
    """Clients that each watch over a connection of their own, and remember a token."""

    def __init__(self, target: str) -> None:
        self._clients = [latchkey.Client(target) for _ in range(CLIENTS)]
        self.verifiers = [latchkey.Verifier(client) for client in self._clients]
        self._turns = itertools.cycle(self.verifiers)
        self.secret = ""

    async def start(self) -> None:
        created = await self._clients[0].create("acme", "fleet", latchkey.Scope.READ)
        self.secret = created.secret.reveal()
        for verifier in self.verifiers:
            await verifier.verify(self.secret)
        await eventually(lambda: self.watching == CLIENTS, "all watch")

    async def close(self) -> None:
        await asyncio.gather(*(verifier.close() for verifier in self.verifiers))
        await asyncio.gather(*(client.close() for client in self._clients))

    @property
    def watching(self) -> int:
        return sum(verifier.stats().watching for verifier in self.verifiers)

    async def ask(self, _kind: str) -> Any:
        """Ask the next verifier."""
        try:
            answer = await next(self._turns).verify(self.secret)
        except latchkey.Unavailable as error:
            # As a call of gRPC would tell it.
            empty = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(error.code, empty, empty, str(error)) from error
        assert answer.allowed
        return answer


@pytest.fixture
async def fleet(running: Service) -> AsyncIterator[Fleet]:
    fleet = Fleet(await running.welcome())
    await fleet.start()
    yield fleet
    await fleet.close()


@pytest.mark.parametrize("fault", ["stopped", "frozen"])
async def test_a_fleet_comes_back_after_an_outage(
    fault: str, postgres: BreakablePostgres, fleet: Fleet
) -> None:
    """After an outage much longer than the lease no verify of two hundred clients fails once the
    service is back, and all of them soon answer from memory again."""
    loop = OpenLoop(fleet.ask, RATES)
    async with loop.running():
        await asyncio.sleep(1.0)
        async with postgres.broken_by(fault) as bring_back:
            await asyncio.sleep(OUTAGE_SECONDS)
            assert fleet.watching == 0
            bring_back()
            back = time.monotonic()
        await eventually(lambda: fleet.watching == CLIENTS, "all watch", WATCHING_SECONDS)
        await asyncio.sleep(max(0.0, back + RESUME_SECONDS + 1.0 - time.monotonic()))
    assert any(not call.end.ok for call in loop.calls)
    late = [call for call in loop.calls if call.began > back + RESUME_SECONDS]
    assert late
    assert [call for call in late if not call.end.ok] == []


async def test_a_fleet_moves_on_when_a_worker_dies(running: Service, fleet: Fleet) -> None:
    """Who watched a worker that is killed watches the other one within the lease or soon after;
    meanwhile verifies are answered."""
    loop = OpenLoop(fleet.ask, RATES)
    async with loop.running():
        await asyncio.sleep(0.5)
        before = [verifier.stats().reconnects for verifier in fleet.verifiers]
        psutil.Process(running.worker_pids[0]).kill()

        def moved() -> bool:
            after = [verifier.stats().reconnects for verifier in fleet.verifiers]
            return fleet.watching == CLIENTS and after != before

        await eventually(moved, "all watch", WATCHING_SECONDS)
    bad = [call for call in loop.calls if not call.end.ok]
    assert bad == []
    assert (await outcome(fleet.ask("verify"))).ok

"""A fleet of client libraries through an outage of Postgres, and through the death of a worker."""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import latchkey
import psutil
import pytest
from latchkey._watch import UNSUPPORTED_RETRY_SECONDS

from tests.faults.open_loop import OpenLoop
from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.calls import outcome
from tests.helpers.service_process import Service, service
from tests.helpers.waiting import RESUME_SECONDS, eventually

pytestmark = [
    pytest.mark.slow("loads a service through an outage"),
    # The tests take turns to break one Postgres.
    pytest.mark.xdist_group("recovery"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

# As many as one process can run beside the service on a busy machine of two cores.
CLIENTS = 60
LEASE_SECONDS = 2.0
# Long enough for a client to give up several streams that bring no grant.
OUTAGE_SECONDS = 10.0
# Time until all answer from their caches again: within one second on an idle machine. Shorter than
# the time that a client needs if it does not notice.
WATCHING_SECONDS = UNSUPPORTED_RETRY_SECONDS / 2 - 5
# Of one verify. Many clients in one process are slow in themselves.
TIMEOUT_SECONDS = 5.0
RATES = {"verify": 100}
# Measured from Postgres' return: no verify fails after this, which includes a margin for a busy
# machine.
SETTLED_SECONDS = RESUME_SECONDS + 2.0


@pytest.fixture
def running(tmp_path: Path, database_url: str, pepper_file: Path) -> Iterator[Service]:
    """Two workers on a dedicated database."""
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
    """Clients that each watch over a separate connection and have cached a token."""

    def __init__(self, target: str) -> None:
        self._clients = [latchkey.Client(target) for _ in range(CLIENTS)]
        self.verifiers = [
            latchkey.Verifier(client, timeout_seconds=TIMEOUT_SECONDS) for client in self._clients
        ]
        self._turns = itertools.cycle(self.verifiers)
        self.secret = ""

    async def start(self) -> None:
        created = await self._clients[0].create("acme", "fleet", latchkey.Scope.READ)
        self.secret = created.secret.reveal()
        for verifier in self.verifiers:
            # On a busy machine, the first connection may take longer than a call waits.
            await eventually(partial(self._verify, verifier), "a first verify")
        await self.all_watch()

    async def close(self) -> None:
        await asyncio.gather(*(verifier.close() for verifier in self.verifiers))
        await asyncio.gather(*(client.close() for client in self._clients))

    @property
    def watching(self) -> int:
        return sum(verifier.stats().watching for verifier in self.verifiers)

    async def all_watch(self) -> None:
        """Wait until each has held a lease, not all at the same time, because some are late on a
        busy machine."""
        waiting = set(self.verifiers)

        def done() -> bool:
            waiting.difference_update([v for v in waiting if v.stats().watching])
            return not waiting

        await eventually(done, "all watch", WATCHING_SECONDS)

    async def ask(self, _kind: str) -> Any:
        """Call the next verifier."""
        return await self._verify(next(self._turns))

    async def _verify(self, verifier: latchkey.Verifier) -> Any:
        try:
            answer = await verifier.verify(self.secret)
        except latchkey.Unavailable as error:
            # In the form of a failed gRPC call.
            empty = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(error.code, empty, empty, str(error)) from error
        assert answer.allowed
        return answer


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Silence the warnings of the clients about streams that the test breaks on purpose."""
    caplog.set_level(logging.ERROR, "latchkey")


@pytest.fixture
async def fleet(running: Service) -> AsyncIterator[Fleet]:
    fleet = Fleet(await running.welcome())
    running.favour()
    await fleet.start()
    yield fleet
    await fleet.close()


@pytest.mark.parametrize("fault", ["stopped", "frozen"])
async def test_a_fleet_comes_back_after_an_outage(
    fault: str, postgres: BreakablePostgres, fleet: Fleet
) -> None:
    """After an outage much longer than the lease, no verify of the clients fails once the
    service is back, and all of them soon answer from their caches again."""
    loop = OpenLoop(fleet.ask, RATES)
    async with loop.running():
        await asyncio.sleep(1.0)
        async with postgres.broken_by(fault) as bring_back:
            await asyncio.sleep(OUTAGE_SECONDS)
            assert fleet.watching == 0
            bring_back()
            back = time.monotonic()
        await fleet.all_watch()
        await asyncio.sleep(max(0.0, back + SETTLED_SECONDS + 2.0 - time.monotonic()))
    assert any(not call.end.ok for call in loop.calls)
    late = [call for call in loop.calls if call.began > back + SETTLED_SECONDS]
    assert late
    assert [call for call in late if not call.end.ok] == []


async def test_a_fleet_moves_on_when_a_worker_dies(running: Service, fleet: Fleet) -> None:
    """Clients of a killed worker watch the other one within the lease or soon after; verifies are
    answered meanwhile."""
    loop = OpenLoop(fleet.ask, RATES)
    async with loop.running():
        await asyncio.sleep(0.5)
        before = [verifier.stats().reconnects for verifier in fleet.verifiers]
        psutil.Process(running.worker_pids[0]).kill()

        def some_move() -> bool:
            return [verifier.stats().reconnects for verifier in fleet.verifiers] != before

        await eventually(some_move, "some have watched it")
        # The leases of clients that have not moved expire.
        await asyncio.sleep(LEASE_SECONDS)
        await fleet.all_watch()
    bad = [call for call in loop.calls if not call.end.ok]
    assert bad == []
    assert (await outcome(fleet.ask("verify"))).ok

"""Workers of many hosts in one process: everything of a worker that answers a deletion.

Each has the service's own lease renewer, listener and row. The siblings of a host talk to their
lead over the host's socket. They have no listener for calls, no tokens in a cache and no health
checks. A script: database, folder of the sockets, first host, hosts, workers of a host, and whether
they share a lease.

It answers a line on standard input once every worker has had a lease, with its counts. When the
input closes, all workers stop.
"""

import asyncio
import contextlib
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import uvloop
from latchkey_coherence.lease import boottime
from latchkey_coherence.verdict_cache import VerdictCache
from latchkey_service.coherence.client_leases import ClientLeases
from latchkey_service.coherence.lease_renewer import LeaseRenewer
from latchkey_service.coherence.notify_listener import NotifyListener
from latchkey_service.coherence.primary import Primary
from latchkey_service.coherence.verifier_state import VerifierState
from latchkey_service.coherence.verifier_table import Identity, VerifierTable
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.process.host_sharing import HostSharing, variables
from latchkey_service.settings import logs
from latchkey_service.settings.settings import Settings

LEASE_SECONDS = Settings.model_fields["lease_seconds"].default
CACHE_ENTRIES = 100
# Few at a time, so that those that have started can renew meanwhile.
AT_ONCE = 10
START_SECONDS_MAX = 60.0
POLL_SECONDS = 0.02


class State(VerifierState[Any]):
    """Counts how often a lease ended before it was renewed."""

    __slots__ = ("lapses",)

    def __init__(self) -> None:
        super().__init__(VerdictCache(CACHE_ENTRIES), ClientLeases(), LEASE_SECONDS)
        self.lapses = 0

    def renew(self, began: float, acknowledged: int, ends: float = float("inf")) -> None:
        """Extend the lease, and count if it had ended."""
        self.lapses += self._lapsed()
        super().renew(began, acknowledged, ends)

    def lose(self) -> None:
        """Give up the lease, and count that."""
        self.lapses += self.lease_ends > 0
        super().lose()

    def count(self) -> int:
        """Return how often a lease has ended until now."""
        return self.lapses + self._lapsed()

    def _lapsed(self) -> bool:
        return 0 < self.lease_ends < boottime()


class Worker:
    """The parts of a worker that keep a lease, put together as in `process/wiring.py`."""

    def __init__(self, number: int, environment: Mapping[str, str], url: str, pool: Pool) -> None:
        identity = Identity(
            f"ver_sim{number:06}", socket.gethostname(), number, "0", LEASE_SECONDS, ()
        )
        self.state = State()
        table = VerifierTable(pool)
        primary = Primary(Connector(url), lambda: None)
        self._listener = listener = NotifyListener(
            identity.id,
            primary.connect,
            table.notify,
            lambda: self.renewer.wake(),  # noqa: PLW0108 - it is created below
            LEASE_SECONDS / 3,
            enabled=True,
        )
        self._host = host = HostSharing(environment, identity, primary, listener)
        rows = host.rows(lambda: self.renewer)
        self.renewer = LeaseRenewer(self.state, identity.id, rows, boottime)
        on_news = host.serve(self.renewer, lambda _: None, lambda: None)
        self.renewer.attach(on_news, lambda: 0, lambda: listener.state)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Return once the worker has a lease. Raises TimeoutError."""
        self._tasks = [asyncio.create_task(p.run()) for p in (self.renewer, self._listener)]
        await self._host.start()
        async with asyncio.timeout(START_SECONDS_MAX):
            while not self.renewer.has_lease():  # noqa: ASYNC110 - nothing tells us
                await asyncio.sleep(POLL_SECONDS)

    async def stop(self) -> None:
        """Remove the row."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.renewer.stop(remove=True)
        await self._host.stop()


def hosts_of(
    url: str, pool: Pool, folder: Path | None, first: int, hosts: int, each: int
) -> Iterator[list[Worker]]:
    """Yield the workers of each host, the lead first."""
    for host in range(first, first + hosts):
        own = None
        if folder is not None:
            own = str(folder / f"{host}")
            Path(own).mkdir()
        yield [Worker(host * each + n, variables(own, n), url, pool) for n in range(each)]


async def main(url: str, folder: Path | None, first: int, hosts: int, each: int) -> None:
    """Run the workers until standard input closes."""
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    # One for all: it only sends the probes of the listeners.
    pool = await Pool.open(Connector(url))
    groups = list(hosts_of(url, pool, folder, first, hosts, each))
    workers = [worker for group in groups for worker in group]
    try:
        for place in range(0, len(groups), AT_ONCE):
            some = groups[place : place + AT_ONCE]
            # Siblings look for their lead for a short time only.
            await asyncio.gather(*(group[0].start() for group in some))
            await asyncio.gather(*(worker.start() for group in some for worker in group[1:]))
        while await lines.readline():
            counts = {
                "leases": sum(worker.renewer.has_lease() for worker in workers),
                "lapses": sum(worker.state.count() for worker in workers),
                "failures": sum(worker.renewer.failures for worker in workers),
                "cpu_seconds": time.process_time(),
            }
            sys.stdout.write(json.dumps(counts) + "\n")
            sys.stdout.flush()
    finally:
        # Siblings first, so that they need not register their own rows.
        for part in (1, 0):
            stopping = [w for group in groups for w in (group[1:] if part else group[:1])]
            await asyncio.gather(*(worker.stop() for worker in stopping))
        await pool.close()


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Standard output is for the counts.
    logs.configure("json", "warning")
    logs.start()
    url, sockets, *numbers = sys.argv[1:]
    uvloop.run(main(url, Path(sockets) if sockets else None, *map(int, numbers)))
    os._exit(0)

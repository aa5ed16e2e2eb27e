"""A run on servers that Patroni manages: switchovers, crashes, and nodes that freeze or are cut
off.
"""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

from tests.history.checker import check
from tests.history.faults import Happened
from tests.history.nodes import NodesCluster, nodes_cluster
from tests.history.outages import Window, outages
from tests.history.patroni import HEALTHY_SECONDS_MAX, HOST, SUCCESSOR_SECONDS_MAX, Patroni
from tests.history.records import now
from tests.history.run import (
    OVERTIME_SECONDS,
    Outcome,
    Size,
    host_names,
    quiet_seconds,
    start,
    strange,
    work,
)

__all__ = ["NODES", "PATRONI_SIZE", "run_patroni"]

# The service's default lease, so that users see the same times without answers.
PATRONI_SIZE = Size(seconds=600.0, hosts=(2, None, None), clients=8, deleters=5, lease_seconds=3.0)
NODES = 3
CALM_SECONDS = (6.0, 10.0)
# A frozen node stays frozen until it has been replaced, and then continues unchanged.
AWAY_SECONDS = 3.0
# Approximate length of a fault. No fault begins that could not end in time.
FAULT_SECONDS = 45.0
RECOVERY_LEASES = 2.0


class _Faults:
    """Applies one fault after another to Patroni's servers."""

    def __init__(self, made: NodesCluster, servers: Patroni) -> None:
        self.happened: list[Happened] = []
        self._servers = servers
        self._recovery = int(RECOVERY_LEASES * made.lease_seconds * 1e9)
        self._random = random.Random(made.seed)  # noqa: S311 - repeatable

    @property
    def windows(self) -> list[Window]:
        return [Window(f.kind, f.began, f.ended + self._recovery) for f in self.happened]

    async def run(self, seconds: float) -> None:
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "switchover": self._switch_over,
            "primary killed": self._kill,
            "primary's node frozen": self._freeze,
            "primary's node cut off from etcd": self._cut_off,
        }
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        while True:
            for kind, do in kinds.items():
                await asyncio.sleep(self._random.uniform(*CALM_SECONDS))
                if loop.time() + FAULT_SECONDS > ends and self.happened:
                    return
                began = now()
                await do()
                await self._servers.healthy()
                self.happened.append(Happened(kind, began, now()))

    async def _switch_over(self) -> None:
        old = await self._servers.healthy()
        await self._servers.switch_over(old)
        await self._servers.successor(old)

    async def _kill(self) -> None:
        old = await self._servers.healthy()
        old.kill_postgres()
        await self._servers.successor(old)

    async def _freeze(self) -> None:
        old = await self._servers.healthy()
        old.freeze()
        try:
            await self._servers.successor(old)
            await asyncio.sleep(AWAY_SECONDS)
        finally:
            old.thaw()

    async def _cut_off(self) -> None:
        old = await self._servers.healthy()
        async with self._servers.cut_off(old):
            await self._servers.successor(old)
            await asyncio.sleep(AWAY_SECONDS)


async def run_patroni(
    folder: Path, servers: Patroni, size: Size, rule_to_break: str | None = None
) -> Outcome:
    """Run, and return the outcome."""
    leader = await servers.healthy()
    overtime = OVERTIME_SECONDS + HEALTHY_SECONDS_MAX + SUCCESSOR_SECONDS_MAX
    async with (
        asyncio.timeout(size.seconds + overtime),
        nodes_cluster(
            folder,
            servers.url("latchkey", leader),
            {node.name: (HOST, node.port) for node in servers.nodes},
            lease_seconds=size.lease_seconds,
            seed=size.seed,
        ) as made,
    ):
        names = host_names(size)
        made.ways |= {name: "reversed" if n % 2 else "list" for n, name in enumerate(names)}
        await start(made, size, rule_to_break)
        faults = _Faults(made, servers)
        seconds = size.seconds - 2 * quiet_seconds(size)
        await work(made, size, lambda: faults.run(seconds))
        (folder / "faults.json").write_text(json.dumps([asdict(f) for f in faults.happened]))
        histories = made.histories()
        return Outcome(
            size,
            check(histories),
            faults.happened,
            [],
            made.troubles(),
            strange(made),
            outages(histories, faults.windows),
        )

"""A run with failovers: as `run.py` has it, on a pair of database servers."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

from tests.history.checker import check
from tests.history.episodes import Failovers
from tests.history.nodes import WAYS, nodes_cluster
from tests.history.outages import outages
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
from tests.pair import Pair

__all__ = ["FAILOVER_SIZE", "run_failovers"]

# A host for each way to the primary. Fewer clients than a run on one server has: each failover
# makes a database server from a copy, on the same cores.
FAILOVER_SIZE = Size(hosts=(2, None, None), clients=8, deleters=5, lease_seconds=1.0)


async def run_failovers(
    folder: Path, pair: Pair, size: Size, rule_to_break: str | None = None
) -> Outcome:
    """Run, and return what came of it. The pair is healthy before and after."""
    async with (
        asyncio.timeout(size.seconds + OVERTIME_SECONDS),
        nodes_cluster(
            folder,
            pair.first.url,
            {node.name: ("127.0.0.1", node.port) for node in (pair.first, pair.second)},
            lease_seconds=size.lease_seconds,
            seed=size.seed,
        ) as made,
    ):
        made.ways |= {name: WAYS[n % len(WAYS)] for n, name in enumerate(host_names(size))}
        await start(made, size, rule_to_break)
        failovers = Failovers(made, pair)
        seconds = size.seconds - 2 * quiet_seconds(size)
        await work(made, size, lambda: failovers.run(seconds))
        (folder / "faults.json").write_text(json.dumps([asdict(f) for f in failovers.happened]))
        restores = failovers.changeover.restores
        (folder / "restores.json").write_text(json.dumps(restores))
        histories = made.histories()
        return Outcome(
            size,
            check(histories, restores),
            failovers.happened,
            [],
            made.troubles(),
            strange(made),
            outages(histories, failovers.windows),
        )

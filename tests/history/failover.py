"""A run with failovers on a pair of database servers; the directed ones come first."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import asdict
from pathlib import Path

from tests.helpers.replicated_pair import Pair
from tests.history.checker import Findings, check
from tests.history.episodes import Failovers
from tests.history.failover_scenarios import EVERY, MISSED, failover_staged, perform
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

__all__ = ["FAILOVER_SHORT", "FAILOVER_SIZE", "direct_failovers", "run_failovers"]

# One host for each way to reach the primary. Fewer clients than in a run on one server, because
# each failover copies a database server on the same cores. The lease is long enough for a host's
# row to outlive most failovers: without its row, a host starts over.
FAILOVER_SIZE = Size(hosts=(2, None, None), clients=8, deleters=5, lease_seconds=3.0)
FAILOVER_SHORT = Size(
    seconds=20.0, hosts=(None, None, None), clients=3, deleters=3, lease_seconds=0.8, faults_min=1
)
SCENARIOS_SECONDS_MAX = 180.0


async def direct_failovers(
    folder: Path, pair: Pair, rule: str | None
) -> AsyncGenerator[tuple[str, Findings], None]:
    """Play the scenarios one after another, or only those that expose `rule` if it is missing.

    Yields the name of each and all findings so far.
    """
    chosen = EVERY if rule is None else tuple(s for of, s in MISSED.items() if of == rule)
    if not chosen:
        return
    async with (
        asyncio.timeout(SCENARIOS_SECONDS_MAX),
        failover_staged(folder, pair, rule) as stage,
    ):
        for scenario in chosen:
            yield scenario.__name__, await perform(stage, scenario)


async def run_failovers(
    folder: Path, pair: Pair, size: Size, rule_to_break: str | None = None
) -> Outcome:
    """Run, and return the outcome. The pair is healthy before and after the run."""
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
        await work(made, size, lambda: failovers.run(seconds, size.faults_min))
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

"""The simulated workers of `make bench ARGS=--hosts` register, acknowledge and leave like real
ones."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from latchkey_service.coherence.verifier_table import VerifierTable
from latchkey_service.postgres.connections import Connector, Pool

from tests.benchmarks import hosts, processes
from tests.helpers.database_history import advance
from tests.helpers.databases import session
from tests.helpers.waiting import WAIT_SECONDS, eventually


@pytest.mark.parametrize(("mode", "rows"), [("each", 8), ("shared", 2)])
async def test_simulated_workers_confirm_deletions(
    database_url: str, scratch: Path, mode: str, rows: int
) -> None:
    """Two hosts of four workers have a row for each worker, or one for each host. The rows
    acknowledge a deletion for all eight, no lease lapses, and the rows are removed when the workers
    stop."""

    async def found() -> list[tuple[int, int]]:
        async with session(database_url) as connection:
            answer = await connection.fetch(
                "SELECT processes, acknowledged_revision FROM verifier ORDER BY id"
            )
        return [(row[0], row[1]) for row in answer]

    each = hosts.WORKERS if mode == "shared" else 1
    sockets = ""
    if mode == "shared":
        folder = scratch / "hosts"
        folder.mkdir()
        sockets = str(folder)
    arguments = (database_url, sockets, 0, 8 // each, each)
    cores = os.sched_getaffinity(0)
    pool = await Pool.open(Connector(database_url))
    try:
        with processes.child(scratch, "hosts_workers", arguments, cores) as workers:
            workers.tell("")
            counts = json.loads(await asyncio.to_thread(workers.hear, WAIT_SECONDS))
            assert (counts["leases"], counts["lapses"]) == (8, 0)

            async def represented() -> bool:
                return [processes for processes, _ in await found()] == [each] * rows

            await eventually(represented, "each host's row represents its workers")
            position = await advance(database_url, "tok_1")
            await VerifierTable(pool).notify(position.revision)

            async def confirmed() -> bool:
                return {revision for _, revision in await found()} == {position.revision}

            await eventually(confirmed, "all workers have confirmed")
            workers.dismiss()

            async def gone() -> bool:
                return not await found()

            await eventually(gone, "the rows are removed")
    finally:
        await pool.close()

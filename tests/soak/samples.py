"""The resources of a service that are sampled: memory, descriptors, threads, tasks, connections,
rows."""

import asyncio
import contextlib
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import psutil
from latchkey_service.process.periodic import KEPT_SECONDS_MIN, PRUNE_SECONDS

from tests.helpers.databases import session
from tests.helpers.service_process import Service
from tests.soak.slope import Point

__all__ = ["Name", "Samples"]

TABLES = ("token", "secret", "deletion", "invalidation", "verifier", "audit")
# A small table may have this many dead rows.
FEW_ROWS = 1_000


@dataclass(frozen=True, order=True)
class Name:
    """The name of a series: a process or table, and the resource."""

    whose: str
    what: str
    unit: str


class Samples:
    """Series of samples of a running service. `series` contains all samples so far."""

    def __init__(self, service: Service, database_url: str) -> None:
        self.series: dict[Name, list[Point]] = defaultdict(list)
        self.taken: list[float] = []
        """When each sample was complete, in seconds as in `series`."""
        self.cpu_seconds = 0.0
        """Processor time of the service and its Postgres since their start."""
        self._service = service
        self._database_url = database_url
        self._began = time.monotonic()
        self._supervisor = psutil.Process(service.pid)
        self._postmaster = service.postmaster()
        self._workers = {
            pid: f"worker {number}" for number, pid in enumerate(service.worker_pids, 1)
        }

    async def run(self, seconds: float) -> None:
        """Take samples at this interval of seconds. Ends when cancelled."""
        with contextlib.closing(_Log(self._service.err_path)) as self._log:
            async with session(self._database_url) as connection:
                while True:
                    await self._take(connection)
                    self.taken.append(time.monotonic() - self._began)
                    await asyncio.sleep(seconds)

    async def _take(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        """Take one sample of each."""
        cpu = 0.0
        for pid, whose in self._workers.items():
            cpu += self._process(whose, psutil.Process(pid))
        cpu += self._process("supervisor", self._supervisor)
        self.cpu_seconds = cpu + self._postgres()
        for line in self._log.new("counts"):
            self._told(line)
        await self._database(connection)

    def _add(self, whose: str, what: str, unit: str, value: float) -> None:
        self.series[Name(whose, what, unit)].append((time.monotonic() - self._began, value))

    def _process(self, whose: str, process: psutil.Process) -> float:
        memory = process.memory_full_info()
        # Only private memory: memory shared with other processes, such as libraries, varies with
        # them.
        self._add(whose, "memory of its own", "bytes", memory.uss)
        self._add(whose, "resident memory", "resident bytes", memory.rss)
        self._add(whose, "file descriptors", "descriptors", process.num_fds())
        self._add(whose, "threads", "threads", process.num_threads())
        return _cpu(process)

    def _postgres(self) -> float:
        whose = "Postgres"
        own, cpu = 0, _cpu(self._postmaster)
        children = self._postmaster.children()
        for process in (self._postmaster, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = process.memory_info()
                # Excludes the shared buffers, which fill up as data grows: a page that only one
                # process has used so far counts in its USS.
                own += memory.rss - memory.shared
                cpu += _cpu(process)
        self._add(whose, "memory of its own", "database bytes", own)
        self._add(whose, "processes", "processes", len(children))
        with contextlib.suppress(psutil.NoSuchProcess):
            self._add(whose, "file descriptors", "descriptors", self._postmaster.num_fds())
        return cpu

    def _told(self, line: dict[str, Any]) -> None:
        """Record a worker's own summary."""
        whose = self._workers.get(line["pid"])
        if whose is None:
            return
        self._add(whose, "tasks", "tasks", line["tasks"])
        self._add(whose, "watch streams", "streams", line["watch.streams"])
        self._add(whose, "remembered", "entries", line["cache.entries"])
        self._add(whose, "objects", "objects", line["objects"])

    async def _database(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        whose = "database"
        connections = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'latchkey'"
        )
        self._add(whose, "connections", "connections", connections)
        rows = await connection.fetchval("SELECT count(*) FROM verifier")
        self._add(whose, "rows of verifier", "rows", rows)
        # Their number follows the rate of deletions in the last ten minutes.
        rows = await connection.fetchval("SELECT count(*) FROM invalidation")
        self._add(whose, "rows of invalidation", "kept rows", rows)
        overdue = await connection.fetchval(
            "SELECT count(*) FROM invalidation"
            " WHERE create_time < clock_timestamp() - $1::interval",
            timedelta(seconds=KEPT_SECONDS_MIN + 2 * PRUNE_SECONDS),
        )
        self._add(whose, "of these to be gone", "rows", overdue)
        found = await connection.fetch(
            "SELECT relname, n_dead_tup, n_live_tup, pg_total_relation_size(relid) AS size"
            " FROM pg_stat_user_tables WHERE relname = ANY($1)",
            TABLES,
        )
        size = rows = 0
        for row in found:
            dead = row["n_dead_tup"] / (row["n_live_tup"] + row["n_dead_tup"] + FEW_ROWS)
            self._add(whose, f"dead share of {row['relname']}, %", "per cent dead", 100 * dead)
            if row["relname"] in ("token", "audit"):
                self._add(whose, f"rows of {row['relname']}", "kept rows", row["n_live_tup"])
                size += row["size"]
                rows += row["n_live_tup"]
        if rows:
            self._add(whose, "bytes to a kept row", "bytes to a row", size / rows)
        total = await connection.fetchval("SELECT pg_database_size(current_database())")
        self._add(whose, "size", "kept bytes", total)


class _Log:
    """Reads new lines of a JSON log."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._rest = b""

    def close(self) -> None:
        self._file.close()

    def new(self, event: str) -> list[dict[str, Any]]:
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry.get("event") == event:
                    found.append(entry)
        return found


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)

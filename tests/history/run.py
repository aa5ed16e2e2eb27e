"""A run: start all processes, work undisturbed for a while, inject faults, recover, and check
the histories.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.waiting import eventually
from tests.history.checker import Findings, check
from tests.history.cluster import Cluster, cluster
from tests.history.faults import Happened, Injector, Planned, plan
from tests.history.outages import Outage
from tests.history.records import now

__all__ = [
    "SHORT",
    "Outcome",
    "Size",
    "host_names",
    "quiet_seconds",
    "run",
    "start",
    "strange",
    "work",
]

# In addition to the run's duration: for processes that start and end, and for long faults.
OVERTIME_SECONDS = 120.0
# The time until a killed worker has restarted and its old row has expired. Afterwards the system
# counts as healthy.
RECOVERY_LEASES = 2.5


@dataclass(frozen=True)
class Size:
    """The size of a run. Each item of `hosts` is a supervisor's number of workers, or None for a
    worker without a supervisor."""

    seconds: float = 60.0
    hosts: tuple[int | None, ...] = (2, None)
    clients: int = 20
    verifiers_per_client: int = 1
    deleters: int = 5
    lease_seconds: float = 1.0
    seed: int = 1
    faults_min: int = 3
    """Minimum numbers of faults and of kinds of faults."""

    @property
    def workers(self) -> int:
        return sum(1 if workers is None else workers for workers in self.hosts)

    @property
    def verifiers(self) -> int:
        return self.clients * self.verifiers_per_client


# A run for CI: as many kinds of processes and faults, but fewer of each.
SHORT = Size(seconds=10.0, clients=3, verifiers_per_client=2, deleters=3, lease_seconds=0.8)


@dataclass
class Outcome:
    """The outcome of a run."""

    size: Size
    findings: Findings
    faults: list[Happened]
    planned: list[Planned]
    troubles: list[str]
    strange: Counter[str] = field(default_factory=Counter)
    """Errors that no outage explains, by their text."""
    outages: list[Outage] = field(default_factory=list)
    """In a run with failovers: the time without answers around each."""

    @property
    def healthy(self) -> list[float]:
        """Return the durations of Deletes without a nearby fault, in milliseconds, ascending."""
        return self._delays(faulty=False)

    @property
    def faulty(self) -> list[float]:
        """Return the durations of the other Deletes."""
        return self._delays(faulty=True)

    @property
    def remembering(self) -> int:
        """Return how many verifiers answered from their caches."""
        lives: Counter[str] = Counter()
        for who, hits in self.findings.from_memory.items():
            # A killed client continues in another process.
            lives[re.sub(r"\.\d+/", "/", who)] += hits
        return sum(hits > 0 for hits in lives.values())

    def _delays(self, *, faulty: bool) -> list[float]:
        recovery = int(RECOVERY_LEASES * self.size.lease_seconds * 1e9)
        near = [(fault.began, fault.ended + recovery) for fault in self.faults]
        return sorted(
            (record.ended - record.began) / 1e6
            for record in self.findings.deletes
            if any(record.began < to and record.ended > since for since, to in near) is faulty
        )


async def run(
    folder: Path,
    database_url: str,
    postgres: BreakablePostgres | None,
    size: Size,
    rule_to_break: str | None = None,
) -> Outcome:
    """Run, and return the outcome. If `postgres` is given, the run restarts and kills it."""
    async with (
        asyncio.timeout(size.seconds + OVERTIME_SECONDS),
        cluster(folder, database_url, lease_seconds=size.lease_seconds, seed=size.seed) as made,
    ):
        await start(made, size, rule_to_break)
        planned = plan(size.seed, size.seconds - 2 * quiet_seconds(size), size.lease_seconds)
        injector = Injector(made, postgres, rule_to_break)
        await work(made, size, lambda: injector.run(planned))
        troubles = injector.troubles + made.troubles()
        (folder / "faults.json").write_text(json.dumps([asdict(f) for f in injector.happened]))
        findings = check(made.histories())
        return Outcome(size, findings, injector.happened, planned, troubles, strange(made))


def quiet_seconds(size: Size) -> float:
    """Return how long a run works undisturbed at its start and at its end."""
    return min(5.0, size.seconds / 10)


async def work(made: Cluster, size: Size, hurt: Callable[[], Awaitable[object]]) -> None:
    """Create, verify and delete while `hurt` injects faults, then shut down all processes."""
    deleters = made.start_deleters(size.deleters, _connections(made))
    begun = now()
    quiet = quiet_seconds(size)
    await asyncio.sleep(quiet)
    await hurt()
    recovered = begun + int(size.seconds * 1e9)
    await asyncio.sleep(max(quiet, (recovered - now()) / 1e9))
    deleters.ask_to_end()
    await deleters.ended(60.0)
    # Leaves time for verifies of the last tokens.
    await asyncio.sleep(size.lease_seconds)
    await made.stop_clients()
    await asyncio.gather(*(host.end() for host in made.hosts.values()))


def host_names(size: Size) -> list[str]:
    """Return the names of a run's hosts."""
    return [f"host-{chr(ord('a') + number)}" for number in range(len(size.hosts))]


async def start(made: Cluster, size: Size, rule_to_break: str | None) -> None:
    """Start hosts and clients, and wait until all are up."""
    names = host_names(size)
    await asyncio.gather(
        *(
            made.add_host(name, workers=workers, rule_to_break=rule_to_break)
            for name, workers in zip(names, size.hosts, strict=True)
        )
    )
    for number in range(size.clients):
        # Most clients know all hosts, in different orders; some know only one.
        shift = number % len(names)
        known = [*names[shift:], *names[:shift]]
        await made.add_client(
            known if number % 5 else known[:1],
            verifiers=size.verifiers_per_client,
            rule_to_break=rule_to_break,
        )
    files = [made.records / f"{client.name}.0" for client in made.clients]
    # The counts are written before the first token.
    await eventually(
        lambda: all(file.exists() and file.stat().st_size for file in files) or made.troubles(),
        "all clients are up",
        60.0,
    )


def _connections(made: Cluster) -> dict[str, int]:
    # Each connection reaches a random one of the workers that share an address: twice as many
    # connections reach most of them.
    return {name: 1 if h.workers == 1 else 2 * h.workers for name, h in made.hosts.items()}


def strange(made: Cluster) -> Counter[str]:
    """Return the errors in the processes' output that no outage explains, with their counts."""
    found: Counter[str] = Counter()
    for child in made.children():
        for line in child.err.read_text("utf-8", "replace").splitlines():
            if line.startswith("strange: "):
                found[line] += 1
            elif '"lease renewal failed"' in line or "Traceback" in line:
                found[f"{child.name.split('.')[0]}: {line[:300]}"] += 1
    return found

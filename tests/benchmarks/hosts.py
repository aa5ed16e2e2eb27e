"""`make bench ARGS=--hosts`: what hosts cost Postgres, and how their number slows deletions down.

Measures real hosts at rest, and deletions on a real host beside simulated ones (`hosts_workers`).
Each part compares workers that have a lease each with hosts whose workers share one. The cases take
turns in rounds, so that interference on the machine affects all of them. Everything runs on the
same two cores: more workers than these can carry say nothing about larger machines.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.tokens import pepper_file as pepper_files

from tests.benchmarks import processes
from tests.benchmarks.coherence_delete import separate_channels
from tests.benchmarks.coherence_figures import Figure
from tests.benchmarks.processes import Child, Server
from tests.benchmarks.report import Target
from tests.benchmarks.seed import ACCOUNT, seed

__all__ = [
    "CASES",
    "MODES",
    "WORKERS",
    "Case",
    "Samples",
    "figures",
    "lines",
    "measure",
    "rounds_of",
]

# The values of LATCHKEY_HOST_LEASE.
MODES = ("each", "shared")
WORKERS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A number of workers whose confirmation a deletion needs, on hosts of `WORKERS`."""

    mode: str
    verifiers: int

    @property
    def title(self) -> str:
        """Return its name in the table."""
        lease = "a lease each" if self.mode == "each" else "shared leases"
        return f"{self.verifiers:,} workers, {lease}"


EACH_MAX = 400
CASES = tuple(
    Case(mode, verifiers)
    for verifiers in (2, 4, 10, 100, 400, 1_000)
    for mode in MODES
    # Hosts that share have four workers. A thousand workers with a lease each are more than two
    # cores can carry beside Postgres: not all of them get a lease.
    if (verifiers % WORKERS == 0 if mode == "shared" else verifiers <= EACH_MAX)
)
QUICK_CASES = (Case("each", 2), Case("each", 10), Case("shared", 20))
ROUNDS, QUICK_ROUNDS = 3, 1
DELETES, QUICK_DELETES = 20, 8
# The wanted median, and the case in which no lease may lapse.
DELETE_MS_MAX = {400: 100.0}
NO_LAPSES = 1_000
# A deletion on which clients wait is rarely followed by the next one at once.
PAUSE_SECONDS = 0.1
WARM_UP = 3
CASE_SECONDS_MAX = 25.0
CALL_SECONDS_MAX = 20.0
# After half a minute without use, a host closes its connections.
REST_SETTLE_SECONDS, QUICK_REST_SETTLE_SECONDS = 40.0, 6.0
REST_SECONDS, QUICK_REST_SECONDS = 15.0, 4.0
# Workers that have just started test notifications and look for dead rows.
CASE_SETTLE_SECONDS, CASE_REST_SECONDS = 5.0, 4.0
START_SECONDS_MAX = 180.0
POLL_SECONDS = 0.1
# The two processes that simulate, one per core.
PROCESSES = 2
# Two connections for each worker, and some more for the pools of real ones.
CONNECTIONS = 2_100
# By default, and what it reserves for superusers.
DEFAULT_CONNECTIONS, RESERVED_CONNECTIONS = 100, 3
# Rounds that might not end in this time are left out.
SECONDS_MAX = 600.0


@dataclasses.dataclass(slots=True)
class Samples:
    """What was measured of one case, or of one host at rest. A list per round."""

    delete_ms: list[list[float]] = dataclasses.field(default_factory=list)
    statements: list[float] = dataclasses.field(default_factory=list)
    connections: list[float] = dataclasses.field(default_factory=list)
    postgres_ms: list[float] = dataclasses.field(default_factory=list)
    lapses: list[float] = dataclasses.field(default_factory=list)


class Databases:
    """The databases of the cluster, watched from another one so that this costs them nothing."""

    def __init__(self, url: str, urls: Mapping[str, str], run: Callable[[Any], Any]) -> None:
        self._url, self._urls, self._run = url, urls, run

    def url(self, mode: str) -> str:
        """Return the URL of the mode's database."""
        return self._urls[mode]

    def usage(self, mode: str) -> tuple[int, dict[int, float]]:
        """Return the statements so far, and for each connection the CPU seconds of Postgres."""
        transactions, pids = self._run(self._usage(urlsplit(self._urls[mode]).path[1:]))
        return transactions, {pid: processes.cpu_seconds(pid) for pid in pids}

    def rows(self, mode: str) -> int:
        """Return the number of verifiers."""
        return int(self._run(self._count(self._urls[mode])))

    async def _usage(self, name: str) -> tuple[int, list[int]]:
        connection = await asyncpg.connect(self._url)
        try:
            # Each of our statements is a transaction.
            transactions = await connection.fetchval(
                "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1", name
            )
            found = await connection.fetch(
                "SELECT pid FROM pg_stat_activity WHERE datname = $1", name
            )
        finally:
            await connection.close()
        return transactions, [row[0] for row in found]

    async def _count(self, url: str) -> Any:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval("SELECT count(*) FROM verifier")
        finally:
            await connection.close()


def rounds_of(*, quick: bool) -> int:
    """Return the number of rounds by default."""
    return QUICK_ROUNDS if quick else ROUNDS


def measure(
    scratch: Path,
    placing: str,
    run: Callable[[Any], Any],
    *,
    quick: bool,
    rounds: int,
    only: str = "",
) -> list[Figure]:
    """Start Postgres and the hosts, run the rounds, and return the figures. `run` runs a
    coroutine.

    Raises RuntimeError if a deletion has not waited for every worker.
    """
    began = time.monotonic()
    cores = processes.cores(placing)
    both = {cores.server, cores.load, cores.postgres}
    cases = [case for case in (QUICK_CASES if quick else CASES) if only in case.title]
    rest = {mode: Samples() for mode in MODES if only in "at rest"}
    with contextlib.ExitStack() as stack:
        pepper_file = scratch / "peppers"
        keyring = pepper_files.load_or_create(pepper_file, create=True)
        url, _ = stack.enter_context(
            processes.postgres(scratch / "data", both, max_connections=CONNECTIONS)
        )
        names = [*MODES, "two"]
        tokens = (rounds * len(cases) + 1) * (DELETES + WARM_UP)
        seeded = {name: run(seed(url, name, tokens, keyring)) for name in names}
        ids = {name: (token_id for _, token_id in seeded[name].secrets) for name in names}
        databases = Databases(url, {name: seeded[name].url for name in names}, run)

        def serve(name: str, mode: str, workers: int) -> Server:
            settings = {
                "DATABASE_URL": databases.url(name),
                "PEPPER_FILE": str(pepper_file),
                "WORKERS": str(workers),
                "HOST_LEASE": mode,
            }
            return stack.enter_context(processes.latchkey(scratch, name, settings, both))

        servers = {mode: serve(mode, mode, WORKERS) for mode in MODES}
        if any(case.verifiers < WORKERS for case in cases):
            servers["two"] = serve("two", "each", 2)
        samples = {case: Samples() for case in cases}
        longest = 0.0
        for number in range(1, rounds + 1):
            start = time.monotonic()
            if start + longest > began + SECONDS_MAX:
                _say(f"Out of time: {number - 1} rounds")
                break
            if rest:
                # Each round has just deleted tokens on these hosts.
                time.sleep(QUICK_REST_SETTLE_SECONDS if quick else REST_SETTLE_SECONDS)
                _at_rest(databases, rest, QUICK_REST_SECONDS if quick else REST_SECONDS)
            # Forwards and backwards in turn.
            for case in cases if number % 2 else cases[::-1]:
                name = case.mode if case.verifiers >= WORKERS else "two"
                with _simulated(scratch, databases, case, servers[name], name, both) as children:
                    _deletions(
                        *(samples[case], case, databases, servers[name], name, ids[name]),
                        children=children,
                        deletes=QUICK_DELETES if quick else DELETES,
                    )
            longest = max(longest, time.monotonic() - start)
            _say(f"Round {number}: {time.monotonic() - start:.0f} s")
    return list(figures(rest, samples))


def _at_rest(databases: Databases, rest: Mapping[str, Samples], seconds: float) -> None:
    """Count what the hosts that nobody calls ask Postgres. Both at the same time."""
    before = {mode: databases.usage(mode) for mode in rest}
    began = time.monotonic()
    time.sleep(seconds)
    for mode, samples in rest.items():
        _count(samples, before[mode], databases.usage(mode), time.monotonic() - began)


def _count(
    samples: Samples,
    before: tuple[int, dict[int, float]],
    after: tuple[int, dict[int, float]],
    seconds: float,
) -> None:
    samples.statements.append((after[0] - before[0]) / seconds)
    samples.connections.append(float(len(after[1])))
    # A connection that was opened meanwhile has used CPU since then only.
    used = sum(cpu - before[1].get(pid, 0.0) for pid, cpu in after[1].items())
    samples.postgres_ms.append(used / seconds * 1e3)


def _deletions(
    samples: Samples,
    case: Case,
    databases: Databases,
    server: Server,
    name: str,
    ids: Iterator[str],
    *,
    children: Sequence[Child],
    deletes: int,
) -> None:
    """Count the statements of all workers at rest, then delete tokens one after another."""
    time.sleep(CASE_SETTLE_SECONDS)
    lapses = _lapses(children)
    before, began = databases.usage(name), time.monotonic()
    time.sleep(CASE_REST_SECONDS)
    _count(samples, before, databases.usage(name), time.monotonic() - began)
    took: list[float] = []
    with separate_channels(server.address, len(server.workers)) as channels:
        stubs = itertools.cycle([pb_grpc.TokenServiceStub(channel) for channel in channels])
        give_up = time.monotonic() + CASE_SECONDS_MAX
        for number in range(WARM_UP + deletes):
            if time.monotonic() > give_up and took:
                break
            start = time.perf_counter()
            request = pb.DeleteRequest(account_id=ACCOUNT, id=next(ids))
            receipt = next(stubs).Delete(request, timeout=CALL_SECONDS_MAX).receipt
            seconds = time.perf_counter() - start
            waited_for = receipt.verifiers_acknowledged + receipt.verifiers_outwaited
            if waited_for != case.verifiers:
                raise RuntimeError(f"{case.title}: a Delete has waited for {waited_for}")
            if number >= WARM_UP:
                took.append(seconds * 1e3)
            time.sleep(PAUSE_SECONDS)
    samples.delete_ms.append(took)
    samples.lapses.append(float(_lapses(children) - lapses))
    _say(f"{case.title}: {sorted(took)[len(took) // 2]:.0f} ms")


def _lapses(children: Sequence[Child]) -> int:
    """Return how often a lease of a simulated worker has ended before it was renewed."""
    for child in children:
        child.tell("")
    return sum(json.loads(child.hear(START_SECONDS_MAX))["lapses"] for child in children)


@contextlib.contextmanager
def _simulated(
    scratch: Path,
    databases: Databases,
    case: Case,
    server: Server,
    name: str,
    cores: set[int],
) -> Iterator[list[Child]]:
    """Simulate the other workers of the case; yield once all of them have leases."""
    each = WORKERS if case.mode == "shared" else 1
    hosts = (case.verifiers - len(server.workers)) // each
    own = 1 if case.mode == "shared" else len(server.workers)
    _expect_rows(databases, name, own)
    with contextlib.ExitStack() as stack:
        children = []
        for place in range(PROCESSES):
            first, last = (hosts * n // PROCESSES for n in (place, place + 1))
            sockets = ""
            if case.mode == "shared":
                folder = scratch / f"sockets-{place}-{time.monotonic_ns()}"
                folder.mkdir()
                sockets = str(folder)
            if first < last:
                arguments = (databases.url(name), sockets, first, last - first, each)
                children.append(
                    stack.enter_context(processes.child(scratch, "hosts_workers", arguments, cores))
                )
        for child in children:
            child.tell("")
        for child in children:
            child.hear(START_SECONDS_MAX)
        _expect_rows(databases, name, own + hosts)
        yield children
        # All at once, because each one removes its rows.
        for child in children:
            child.dismiss()


def _expect_rows(databases: Databases, name: str, rows: int) -> None:
    """Wait until as many verifiers have rows. Raises RuntimeError."""
    give_up = time.monotonic() + START_SECONDS_MAX
    while (found := databases.rows(name)) != rows:
        if time.monotonic() > give_up:
            raise RuntimeError(f"{found} verifiers are registered instead of {rows}")
        time.sleep(POLL_SECONDS)


def figures(rest: Mapping[str, Samples], samples: Mapping[Case, Samples]) -> Iterator[Figure]:
    """Yield the figures of hosts at rest, and of the cases."""
    cost = "CPU of Postgres"
    for mode, found in rest.items():
        lease = "a lease each" if mode == "each" else "a shared lease"
        name = f"host at rest, {WORKERS} workers with {lease}"
        yield Figure.median(f"{name}: statements", "per s", found.statements)
        yield Figure.median(f"{name}: connections", "", found.connections)
        yield Figure.median(f"{name}: {cost}", "ms per s", found.postgres_ms)
        usable = DEFAULT_CONNECTIONS - RESERVED_CONNECTIONS
        carried = usable // max(1, int(max(found.connections)))
        yield Figure.median(
            f"{name}: hosts by the connections of max_connections = {DEFAULT_CONNECTIONS}",
            "hosts",
            [carried],
        )
    for case, found in samples.items():
        if not found.delete_ms:
            continue
        p50s = [sorted(took)[len(took) // 2] for took in found.delete_ms]
        most = DELETE_MS_MAX.get(case.verifiers)
        yield Figure.median(f"Delete, {case.title}, p50", "ms", p50s, at_most=most)
        together = [ms for took in found.delete_ms for ms in took]
        yield Figure.percentile(f"Delete, {case.title}, p99", "ms", together, 0.99)
        yield Figure.median(f"at rest, {case.title}: statements", "per s", found.statements)
        yield Figure.median(f"at rest, {case.title}: connections", "", found.connections)
        yield Figure.median(f"at rest, {case.title}: {cost}", "ms per s", found.postgres_ms)
        bound = 0.0 if case.verifiers == NO_LAPSES else None
        yield Figure.median(f"leases that lapsed, {case.title}", "", found.lapses, at_most=bound)


def lines(found: Sequence[Figure]) -> Iterator[str]:
    """Yield the lines of the table."""
    form = "{:<78} {:>9} {:>19}  {:<9} {:>7}  {}"
    yield form.format("hosts", "median", "range", "unit", "samples", "wanted")
    for figure in found:
        numbers = (figure.value, figure.low, figure.high)
        value, low, high = (f"{n:,.0f}" if n >= 100 else f"{n:.1f}" for n in numbers)
        row = (figure.name, value, f"{low}–{high}", figure.unit, figure.samples)
        yield form.format(*row, _wanted(figure.target()))
    yield "Medians and ranges of the rounds; p99 of all samples, with the range of their fifths."
    yield "At rest with simulated workers: all of them, and the real host."


def _wanted(target: Target | None) -> str:
    if target is None or target.at_most is None:
        return ""
    return f"≤ {target.at_most:.0f} {'PASS' if target.met else 'MISS'}"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()

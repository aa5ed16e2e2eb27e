"""The faults of a run: planned in advance from a seed, and applied to the processes that exist
at the time.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

import asyncpg
import psutil

from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.databases import session
from tests.history.cluster import LISTEN, LOOKUP, RENEWAL, WATCH, Cluster
from tests.history.processes import Host
from tests.history.proxy import Action, Connection, Direction, Fault, Proxy
from tests.history.records import now

__all__ = ["KINDS", "Happened", "Injector", "Planned", "plan"]

# How often each kind occurs in the deck from which the plan is drawn. Faults that stop all calls
# are rare, because otherwise they would hide the effects of the others.
KINDS = {
    "worker frozen": 4,
    "worker killed": 2,
    "worker restarted": 2,
    "client frozen": 4,
    "client killed": 2,
    "Watch black-holed": 5,
    "LISTEN black-holed": 2,
    "renewal black-holed": 3,
    "database black-holed": 2,
    "look-ups late": 5,
    "answers late": 4,
    "backends terminated": 2,
    "Postgres restarted": 1,
    "Postgres killed": 1,
}
# Mean time between two faults. A fault lasts about as long as two leases, so two or three are
# active at any time.
EVERY_SECONDS = 0.7
# Look-ups wait at most 2 s for the database, verifies of clients 1 s.
LATE_SECONDS_MAX = 0.9
RESTART_SECONDS = 0.3


class Planned(NamedTuple):
    """A planned fault, `at` seconds after the start of the plan."""

    at: float
    kind: str
    seconds: float


@dataclass(frozen=True)
class Happened:
    """A fault that happened. Times in nanoseconds of the records' clock."""

    kind: str
    began: int
    ended: int


def plan(seed: int, seconds: float, lease_seconds: float) -> list[Planned]:
    """Return the faults of a run, in order. All end before the run does, and there is a quiet
    period in the middle.
    """
    randomness = random.Random(seed)  # noqa: S311 - repeatable
    calm = (0.42 * seconds, 0.58 * seconds) if seconds >= 20 else (seconds, seconds)
    deck: list[str] = []
    planned: list[Planned] = []
    at = 0.0
    while True:
        at += randomness.uniform(0.4, 1.6) * EVERY_SECONDS
        lasts = lease_seconds * randomness.uniform(0.4, 2.5)
        if at < calm[1] and at + lasts > calm[0]:
            at = calm[1]
            continue
        if at + lasts > seconds:
            return planned
        if not deck:
            deck = [kind for kind, count in KINDS.items() for _ in range(count)]
            randomness.shuffle(deck)
            # One of each kind first, so that a short run sees most kinds.
            deck.sort(key=_first_of_its_kind(), reverse=True)
        planned.append(Planned(at, deck.pop(), lasts))


def _first_of_its_kind() -> Callable[[str], int]:
    seen: Counter[str] = Counter()

    def rank(kind: str) -> int:
        seen[kind] += 1
        return int(seen[kind] > 1)

    return rank


class Injector:
    """Applies the planned faults to a cluster."""

    def __init__(
        self,
        cluster: Cluster,
        postgres: BreakablePostgres | None,
        rule_to_break: str | None,
    ) -> None:
        self.happened: list[Happened] = []
        self.troubles: list[str] = []
        self._cluster = cluster
        self._postgres = postgres
        self._rule_to_break = rule_to_break
        self._random = random.Random(cluster.seed)  # noqa: S311 - repeatable
        # Processes with an active fault. A process has at most one at a time, and some process has
        # none.
        self._busy: set[int] = set()
        self._postgres_is_busy = False

    async def run(self, planned: list[Planned]) -> None:
        """Inject the faults, each at its time, and wait until all are over."""
        began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for fault in planned:
                await asyncio.sleep(began + fault.at - asyncio.get_running_loop().time())
                group.create_task(self._inject(fault))

    async def _inject(self, fault: Planned) -> None:
        do: Callable[[float], Awaitable[bool]] = {
            "worker frozen": self._freeze_worker,
            "worker killed": self._kill_worker,
            "worker restarted": self._restart_worker,
            "client frozen": self._freeze_client,
            "client killed": self._kill_client,
            "Watch black-holed": self._black_hole_watch,
            "LISTEN black-holed": lambda seconds: self._black_hole(LISTEN, seconds),
            "renewal black-holed": lambda seconds: self._black_hole(RENEWAL, seconds),
            "database black-holed": lambda seconds: self._black_hole(None, seconds),
            "look-ups late": self._delay_lookups,
            "answers late": self._delay_answers,
            "backends terminated": self._terminate_backends,
            "Postgres restarted": self._restart_postgres,
            "Postgres killed": self._kill_postgres,
        }[fault.kind]
        began = now()
        try:
            if await do(fault.seconds):
                self.happened.append(Happened(fault.kind, began, now()))
        except psutil.NoSuchProcess:
            # Another fault killed it, or its worker is being replaced.
            pass
        except AssertionError as error:
            # The affected process did not recover in time.
            self.troubles.append(f"after {fault.kind}: {error}")

    # Faults of processes. Each function returns whether it found a target.

    async def _freeze_worker(self, seconds: float) -> bool:
        if (found := self._free_worker()) is None:
            return False
        _, process = found
        # Longer than its lease, so that Deletes continue without it and its row is removed.
        return await self._freeze(process, seconds + 0.4 * self._cluster.lease_seconds)

    async def _freeze_client(self, seconds: float) -> bool:
        free = [c for c in self._cluster.clients if c.child.alive and self._is_free(c.child.handle)]
        if not free:
            return False
        return await self._freeze(self._random.choice(free).child.handle, seconds)

    async def _freeze(self, process: psutil.Process, seconds: float) -> bool:
        with self._being_busy(process):
            process.suspend()
            try:
                await asyncio.sleep(seconds)
            finally:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()
        return True

    async def _kill_worker(self, _seconds: float) -> bool:
        return await self._end_worker(psutil.Process.kill)

    async def _restart_worker(self, _seconds: float) -> bool:
        return await self._end_worker(psutil.Process.terminate)

    async def _end_worker(self, end: Callable[[psutil.Process], None]) -> bool:
        if (found := self._free_worker()) is None:
            return False
        host, process = found
        with self._being_busy(process):
            times_up = host.times_up()
            end(process)
            await host.bring_back(times_up)
        return True

    async def _kill_client(self, seconds: float) -> bool:
        free = [c for c in self._cluster.clients if c.child.alive and self._is_free(c.child.handle)]
        if not free:
            return False
        client = self._random.choice(free)
        with self._being_busy(client.child.handle):
            client.child.kill()
            await client.child.ended()
            # Shorter than its lease.
            await asyncio.sleep(seconds / 2)
            self._cluster.start_client(client, self._rule_to_break)
        return True

    def _free_worker(self) -> tuple[Host, psutil.Process] | None:
        found = [
            (host, process)
            for host in self._cluster.hosts.values()
            for process in host.worker_processes()
        ]
        free = [each for each in found if self._is_free(each[1])]
        hurt = len(found) - len(free)
        if not free or hurt >= max(1, len(found) - 1):
            return None
        return self._random.choice(free)

    def _is_free(self, process: psutil.Process) -> bool:
        return process.pid not in self._busy

    @contextlib.contextmanager
    def _being_busy(self, process: psutil.Process):
        self._busy.add(process.pid)
        try:
            yield
        finally:
            self._busy.discard(process.pid)

    # Faults of the network.

    async def _black_hole_watch(self, seconds: float) -> bool:
        # Either every stream that the client opens meanwhile, so that a new stream does not help
        # it, or only the current ones, so that it finds another server at once.
        clients = [client.name for client in self._cluster.clients]
        chosen = set(
            self._random.sample(clients, self._random.randint(1, max(1, len(clients) // 3)))
        )
        alive = {c for c in self._cluster.network.connections if c.tag in chosen}
        new_too = self._random.random() < 0.5

        def matches(connection: Connection) -> bool:
            return (
                connection.label == WATCH
                and connection.tag in chosen
                and (new_too or connection in alive)
            )

        return await self._befall(self._cluster.network, matches, seconds)

    async def _black_hole(self, label: str | None, seconds: float) -> bool:
        """Black-hole a host's connections for one purpose, or all of them, which cuts it off from
        the database."""
        host = self._random.choice(list(self._cluster.hosts))

        def of_host(connection: Connection) -> bool:
            return connection.tag == host and label in (None, connection.label)

        found = list(filter(of_host, self._cluster.database.connections))
        if not found:
            return False
        one = self._random.choice(found)
        # The worker behind a connection to a shared address is unknown, so the fault affects one
        # connection or all.
        new_too = label is None or self._random.random() < 0.5

        def matches(connection: Connection) -> bool:
            return connection is one or (new_too and of_host(connection))

        return await self._befall(self._cluster.database, matches, seconds)

    async def _befall(
        self, proxy: Proxy, matches: Callable[[Connection], bool], seconds: float
    ) -> bool:
        if not any(map(matches, proxy.connections)):
            return False
        actions: tuple[Action, ...] = ("swallow", "hold")
        directions = (Direction.BOTH, Direction.UP, Direction.DOWN)
        fault = Fault(matches, self._random.choice(actions), self._random.choice(directions))
        async with proxy.fault(fault):
            await asyncio.sleep(seconds)
        return True

    async def _delay_lookups(self, seconds: float) -> bool:
        hosts = list(self._cluster.hosts)
        chosen = set(self._random.sample(hosts, self._random.randint(1, len(hosts))))

        def matches(connection: Connection) -> bool:
            return connection.label == LOOKUP and connection.tag in chosen

        return await self._delay(self._cluster.database, matches, seconds)

    async def _delay_answers(self, seconds: float) -> bool:
        clients = [client.name for client in self._cluster.clients]
        chosen = set(self._random.sample(clients, self._random.randint(1, len(clients))))
        streams_too = self._random.random() < 0.3

        def matches(connection: Connection) -> bool:
            return connection.tag in chosen and (streams_too or connection.label != WATCH)

        return await self._delay(self._cluster.network, matches, seconds)

    async def _delay(
        self, proxy: Proxy, matches: Callable[[Connection], bool], seconds: float
    ) -> bool:
        # The read is complete; only the answer comes late.
        fault = Fault(matches, "delay", Direction.DOWN, (0.0, LATE_SECONDS_MAX))
        async with proxy.fault(fault):
            await asyncio.sleep(2 * seconds)
        return True

    # Faults of the database.

    async def _terminate_backends(self, _seconds: float) -> bool:
        share = self._random.choice((0.3, 1.0))
        try:
            async with session(self._cluster.database_url) as connection:
                ended = await connection.fetch(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'latchkey' AND datname = current_database()"
                    "   AND random() < $1",
                    share,
                )
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False  # The database is down.
        return bool(ended)

    async def _restart_postgres(self, seconds: float) -> bool:
        return await self._break_postgres("stopped", seconds)

    async def _kill_postgres(self, seconds: float) -> bool:
        return await self._break_postgres("killed", seconds)

    async def _break_postgres(self, fault: str, seconds: float) -> bool:
        if self._postgres is None or self._postgres_is_busy:
            return False
        self._postgres_is_busy = True
        try:
            # Its start briefly blocks this event loop and therefore the proxies, so the network
            # pauses while the database is down.
            async with self._postgres.broken_by(fault):
                await asyncio.sleep(min(seconds, RESTART_SECONDS))
        finally:
            self._postgres_is_busy = False
        return True

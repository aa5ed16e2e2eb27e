"""One slice of overload: calls that arrive at a server at a given rate, and the measurements."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from tests.benchmarks import load, processes
from tests.benchmarks.load import UNLIMITED, Outcome, Traffic
from tests.benchmarks.processes import Server
from tests.benchmarks.rows import Row

__all__ = ["Seen", "Slicer"]

WARM_UP_SECONDS = 0.25
# As many as the largest client with several connections has, or all replicas of a service.
CONNECTIONS = 4
# The time-out of the client library's verifies, here for all calls, so that no slice has to wait
# for long.
TIMEOUT_SECONDS = 1.0
HEALTH_PER_S = 100.0
# Length of a bounded slice, as a multiple of the last rate.
ENOUGH = 3.0
# SERVING.
_SERVING = b"\x08\x01"
# A server has settled when, in this many consecutive samples, it and Postgres used less than this
# share of a core.
SETTLED_SHARE, LOOKS, LOOK_SECONDS = 0.25, 2, 0.03
SETTLE_SECONDS_MAX = 10.0
# Long enough to begin a call. The run waits until it is answered.
ONE_CALL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Seen:
    """The measurements of one slice. Bytes of RSS at its end, while calls still arrive."""

    outcome: Outcome
    # Other traffic at the same time.
    beside: Outcome | None
    health: Outcome
    rss: int
    # CPU per second, of a core.
    server_cpu: float
    postgres_cpu: float
    load_cpu: float
    late_ms: float
    kept_up: bool


@dataclass(frozen=True, slots=True)
class Slicer:
    """Takes slices of a server."""

    server: Server
    postmaster: int
    seconds: float
    # Each row's last rate.
    _rough: dict[tuple[str, str, int], float] = field(default_factory=dict, repr=False)

    def bounded(self, row: Row) -> float:
        """Return the server's calls per second with enough load, but no more concurrent calls than
        it handles well: twice the row's number in flight. Raises as `slice` does."""
        rough = self._rough.get(row.key) or self._closed(row, row.in_flight, 0.1, 0.2).goodput
        at_once = math.ceil(2 * row.in_flight / CONNECTIONS)
        seen = self.slice([(row, max(1.0, rough) * ENOUGH)], in_flight_max=at_once)
        if not (found := seen.outcome.goodput):
            raise RuntimeError(f"{row.name}: no call succeeded")
        self._rough[row.key] = found
        return found

    def slice(
        self,
        rates: Sequence[tuple[Row, float]],
        *,
        longer: float = 1.0,
        in_flight_max: int = UNLIMITED,
    ) -> Seen:
        """Send calls of one row or of two at these rates per second, plus health checks.
        Raises RuntimeError at a wrong answer, LoadError and OSError."""
        self.settle(rates[0][0])
        traffics = [
            Traffic(
                *(row.path, row.requests, row.begins_with, per_second),
                connections=CONNECTIONS,
                timeout_seconds=TIMEOUT_SECONDS,
                in_flight_max=in_flight_max,
            )
            for row, per_second in rates
        ]
        health = Traffic(
            *("/grpc.health.v1.Health/Check", itertools.repeat(b""), _SERVING, HEALTH_PER_S),
            connections=1,
            timeout_seconds=TIMEOUT_SECONDS,
        )
        worker = psutil.Process(self.server.pid)
        resident: list[int] = []
        cpu = processes.meter(self.server, self.postmaster)

        def meter() -> tuple[float, ...]:
            resident.append(worker.memory_info().rss)
            return time.monotonic(), *cpu()

        done = load.run(
            self.server.address,
            [*traffics, health],
            warm_up_seconds=WARM_UP_SECONDS,
            seconds=self.seconds * longer,
            meter=meter,
        )
        for (row, _), outcome in zip(rates, done.outcomes, strict=False):
            wrong = outcome.wrong + sum(not row.is_right(*sample) for sample in outcome.samples)
            if wrong:
                raise RuntimeError(f"{row.name}: {wrong} wrong answers")
        took, server_cpu, postgres_cpu = done.metered
        return Seen(
            outcome=done.outcomes[0],
            beside=done.outcomes[1] if len(rates) > 1 else None,
            health=done.outcomes[-1],
            rss=resident[-1],
            server_cpu=server_cpu / took,
            postgres_cpu=postgres_cpu / took,
            load_cpu=done.cpu_seconds / done.seconds,
            late_ms=done.late_ms,
            kept_up=done.kept_up,
        )

    def settle(self, row: Row) -> None:
        """Wait until earlier load is finished: a call is answered, and then the server is nearly
        idle.

        A flood leaves behind abandoned calls, whose cost must not count in the next slice.
        """
        self._closed(row, 1, 0.0, ONE_CALL_SECONDS)
        cpu = processes.meter(self.server, self.postmaster)
        give_up = time.monotonic() + SETTLE_SECONDS_MAX
        idle = 0
        while idle < LOOKS:
            if time.monotonic() > give_up:
                raise RuntimeError(f"the server is still busy after {SETTLE_SECONDS_MAX:.0f} s")
            before, began = sum(cpu()), time.monotonic()
            time.sleep(LOOK_SECONDS)
            is_idle = sum(cpu()) - before < SETTLED_SHARE * (time.monotonic() - began)
            idle = idle + 1 if is_idle else 0

    def _closed(self, row: Row, in_flight: int, warm_up: float, seconds: float) -> Outcome:
        traffic = Traffic(row.path, row.requests, row.begins_with, in_flight_max=in_flight)
        done = load.run(self.server.address, [traffic], warm_up_seconds=warm_up, seconds=seconds)
        return done.outcomes[0]

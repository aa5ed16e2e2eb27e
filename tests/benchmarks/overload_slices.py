"""One slice of overload: calls that come to a server at a rate, and what was seen of it."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from tests.benchmarks import load, openloop, processes
from tests.benchmarks.openloop import Outcome, Traffic
from tests.benchmarks.processes import Server
from tests.benchmarks.rows import Row

__all__ = ["Seen", "Slicer"]

WARM_UP_SECONDS = 0.25
# As many as the most that a client of several connections has; a service's replicas together.
CONNECTIONS = 4
# Of the client library's verifies; for all calls here, so that no slice has to wait for long.
TIMEOUT_SECONDS = 1.0
HEALTH_PER_S = 100.0
# SERVING.
_SERVING = b"\x08\x01"
# A server has settled when it takes less than so much of its core; what is left of a flood, such
# as calls that were given up, is none of the next slice's.
SETTLED_SHARE = 0.2
SETTLE_SECONDS_MAX = 30.0
LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of one slice. Bytes of RSS at its end, with calls still coming."""

    outcome: Outcome
    # Other traffic that came at the same time.
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

    def capacity(self, row: Row, in_flight: int) -> float:
        """Return how many calls to a second there are in a closed loop."""
        self.settle()
        done = load.run(
            self.server.address,
            row.path,
            row.requests,
            in_flight=in_flight,
            warm_up_seconds=WARM_UP_SECONDS,
            seconds=self.seconds,
            begins_with=row.begins_with,
        )
        if done.failures or not done.calls:
            raise RuntimeError(f"{done.failures} of {done.calls + done.failures} calls failed")
        return done.calls / done.seconds

    def slice(self, rates: Sequence[tuple[Row, float]], *, longer: float = 1.0) -> Seen:
        """Have calls come at so many a second, of one row or of two, with health checks beside
        them."""
        self.settle()
        traffics = [
            Traffic(
                *(row.path, row.requests, row.begins_with, per_second),
                connections=CONNECTIONS,
                timeout_seconds=TIMEOUT_SECONDS,
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

        done = openloop.run(
            self.server.address,
            [*traffics, health],
            warm_up_seconds=WARM_UP_SECONDS,
            seconds=self.seconds * longer,
            meter=meter,
        )
        for (row, _), outcome in zip(rates, done.outcomes, strict=False):
            wrong = sum(not row.is_right(*sample) for sample in outcome.tally.samples)
            if wrong or outcome.tally.wrong:
                raise RuntimeError(f"{row.name}: {outcome.tally.wrong + wrong} wrong answers")
        took, server_cpu, postgres_cpu = done.metered
        return Seen(
            outcome=done.outcomes[0],
            beside=done.outcomes[1] if len(rates) > 1 else None,
            health=done.outcomes[-1],
            rss=resident[-1],
            server_cpu=server_cpu / took,
            postgres_cpu=postgres_cpu / took,
            load_cpu=done.cpu_share,
            late_ms=done.late_ms,
            kept_up=done.kept_up,
        )

    def settle(self) -> None:
        """Wait until what came before is done with."""
        cpu = processes.meter(self.server, self.postmaster)
        give_up = time.monotonic() + SETTLE_SECONDS_MAX
        while time.monotonic() < give_up:
            before, began = sum(cpu()), time.monotonic()
            time.sleep(LOOK_SECONDS)
            if sum(cpu()) - before < SETTLED_SHARE * (time.monotonic() - began):
                return
        raise RuntimeError(f"the server is still busy after {SETTLE_SECONDS_MAX:.0f} s of rest")

"""The load: unary gRPC calls with different messages, in an open or in a closed loop.

In an open loop, a schedule determines when each call arrives, however the server performs, and its
latency counts from then. If no connection has a free stream, because the server limits their
number, the call is given up at once and counted as held back. In a closed loop a fixed number of
calls is in flight, so a slow server receives less work. Several kinds of traffic may run at once,
in one process and on one core; the result says whether that process kept up.

This is our own code, because h2load sends one body repeatedly and counts gRPC errors as successes,
and ghz and grpcio cannot offer ten times the load of one of these servers from one core.
"""

import contextlib
import gc
import math
import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.benchmarks.connection import UNLIMITED, Call, Connection, LoadError, Outcome

__all__ = ["UNLIMITED", "LoadError", "Outcome", "Run", "Traffic", "run"]

# Maximum to send before answers are read again: about 0.3 ms of work.
AT_ONCE_MAX = 64
# How often expired calls are looked for.
EXPIRE_EVERY_NS = 1_000_000
# Interval at which a wait without an event is interrupted.
WAIT_NS_MAX = 50_000_000
# No call is awaited beyond its deadline plus this margin, in which the generator notices it.
GRACE_SECONDS = 2.0
HANDSHAKE_SECONDS_MAX = 10.0
NICE = -15
# The generator has kept up if it was idle at times, and sent nearly all calls soon after their
# arrival.
CPU_SHARE_MAX = 0.9
LATENESS_MS_MAX = 2.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Calls of one method on separate connections, `per_second` of them, or in a closed loop.

    `requests` are serialised messages and must not end. An answer is right if it is one whole
    message that begins with `begins_with`. A connection has no more calls in flight than the server
    allows, and no more than `in_flight_max`; in a closed loop it always has that many. A call of an
    open loop has a deadline, `timeout_seconds` after its arrival. In a closed loop, the run fails
    if an answer takes longer than that after the end.
    """

    path: str
    requests: Iterator[bytes]
    begins_with: bytes
    per_second: float | None = None
    connections: int = 1
    timeout_seconds: float = 10.0
    in_flight_max: int = UNLIMITED
    metadata: Sequence[tuple[str, str]] = ()


@dataclass(slots=True)
class Run:
    """The measurements of a stretch: each traffic's outcome, and the state of the generator.

    `late_ms` is the delay after arrival within which 99 of 100 calls were sent, `cpu_seconds` the
    time for which this process worked. `metered` contains the counts of `meter`.
    """

    outcomes: list[Outcome]
    seconds: float
    late_ms: float
    cpu_seconds: float
    metered: tuple[float, ...]

    @property
    def kept_up(self) -> bool:
        """Return whether the figures describe the server, and not the generator."""
        cpu_share = self.cpu_seconds / self.seconds
        return cpu_share <= CPU_SHARE_MAX and self.late_ms <= LATENESS_MS_MAX


def run(
    address: str,
    traffics: Sequence[Traffic],
    *,
    warm_up_seconds: float,
    seconds: float,
    meter: Callable[[], tuple[float, ...]] = lambda: (),
) -> Run:
    """Send all the traffic to `address` (HOST:PORT) and return the outcome.

    Calls that arrive in the first `warm_up_seconds` are not counted. Waits for the calls in flight
    at the end. Raises LoadError and OSError.
    """
    gc_was_on = gc.isenabled()
    # This code creates no cycles, and a collection would count as the server's latency.
    gc.disable()
    with contextlib.ExitStack() as stack:
        sources = [
            _Source(address, traffic, warm_up_seconds, seconds, stack) for traffic in traffics
        ]
        try:
            with _first_on_its_core():
                return _run(sources, warm_up_seconds, seconds, meter)
        finally:
            if gc_was_on:
                gc.enable()


@contextlib.contextmanager
def _first_on_its_core() -> Iterator[None]:
    """Raise the priority above other processes on this core, such as Postgres, if allowed: their
    time while a call waits to be sent would count as the server's latency."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, nice)


class _Source:
    """One traffic: the calls that have arrived, and the connections that carry them."""

    def __init__(
        self,
        address: str,
        traffic: Traffic,
        warm_up_seconds: float,
        seconds: float,
        stack: contextlib.ExitStack,
    ) -> None:
        self.timeout_ns = int(traffic.timeout_seconds * 1e9)
        self.closed_loop = traffic.per_second is None
        rate = traffic.per_second or 0.0
        self._gap_ns = 1e9 / rate if rate else math.inf
        self._arrivals = round(rate * (warm_up_seconds + seconds))
        # Calls from this one on are counted. The margin is for rounding errors.
        self._first_counted = math.ceil(rate * warm_up_seconds - 1e-6)
        self._arrived = 0
        self.ended = False
        self.outcome = Outcome(
            traffic.timeout_seconds, offered=self._arrivals - self._first_counted
        )
        self._requests = traffic.requests
        self._turn = 0
        self.connections: list[Connection] = []
        for _ in range(traffic.connections):
            connection = Connection(
                address,
                traffic.path,
                traffic.begins_with,
                self.outcome,
                open_loop=not self.closed_loop,
                in_flight_max=traffic.in_flight_max,
                metadata=traffic.metadata,
            )
            stack.callback(connection.close)
            self.connections.append(connection)

    @property
    def done(self) -> bool:
        return self.ended and not any(connection.sent for connection in self.connections)

    def next_ns(self) -> float | None:
        """Return when the next call arrives that would find room, in ns from the start; the others
        may be counted later."""
        if self.ended or self.closed_loop or not any(c.has_room() for c in self.connections):
            return None
        return self._arrived * self._gap_ns

    def arrive(self, start: int, now: int) -> list[Call]:
        """Put due calls on connections, or give them up. Returns those that were put, at most
        AT_ONCE_MAX; the rest follow next time."""
        put: list[Call] = []
        due = min(self._arrivals, int((now - start) / self._gap_ns) + 1)
        while self._arrived < due and len(put) < AT_ONCE_MAX:
            connection = self._free()
            if connection is None:
                # Their arrival times cannot be distinguished, so all of them are rejected.
                self._hold_back(due)
                break
            number = self._arrived
            arrival = start + int(number * self._gap_ns)
            call = (arrival, number >= self._first_counted, next(self._requests))
            connection.put(call)
            self._arrived += 1
            put.append(call)
        self.ended = self._arrived == self._arrivals
        return put

    def refill(self) -> None:
        """In a closed loop, put a call into each free place."""
        if self.closed_loop and not self.ended:
            for connection in self.connections:
                now = time.perf_counter_ns()
                while connection.has_room():
                    connection.put((now, None, next(self._requests)))
                connection.flush()

    def _hold_back(self, until: int) -> None:
        self.outcome.held_back += max(0, until - max(self._arrived, self._first_counted))
        self._arrived = until

    def _free(self) -> Connection | None:
        """Return the next connection in turn that has room."""
        connections = self.connections
        for step in range(len(connections)):
            connection = connections[(self._turn + step) % len(connections)]
            if connection.has_room():
                self._turn = (self._turn + step + 1) % len(connections)
                return connection
        return None


def _run(
    sources: Sequence[_Source],
    warm_up_seconds: float,
    seconds: float,
    meter: Callable[[], tuple[float, ...]],
) -> Run:
    """Send, wait and read in one thread; wait only for time and sockets."""
    connections = [connection for source in sources for connection in source.connections]
    _shake_hands(connections)
    clock = time.perf_counter_ns
    start = now = expire_at = clock()
    begin = start + int(warm_up_seconds * 1e9)
    end = begin + int(seconds * 1e9)
    patience = max(source.timeout_ns for source in sources) / 1e9 + GRACE_SECONDS
    give_up = end + int(patience * 1e9)
    lateness: list[int] = []
    before: tuple[float, ...] | None = None
    after: tuple[float, ...] | None = None
    measured = cpu = 0.0
    while True:
        if before is None and now >= begin:
            cpu, before = time.process_time(), meter()
            begin = clock()
            for source in sources:
                source.outcome.within = True
        if after is None and now >= end:
            cpu, after = time.process_time() - cpu, meter()
            measured = (now - begin) / 1e9
            for source in sources:
                source.outcome.within = False
                if source.closed_loop:
                    source.ended = True
        if after is not None and all(source.done for source in sources):
            break
        if now > give_up:
            raise LoadError("calls are still in progress long after their deadlines")
        for source in sources:
            source.refill()
        until = begin if before is None else end if after is None else now + WAIT_NS_MAX
        ready = _wait(connections, _wait_ns(sources, start, until) / 1e9)
        # Arrivals first and then answers, because a stream that becomes free is for later arrivals.
        _send(sources, start, lateness)
        for connection in ready:
            connection.read()
        now = clock()
        if now >= expire_at:
            for source in sources:
                if not source.closed_loop:
                    for connection in source.connections:
                        connection.expire(now - source.timeout_ns)
            expire_at = now + EXPIRE_EVERY_NS
    assert before is not None, "the end comes after the beginning"
    for source in sources:
        source.outcome.seconds = measured
        source.outcome.latencies.sort()
        source.outcome.refused_latencies.sort()
    lateness.sort()
    late = lateness[int(len(lateness) * 0.99)] / 1e6 if lateness else 0.0
    metered = tuple(b - a for a, b in zip(before, after, strict=True))
    return Run([source.outcome for source in sources], measured, late, cpu, metered)


def _shake_hands(connections: Sequence[Connection]) -> None:
    give_up = time.monotonic() + HANDSHAKE_SECONDS_MAX
    while not all(connection.ready for connection in connections):
        if time.monotonic() > give_up:
            raise LoadError("the server does not send its settings")
        for connection in _wait(connections, WAIT_NS_MAX / 1e9):
            connection.read()


def _send(sources: Sequence[_Source], start: int, lateness: list[int]) -> None:
    """Send due calls; append to `lateness` how late each one was, in ns."""
    for source in sources:
        if source.closed_loop:
            continue
        put = source.arrive(start, time.perf_counter_ns())
        for connection in source.connections:
            connection.flush()
        if put:
            now = time.perf_counter_ns()
            lateness += [now - call[0] for call in put if call[1]]


def _wait_ns(sources: Sequence[_Source], start: int, until: int) -> float:
    """Return the time until the next event that no socket announces."""
    now = time.perf_counter_ns()
    moments = [source.next_ns() for source in sources]
    soonest = min((start + moment for moment in moments if moment is not None), default=until)
    return max(0.0, min(soonest - now, until - now, WAIT_NS_MAX))


def _wait(connections: Sequence[Connection], seconds: float) -> list[Connection]:
    """Wait until there is something to read, or until the time is over; return the readable
    connections."""
    stuck = [connection for connection in connections if connection.unsent]
    # Not poll, which waits for whole milliseconds.
    ready, _, _ = select.select(connections, stuck, [], seconds)
    return ready

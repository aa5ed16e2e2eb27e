"""The open loop: calls arrive on schedule, however the server performs.

A closed loop (load.py) waits for an answer before it calls again, so a slow server receives less
work, and the calls that would have waited are never seen. Here a schedule determines when each call
arrives, and its latency counts from then. If no connection has a free stream, because the server
limits their number, the call is given up at once and counted as held back. Several kinds of traffic
may run at once, in one process and on one core; the result says whether that process kept up.
"""

import contextlib
import gc
import itertools
import os
import random
import select
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.benchmarks.http2 import LoadError
from tests.benchmarks.openloop_connection import UNLIMITED, Connection, Sent, Tally

__all__ = ["Outcome", "Run", "Tally", "Traffic", "run", "schedule"]

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
    """Calls of one method, `per_second` of them, on separate connections.

    They arrive evenly, or with `seed` like those of independent callers (Poisson). `requests` are
    serialised messages and must not end. An answer is right if it is one whole message that begins
    with `begins_with`. Each call has a deadline, `timeout_seconds` after its arrival. A connection
    has no more calls in flight than the server allows, and no more than `in_flight_max`.
    """

    path: str
    requests: Iterator[bytes]
    begins_with: bytes
    per_second: float
    connections: int = 4
    timeout_seconds: float = 1.0
    in_flight_max: int = UNLIMITED
    seed: int | None = None


@dataclass(slots=True)
class Outcome:
    """The outcome of one traffic's calls that arrived within the stretch.

    `goodput` is the number of right answers per second, each in time.
    """

    seconds: float
    offered: int
    held_back: int
    goodput: float
    timeout_seconds: float
    tally: Tally = field(repr=False)

    @property
    def sent(self) -> int:
        """Return how many were sent."""
        return self.tally.sent

    def percentile_us(self, share: float) -> float:
        """Return the latency, µs, below which `share` (0 to 1) of the calls lie that were not
        refused. A call that came too late, or was never sent, counts with at least its deadline."""
        answered = self.tally.latencies
        place = int((len(answered) + self.tally.too_late) * share)
        if place < len(answered):
            return answered[place] / 1_000
        # All are present, except perhaps the last, if that one is asked for.
        if answered and not self.tally.too_late:
            return answered[-1] / 1_000
        return self.timeout_seconds * 1e6

    def refused_us(self, share: float) -> float:
        """Return the same for the refused calls."""
        return _percentile(self.tally.refused_latencies, share) / 1_000


@dataclass(slots=True)
class Run:
    """The measurements of a stretch: each traffic's outcome, and the state of the generator.

    `late_ms` is the delay after arrival within which 99 of 100 calls were sent, `cpu_share` the
    share of time in which this process worked. `metered` has the counts of `meter`.
    """

    outcomes: list[Outcome]
    late_ms: float
    cpu_share: float
    metered: tuple[float, ...]

    @property
    def kept_up(self) -> bool:
        """Return whether the figures describe the server, and not the generator."""
        return self.cpu_share <= CPU_SHARE_MAX and self.late_ms <= LATENESS_MS_MAX


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
    sources = [_Source(address, traffic, warm_up_seconds, seconds) for traffic in traffics]
    gc_was_on = gc.isenabled()
    # This code creates no cycles, and a collection would count as the server's latency.
    gc.disable()
    try:
        with _first_on_its_core():
            return _Loop(sources, meter).run(warm_up_seconds, seconds)
    finally:
        if gc_was_on:
            gc.enable()
        for source in sources:
            source.close()


def schedule(per_second: float, seconds: float, seed: int | None = None) -> "array[int]":
    """Return the arrival times in ns from the start, ascending: evenly spaced, or random by `seed`
    and independent of each other (Poisson)."""
    if seed is None:
        gap = 1e9 / per_second
        return array("q", (int(number * gap) for number in range(round(per_second * seconds))))
    chance = random.Random(seed)  # noqa: S311 - for order, not for secrets
    gaps = (chance.expovariate(per_second) * 1e9 for _ in itertools.count())
    moments = itertools.accumulate(gaps)
    return array("q", map(int, itertools.takewhile(lambda moment: moment < seconds * 1e9, moments)))


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
        self, address: str, traffic: Traffic, warm_up_seconds: float, seconds: float
    ) -> None:
        self.timeout_ns = int(traffic.timeout_seconds * 1e9)
        self.timeout_seconds = traffic.timeout_seconds
        self.moments = schedule(traffic.per_second, warm_up_seconds + seconds, traffic.seed)
        # Calls from this one on are counted.
        self.first_counted = bisect_right(self.moments, int(warm_up_seconds * 1e9) - 1)
        self.arrived = 0
        self.held_back = 0
        self.tally = Tally()
        self._requests = traffic.requests
        self._turn = 0
        self.connections: list[Connection] = []
        try:
            for _ in range(traffic.connections):
                self.connections.append(
                    Connection(
                        address,
                        traffic.path,
                        traffic.begins_with,
                        self.tally,
                        timeout_seconds=traffic.timeout_seconds,
                        in_flight_max=traffic.in_flight_max,
                    )
                )
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        for connection in self.connections:
            connection.close()

    @property
    def over(self) -> bool:
        return self.arrived == len(self.moments)

    @property
    def done(self) -> bool:
        return self.over and not any(connection.sent for connection in self.connections)

    def has_room(self) -> bool:
        return any(connection.has_room() for connection in self.connections)

    def arrive(self, start: int, now: int) -> list[Sent]:
        """Put due calls on connections, or give them up. Returns those that were put, at most
        AT_ONCE_MAX; the rest follow next time."""
        due = bisect_right(self.moments, now - start, self.arrived)
        put: list[Sent] = []
        while self.arrived < due and len(put) < AT_ONCE_MAX:
            connection = self._free()
            if connection is None:
                # They arrive at the same moment as far as we can tell, so none finds room.
                self.held_back += due - max(self.arrived, min(due, self.first_counted))
                self.arrived = due
                break
            number = self.arrived
            sent = (
                start + self.moments[number],
                number >= self.first_counted,
                next(self._requests),
            )
            connection.put(sent)
            self.arrived += 1
            put.append(sent)
        return put

    def _free(self) -> Connection | None:
        """Return the next connection in turn that has room."""
        connections = self.connections
        for step in range(len(connections)):
            connection = connections[(self._turn + step) % len(connections)]
            if connection.has_room():
                self._turn = (self._turn + step + 1) % len(connections)
                return connection
        return None


class _Loop:
    """Sends, waits and reads in one thread; waits only for time and sockets."""

    def __init__(self, sources: Sequence[_Source], meter: Callable[[], tuple[float, ...]]) -> None:
        self._sources = sources
        self._meter = meter
        self._connections = [c for source in sources for c in source.connections]

    def run(self, warm_up_seconds: float, seconds: float) -> Run:
        self._shake_hands()
        clock = time.perf_counter_ns
        start = clock()
        begin = start + int(warm_up_seconds * 1e9)
        end = begin + int(seconds * 1e9)
        patience = max(source.timeout_seconds for source in self._sources) + GRACE_SECONDS
        give_up = end + int(patience * 1e9)
        lateness: list[int] = []
        before: tuple[float, ...] | None = None
        after: tuple[float, ...] | None = None
        cpu = 0.0
        expire_at = now = start
        while True:
            if before is None and now >= begin:
                cpu, before = time.process_time(), self._meter()
                begin = clock()
                self._within(True)
            if after is None and now >= end:
                cpu, after = time.process_time() - cpu, self._meter()
                measured = (now - begin) / 1e9
                self._within(False)
            if after is not None and all(source.done for source in self._sources):
                break
            if now > give_up:
                raise LoadError("calls are still under way long after their deadlines")
            mark = begin if before is None else end if after is None else now + WAIT_NS_MAX
            ready = self._wait(self._wait_ns(start, now, min(mark - now, WAIT_NS_MAX)) / 1e9)
            # Arrivals first and then answers, because a stream that becomes free is for later
            # arrivals.
            self._send(start, lateness)
            for connection in ready:
                connection.read()
            now = clock()
            if now >= expire_at:
                for source in self._sources:
                    for connection in source.connections:
                        connection.expire(now - source.timeout_ns)
                expire_at = now + EXPIRE_EVERY_NS
        assert before is not None, "the end comes after the beginning"
        assert after is not None, "the loop has just seen to it"
        outcomes = [
            Outcome(
                seconds,
                len(source.moments) - source.first_counted,
                source.held_back,
                source.tally.good / measured,
                source.timeout_seconds,
                source.tally,
            )
            for source in self._sources
        ]
        for outcome in outcomes:
            outcome.tally.latencies.sort()
            outcome.tally.refused_latencies.sort()
        return Run(
            outcomes,
            _percentile(sorted(lateness), 0.99) / 1e6,
            cpu / measured,
            tuple(b - a for a, b in zip(before, after, strict=True)),
        )

    def _within(self, within: bool) -> None:
        for source in self._sources:
            source.tally.within = within

    def _shake_hands(self) -> None:
        give_up = time.monotonic() + HANDSHAKE_SECONDS_MAX
        while not all(connection.ready for connection in self._connections):
            if time.monotonic() > give_up:
                raise LoadError("the server does not send its settings")
            for connection in self._wait(WAIT_NS_MAX / 1e9):
                connection.read()

    def _send(self, start: int, lateness: list[int]) -> None:
        """Send due calls; append to `lateness` how late each one was, in ns."""
        for source in self._sources:
            put = source.arrive(start, time.perf_counter_ns())
            for connection in source.connections:
                if connection.out or connection.unsent:
                    connection.flush()
            if put:
                now = time.perf_counter_ns()
                lateness += [now - sent[0] for sent in put if sent[1]]

    def _wait_ns(self, start: int, now: int, most: int) -> int:
        """Return the time until the next arrival that would find room; the others may be counted
        later."""
        for source in self._sources:
            if not source.over and source.has_room():
                most = min(most, start + source.moments[source.arrived] - now)
        return max(0, most)

    def _wait(self, seconds: float) -> list[Connection]:
        """Wait until there is something to read, or until the time is over; return the readable
        connections."""
        stuck = [connection for connection in self._connections if connection.unsent]
        # Not poll, which waits for whole milliseconds.
        ready, _, _ = select.select(self._connections, stuck, [], seconds)
        return ready


def _percentile(values: Sequence[int], share: float) -> float:
    """Return the value below which `share` of the ascending values lie; 0 if there are none."""
    return float(values[min(len(values) - 1, int(len(values) * share))]) if values else 0.0

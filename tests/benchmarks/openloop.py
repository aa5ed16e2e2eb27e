"""The open loop: calls that arrive when they arrive, however the server fares.

A closed loop (load.py) waits for an answer before it calls again, so a server that is slow gets
less to do, and what would have waited is never seen. Here a schedule says when each call arrives,
and its latency counts from then. A call that finds no free stream on any connection, for the server
allows only so many, is held back: given up at once and counted. Several kinds of traffic may run at
once, in this one process and on this one core; whether that kept up is part of what is measured.
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

# So many are sent before answers are looked at again: some 0.3 ms' work.
AT_ONCE_MAX = 64
# How often calls are looked for whose time is over.
EXPIRE_EVERY_NS = 1_000_000
# A wait that nothing ends is looked into so often.
WAIT_NS_MAX = 50_000_000
# Beyond its deadline no call is waited for, but for what the generator needs to see that.
GRACE_SECONDS = 2.0
HANDSHAKE_SECONDS_MAX = 10.0
NICE = -15
# The generator has kept up if it was idle at times, and sent nearly all calls about when they came.
CPU_SHARE_MAX = 0.9
LATENESS_MS_MAX = 2.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Calls of one method, `per_second` of them, on connections of their own.

    They come evenly, or with `seed` as independent callers' do (Poisson). `requests` are
    serialised messages and must not end. An answer is right if it is one whole message that
    begins with `begins_with`. Each call has a deadline, `timeout_seconds` from its arrival. A
    connection has no more calls under way than the server allows, nor than `in_flight_max`.
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
    """What became of one traffic's calls that arrived within the stretch.

    `goodput` is how many right answers came to a second, each in time.
    """

    seconds: float
    offered: int
    held_back: int
    goodput: float
    timeout_seconds: float
    tally: Tally = field(repr=False)

    @property
    def sent(self) -> int:
        """How many were sent."""
        return self.tally.sent

    def percentile_us(self, share: float) -> float:
        """Return the latency, µs, that `share` (0 to 1) of the calls stayed within that were not
        refused. One that came too late took at least its deadline, and no call at all no less."""
        answered = self.tally.latencies
        place = int((len(answered) + self.tally.too_late) * share)
        if place < len(answered):
            return answered[place] / 1_000
        # All are there, but for the last when it is that which is asked for.
        if answered and not self.tally.too_late:
            return answered[-1] / 1_000
        return self.timeout_seconds * 1e6

    def refused_us(self, share: float) -> float:
        """Return the same of the calls that were refused."""
        return _percentile(self.tally.refused_latencies, share) / 1_000


@dataclass(slots=True)
class Run:
    """What a stretch measured: each traffic's outcome, and how the generator itself fared.

    `late_ms` is how long after their arrival 99 of 100 calls were sent, `cpu_share` how much of the
    time this process was at work. `metered` is what `meter` counted meanwhile.
    """

    outcomes: list[Outcome]
    late_ms: float
    cpu_share: float
    metered: tuple[float, ...]

    @property
    def kept_up(self) -> bool:
        """Tell whether the figures are the server's, and not the generator's."""
        return self.cpu_share <= CPU_SHARE_MAX and self.late_ms <= LATENESS_MS_MAX


def run(
    address: str,
    traffics: Sequence[Traffic],
    *,
    warm_up_seconds: float,
    seconds: float,
    meter: Callable[[], tuple[float, ...]] = lambda: (),
) -> Run:
    """Have all the traffic come to `address` (HOST:PORT) and return what became of it.

    Calls that arrive in the first `warm_up_seconds` are not counted. Waits for the calls that are
    still under way at the end. Raises LoadError and OSError.
    """
    sources = [_Source(address, traffic, warm_up_seconds, seconds) for traffic in traffics]
    gc_was_on = gc.isenabled()
    # Nothing here makes cycles, and a collection would count as the server's latency.
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
    """Return when calls arrive, ns from the beginning, ascending: evenly, or by `seed` at random,
    each independent of the others (Poisson)."""
    if seed is None:
        gap = 1e9 / per_second
        return array("q", (int(number * gap) for number in range(round(per_second * seconds))))
    chance = random.Random(seed)  # noqa: S311 - for order, not for secrets
    gaps = (chance.expovariate(per_second) * 1e9 for _ in itertools.count())
    moments = itertools.accumulate(gaps)
    return array("q", map(int, itertools.takewhile(lambda moment: moment < seconds * 1e9, moments)))


@contextlib.contextmanager
def _first_on_its_core() -> Iterator[None]:
    """Go before others who share the core, Postgres say, if we may: what they take while a call
    waits to be sent would count as the server's latency."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, nice)


class _Source:
    """One traffic: what has arrived of its schedule, and the connections that it goes out on."""

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
        """Put what is due on connections, or give it up. Returns what was put, AT_ONCE_MAX of it
        at most: the rest is for the next time."""
        due = bisect_right(self.moments, now - start, self.arrived)
        put: list[Sent] = []
        while self.arrived < due and len(put) < AT_ONCE_MAX:
            connection = self._free()
            if connection is None:
                # They come at the same moment as far as we can tell, so none finds room.
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
    """Sends, waits, reads, in one thread; nothing in it waits for anything but time and sockets."""

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
            # First who came meanwhile and then what was answered: a stream that becomes free is
            # for those who come later.
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
        """Send what is due; put into `lateness` by how much, ns, it was late."""
        for source in self._sources:
            put = source.arrive(start, time.perf_counter_ns())
            for connection in source.connections:
                if connection.out or connection.unsent:
                    connection.flush()
            if put:
                now = time.perf_counter_ns()
                lateness += [now - sent[0] for sent in put if sent[1]]

    def _wait_ns(self, start: int, now: int, most: int) -> int:
        """Return how long it is to the next arrival that would find room; who does not may be
        counted later."""
        for source in self._sources:
            if not source.over and source.has_room():
                most = min(most, start + source.moments[source.arrived] - now)
        return max(0, most)

    def _wait(self, seconds: float) -> list[Connection]:
        """Wait until there is something to read, or so long; return where."""
        stuck = [connection for connection in self._connections if connection.unsent]
        # Not poll, which waits for whole milliseconds.
        ready, _, _ = select.select(self._connections, stuck, [], seconds)
        return ready


def _percentile(values: Sequence[int], share: float) -> float:
    """Return what `share` of the values, ascending, stay within; 0 if there are none."""
    return float(values[min(len(values) - 1, int(len(values) * share))]) if values else 0.0

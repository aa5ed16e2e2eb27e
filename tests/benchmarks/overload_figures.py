"""The results of overload: a table of the calls' outcomes, and figures with bounds."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.coherence_figures import Figure
from tests.benchmarks.load import Outcome
from tests.benchmarks.overload_slices import TIMEOUT_SECONDS, Seen
from tests.benchmarks.rows import Row

__all__ = [
    "ALONE",
    "FLOODED",
    "LOADS",
    "UNLOADED",
    "Case",
    "Result",
    "Round",
    "document",
    "figures",
    "lines",
]

# By name: a multiple of the server's rate with a bounded number in flight.
UNLOADED, TENFOLD = "0.1×", "10×"
LOADS = {UNLOADED: 0.1, "1×": 1.0, "2×": 2.0, TENFOLD: 10.0}
# Half of it, without and with the other traffic's flood.
ALONE, FLOODED = "0.5× alone", "0.5× flooded"
FLOODS = (TENFOLD, FLOODED)

GOODPUT_SHARE_MIN = 0.9
P99_TIMES_MAX = 5.0
FLOODED_SHARE_MIN = 0.5
RSS_TIMES_MAX = 1.05


@dataclass(frozen=True, slots=True)
class Case:
    """Calls of one row alone, or at a moderate rate beside a flood of another's."""

    row: Row
    beside: Row | None = None

    @property
    def name(self) -> str:
        """Return its name in the table."""
        flood = "" if self.beside is None else f" beside {_short_name(self.beside)}"
        return f"{self.row.name if self.beside is None else _short_name(self.row)}{flood}"

    @property
    def title(self) -> str:
        """Return the title that `--only` matches."""
        return f"overload {self.name} {self.row.transport}"


@dataclass(frozen=True, slots=True)
class Round:
    """Slices of one case by load, and the server's rate with a bounded number of calls in flight,
    from which the loads were derived; calls per second."""

    bounded: float
    seen: dict[str, Seen]

    @property
    def peak(self) -> float:
        """Return its maximum rate, because a moment with busy neighbours does not show the peak."""
        return max(self.bounded, *(seen.outcome.goodput for seen in self.seen.values()))


@dataclass(frozen=True, slots=True)
class Result:
    """All rounds of a case."""

    case: Case
    rounds: list[Round] = field(default_factory=list)
    # Why there are no further rounds.
    errors: list[str] = field(default_factory=list)


def figures(results: Sequence[Result]) -> list[Figure]:
    """Return the figures with bounds, and the health checks' p99."""
    results = [result for result in results if result.rounds]
    found: list[Figure] = []
    for result in results:
        found += _alone(result) if result.case.beside is None else _flooded(result)
        found += _memory(result)
    return [*found, *_health(results)]


def _alone(result: Result) -> Iterator[Figure]:
    rounds = result.rounds
    for load in LOADS:
        if load == UNLOADED:
            continue
        name = f"{_title(result)} at {load}"
        goodput = [r.seen[load].outcome.goodput / r.peak for r in rounds]
        p99 = [_p99(r.seen[load].outcome) / _p99(r.seen[UNLOADED].outcome) for r in rounds]
        yield Figure.median(
            f"{name}, goodput by the peak", "times", goodput, at_least=GOODPUT_SHARE_MIN
        )
        yield Figure.median(f"{name}, p99 by unloaded", "times", p99, at_most=P99_TIMES_MAX)


def _flooded(result: Result) -> Iterator[Figure]:
    pairs = [
        (r.seen[FLOODED].outcome.goodput, r.seen[ALONE].outcome.goodput) for r in result.rounds
    ]
    shares = [flooded / alone if alone else 0.0 for flooded, alone in pairs]
    name = f"{_title(result)} at {TENFOLD}, goodput by alone"
    yield Figure.median(name, "times", shares, at_least=FLOODED_SHARE_MIN)


def _memory(result: Result) -> Iterator[Figure]:
    resident = [r.seen[load].rss for r in result.rounds for load in FLOODS if load in r.seen]
    if len(resident) > 1:
        name = f"{_title(result)} at {TENFOLD}, server memory, last round by first"
        yield Figure.median(name, "times", [resident[-1] / resident[0]], at_most=RSS_TIMES_MAX)


def _health(results: Sequence[Result]) -> Iterator[Figure]:
    for transport in dict.fromkeys(result.case.row.transport for result in results):
        checks = [
            r.seen[load].health
            for result in results
            if result.case.row.transport == transport
            for r in result.rounds
            for load in FLOODS
            if load in r.seen
        ]
        name = f"health checks during floods, {transport}"
        answered = [check.ok / check.offered for check in checks]
        # Over all of them and not a median, because each must be answered.
        share = sum(c.ok for c in checks) / sum(c.offered for c in checks)
        yield Figure(
            *(f"{name}, answered SERVING", "times", share, min(answered), max(answered)),
            sum(check.offered for check in checks),
            at_least=1.0,
        )
        p99 = [_p99(check) / 1_000 for check in checks]
        yield Figure.median(f"{name}, p99", "ms", p99)


def lines(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of the table: medians of the rounds."""
    results = [result for result in results if result.rounds]
    if not results:
        return
    form = "{:<24} {:<8} {:<12}" + " {:>9}" * 6 + " {:>8}" * 6 + "  {}"
    yield form.format(
        *("overload", "server", "load", "offered/s", "sent/s", "held back", "refused", "too late"),
        *("goodput", "of peak", "p50 ms", "p99 ms", "unloaded", "RSS MB", "sent ms", ""),
    )
    for result in results:
        for load in result.rounds[0].seen:
            yield form.format(
                result.case.name, result.case.row.transport, load, *_cells(result, load)
            )
    for figure in _health(results):
        share = figure.unit == "times"
        value = f"{figure.value:.1%} of {figure.samples:,}" if share else f"{figure.value:.1f} ms"
        yield f"{figure.name}: {value}"
    yield "Loads: times what the server did with a bounded number in flight, in the same round."
    yield "Peak: the most that it did in that round, so or under any of the loads."
    yield "Held back: by the server's limit of calls on a connection, and given up at once."
    yield f"Too late: after {TIMEOUT_SECONDS:.0f} s. Goodput: right answers in time, to a second."
    yield "p50, p99: of calls not refused. Unloaded: p99 by that of the case's first line."
    yield "RSS: of the server at the end of the slice, under the load."
    yield "Sent: the delay within which 99 of 100 calls were sent; * marks rounds with a late load."


def _cells(result: Result, load: str) -> Iterator[str]:
    def middle(pick: Callable[[Seen], float]) -> float:
        return statistics.median(pick(r.seen[load]) for r in result.rounds)

    def per_s(pick: Callable[[Outcome], int]) -> str:
        return f"{middle(lambda seen: pick(seen.outcome) / seen.outcome.seconds):,.0f}"

    base = UNLOADED if result.case.beside is None else ALONE
    yield per_s(lambda outcome: outcome.offered)
    yield per_s(lambda outcome: outcome.sent)
    yield per_s(lambda outcome: outcome.held_back)
    yield per_s(lambda outcome: outcome.refused + outcome.unavailable)
    yield per_s(lambda outcome: outcome.too_late)
    yield f"{middle(lambda seen: seen.outcome.goodput):,.0f}"
    share = statistics.median(r.seen[load].outcome.goodput / r.peak for r in result.rounds)
    yield f"{share:.2f}"
    yield f"{middle(lambda seen: _p50(seen.outcome)) / 1_000:.2f}"
    yield f"{middle(lambda seen: _p99(seen.outcome)) / 1_000:.2f}"
    times = [_p99(r.seen[load].outcome) / _p99(r.seen[base].outcome) for r in result.rounds]
    yield f"{statistics.median(times):.1f}×"
    yield f"{middle(lambda seen: seen.rss) / 1e6:.0f}"
    yield f"{middle(lambda seen: seen.late_ms):.2f}"
    behind = sum(not r.seen[load].kept_up for r in result.rounds)
    yield f"* {behind} of {len(result.rounds)}" if behind else ""


def document(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return all slices, for the file."""
    return [
        {
            "name": result.case.name,
            "transport": result.case.row.transport,
            "load": load,
            "round": number,
            "bounded_per_s": round(taken.bounded),
            "peak_per_s": round(taken.peak),
            "calls": _counts(seen.outcome),
            "flood": None if seen.beside is None else _counts(seen.beside),
            "health": _counts(seen.health),
            "rss_mb": round(seen.rss / 1e6, 1),
            "cpu": {
                "server": round(seen.server_cpu, 2),
                "postgres": round(seen.postgres_cpu, 2),
                "load": round(seen.load_cpu, 2),
            },
            "sent_late_ms": round(seen.late_ms, 2),
            "kept_up": seen.kept_up,
        }
        for result in results
        for number, taken in enumerate(result.rounds, 1)
        for load, seen in taken.seen.items()
    ]


def _counts(outcome: Outcome) -> dict[str, Any]:
    return {
        "seconds": outcome.seconds,
        "offered": outcome.offered,
        "held_back": outcome.held_back,
        "sent": outcome.sent,
        "ok": outcome.ok,
        "refused": outcome.refused,
        "unavailable": outcome.unavailable,
        "too_late": outcome.too_late,
        "other": outcome.other,
        "connections_lost": outcome.connections_lost,
        "goodput_per_s": round(outcome.goodput, 1),
        "p50_us": round(_p50(outcome)),
        "p99_us": round(_p99(outcome)),
        "refused_p99_us": round(outcome.refused_us(0.99)),
    }


def _p50(outcome: Outcome) -> float:
    return outcome.percentile_us(0.50)


def _p99(outcome: Outcome) -> float:
    return outcome.percentile_us(0.99)


def _title(result: Result) -> str:
    return f"{result.case.name}, {result.case.row.transport}"


def _short_name(row: Row) -> str:
    return row.name.partition(",")[0]

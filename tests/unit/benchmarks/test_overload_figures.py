"""Figures of overload: what counts as reached, and what does not."""

import itertools
from dataclasses import replace

import pytest

from tests.benchmarks.connection import DEADLINE_EXCEEDED, Outcome
from tests.benchmarks.overload_figures import (
    ALONE,
    FLOODED,
    LOADS,
    Case,
    Result,
    Round,
    figures,
)
from tests.benchmarks.overload_slices import Seen
from tests.benchmarks.rows import Row

MS = 1_000_000
PEAK = 1_000.0


def is_right(_request: bytes, _answer: bytes) -> bool:
    return True


VERIFY = Row(
    *("", "Verify, warm", "native", 64, "native", "/Verify"), itertools.repeat(b""), b"", is_right
)
CREATE = replace(VERIFY, name="Create", path="/Create")


def outcome(goodput: float, p99_ms: float = 1.0, too_late: int = 0) -> Outcome:
    calls = 100 + too_late
    found = Outcome(1.0, 1.0, calls, sent=calls, latencies=[int(p99_ms * MS)] * 100)
    found.good, found.failed[DEADLINE_EXCEEDED] = int(goodput), too_late
    return found


def seen(goodput: float, p99_ms: float = 1.0, too_late: int = 0, rss: int = 100) -> Seen:
    return Seen(
        outcome=outcome(goodput, p99_ms, too_late),
        beside=None,
        health=outcome(100.0),
        rss=rss,
        server_cpu=1.0,
        postgres_cpu=0.1,
        load_cpu=0.5,
        late_ms=0.1,
        kept_up=True,
    )


def alone(*rounds: dict[str, Seen]) -> Result:
    well = {load: seen(min(times, 1.0) * PEAK) for load, times in LOADS.items()}
    return Result(Case(VERIFY), [Round(PEAK, well | other) for other in rounds])


def met(result: Result) -> dict[str, bool]:
    targets = [figure.target() for figure in figures([result])]
    return {target.name: target.met for target in targets if target is not None}


def missed(result: Result) -> list[str]:
    return [name for name, reached in met(result).items() if not reached]


def test_server_that_does_as_well_as_ever_reaches_all():
    """There are two targets to each load, one of memory and one of health checks."""
    reached = met(alone({}, {}, {}))
    assert len(reached) == 2 * 3 + 1 + 1
    assert all(reached.values())


@pytest.mark.parametrize(
    ("at_10", "what"),
    [
        (seen(0.89 * PEAK), "goodput by the peak"),
        (seen(PEAK, p99_ms=5.1), "p99 by unloaded"),
        # Those that were answered were answered fast.
        (seen(PEAK, too_late=2), "p99 by unloaded"),
    ],
)
def test_each_failing_is_seen(at_10, what):
    """Less goodput, slower answers and answers too late miss a target, that one alone."""
    assert missed(alone({"10×": at_10})) == [f"Verify, warm, native at 10×, {what}, times"]


def test_memory_is_compared_from_the_first_round_to_the_last():
    """What the server has grown by from one 10× to the last one."""
    grown = alone({"10×": seen(PEAK, rss=100)}, {}, {"10×": seen(PEAK, rss=106)})
    assert missed(grown) == [
        "Verify, warm, native at 10×, server memory, last round by first, times"
    ]


def test_health_check_without_an_answer_is_seen():
    """All of them are to be answered, and one that is not misses."""
    dead = outcome(99.0)
    dead.latencies.pop()
    flooded = replace(seen(PEAK), health=dead)
    assert missed(alone({"10×": flooded}, {})) == [
        "health checks during floods, native, answered SERVING, times"
    ]


def test_flood_of_another_is_compared_with_none():
    """Half of what is answered without the flood is to be answered beside it."""
    for goodput, reached in ((251.0, True), (249.0, False)):
        slices = {ALONE: seen(500.0), FLOODED: seen(goodput)}
        result = Result(Case(VERIFY, CREATE), [Round(PEAK, slices)])
        assert (
            met(result)["Verify beside Create, native at 10×, goodput by alone, times"] is reached
        )

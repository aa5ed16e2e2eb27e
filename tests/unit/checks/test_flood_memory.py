"""The criterion for memory in the benchmark of anonymous floods."""

import pytest

from tests.benchmarks.flood import Result, Slice, problems


def measured(*resident: float) -> Result:
    slices = [Slice(1.0, 1.0, mib) for mib in resident]
    return Result(slices, slices)


@pytest.mark.parametrize(
    ("resident", "grows"),
    [
        # It fills up, and stays.
        ((138, 144, 151, 156, 161, 163, 166, 165, 164), False),
        # One burst.
        ((138, 144, 150, 150, 151, 150, 150, 199, 151), False),
        # A leak of 10 MiB a round.
        ((80, 90, 100, 110, 120, 130, 140, 150, 160), True),
        ((150, 150, 150, 150, 180, 180), True),
        ((150,), False),
    ],
)
def test_only_lasting_growth_is_a_leak(resident: tuple[float, ...], grows: bool) -> None:
    """Memory that fills up at first is not a leak, and neither is one burst. Memory that grows from
    the middle of the run to its end is one."""
    found = problems({"native": measured(*resident)})
    assert bool(found) is grows, found

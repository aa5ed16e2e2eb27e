"""Growth is distinguished from noise, and measured."""

import math
import random

import pytest

from tests.soak.report import LIMITS
from tests.soak.slope import BLOCKS_MIN, Limit, blocks, theil_sen, trend

MEGABYTE = 1e6
LIMIT = Limit(absolute=2 * MEGABYTE, share=0.02)
SECONDS = 900


def series(function, every: float = 5.0, seconds: float = SECONDS):
    return [(n * every, function(n * every)) for n in range(int(seconds / every))]


def test_slope_of_a_line() -> None:
    """The slope of a line is exact, whatever its offset, and its range has zero width."""
    slope = theil_sen([(t, 3.0 * t + 7.0) for t in range(20)])
    assert (slope.per_second, slope.low, slope.high) == pytest.approx((3.0, 3.0, 3.0))


def test_slope_ignores_outliers() -> None:
    """Outliers in a fifth of the points change the slope very little."""
    points = [(float(t), 2.0 * t + (1e6 if t % 5 == 0 else 0.0)) for t in range(50)]
    assert theil_sen(points).per_second == pytest.approx(2.0, rel=0.2)


def test_range_has_the_stated_confidence() -> None:
    """For pure noise, about one range in a hundred does not contain the true slope."""
    randomness = random.Random(7)  # noqa: S311 - repeatable
    missed = 0
    for _ in range(400):
        slope = theil_sen([(float(t), 0.5 * t + randomness.gauss(0, 10)) for t in range(24)])
        missed += not slope.low <= 0.5 <= slope.high
    assert missed <= 10


def test_blocks_are_medians_in_order() -> None:
    """A block has its median time and value; if there are few points, each is a block."""
    points = [(float(t), float(t % 3)) for t in range(9)]
    assert blocks(points, 3) == [(1.0, 1.0), (4.0, 1.0), (7.0, 1.0)]
    assert blocks(points[:2], 3) == points[:2]
    assert blocks([], 3) == []


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_flat(seed: int) -> None:
    """Correlated noise, as from an allocator, is not growth: one per cent up and down."""
    randomness = random.Random(seed)  # noqa: S311 - repeatable
    drift = 0.0

    def noisy(_: float) -> float:
        nonlocal drift
        drift = 0.9 * drift + randomness.gauss(0, 0.2 * MEGABYTE)
        return 90 * MEGABYTE + drift

    assert not trend(series(noisy), LIMIT).grows


@pytest.mark.parametrize("seed", range(20))
def test_leak_is_found_in_the_noise(seed: int) -> None:
    """A leak of 64 bytes in each of 75 calls a second is found in a quarter of an hour."""
    randomness = random.Random(seed)  # noqa: S311 - repeatable

    def leaking(at: float) -> float:
        return 90 * MEGABYTE + 64 * 75 * at + randomness.gauss(0, 0.2 * MEGABYTE)

    found = trend(series(leaking), LIMIT)
    assert found.grows
    assert found.slope is not None
    assert found.slope.low < 64 * 75 < found.slope.high


def test_steps_are_growth() -> None:
    """A leak in steps of whole arenas is growth too."""
    assert trend(series(lambda at: 90 * MEGABYTE + at // 60 * MEGABYTE), LIMIT).grows


def test_a_single_step_is_not_growth() -> None:
    """A series that rises once and stays is not growth: a peak of load leaves its arenas behind."""
    step = series(lambda at: (90 + 10 * (at > SECONDS / 3)) * MEGABYTE)
    assert not trend(step, LIMIT).grows


def test_initial_fill_is_not_a_leak() -> None:
    """A series that fills up to its bound is not growth, even if it rose by more than the limit."""
    filling = series(lambda at: (90 + 20 * (1 - math.exp(-at / 100))) * MEGABYTE)
    assert not trend(filling, LIMIT).grows


@pytest.mark.parametrize("unit", ["descriptors", "tasks", "threads"])
def test_rare_leaks_are_found(unit: str) -> None:
    """Eighteen leaked descriptors, tasks or threads, of the ten thousand that open in a quarter of
    an hour, are found among those that open and close."""
    randomness = random.Random(1)  # noqa: S311 - repeatable
    limit = LIMITS[unit]
    flat = series(lambda _: 60 + randomness.randint(-12, 12))
    leaking = series(lambda at: 60 + int(2 * at / 100) + randomness.randint(-12, 12))
    assert not trend(flat, limit).grows
    assert trend(leaking, limit).grows


def test_falling_is_flat() -> None:
    """A falling series does not grow."""
    assert not trend(series(lambda at: 90 * MEGABYTE - 1e4 * at), LIMIT).grows


def test_too_short_to_tell() -> None:
    """A handful of samples, or none, has no slope."""
    few = series(lambda at: at * MEGABYTE)[: BLOCKS_MIN - 1]
    assert trend(few, LIMIT).slope is None
    assert not trend(few, LIMIT).grows
    assert trend([], LIMIT).slope is None

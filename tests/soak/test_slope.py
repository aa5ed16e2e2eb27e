"""Growth is distinguished from noise, and measured."""

import math
import random

import pytest

from tests.soak.report import LIMITS
from tests.soak.slope import BLOCKS_MIN, Limit, trend

MEGABYTE = 1e6
LIMIT = Limit(absolute=2 * MEGABYTE, share=0.02)
SECONDS = 900


def series(function, every: float = 5.0, seconds: float = SECONDS):
    return [(n * every, function(n * every)) for n in range(int(seconds / every))]


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


def test_a_single_step_is_not_growth() -> None:
    """A single rise is not growth: after a peak of load, the allocator keeps its arenas."""
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


def test_too_short_to_tell() -> None:
    """A handful of samples, or none, has no slope."""
    few = series(lambda at: at * MEGABYTE)[: BLOCKS_MIN - 1]
    assert trend(few, LIMIT).slope is None
    assert not trend(few, LIMIT).grows
    assert trend([], LIMIT).slope is None

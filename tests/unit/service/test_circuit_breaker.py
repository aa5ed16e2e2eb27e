"""A database that is away is knocked at by one at a time, with pauses that differ."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.postgres import circuit_breaker
from latchkey_service.postgres.circuit_breaker import (
    ATTEMPTS_MAX,
    RECONNECT_SECONDS,
    Attempt,
    CircuitBreaker,
    spread,
)
from latchkey_service.postgres.connections import POOL_SIZE_MAX

ORDINARY, PROBE = Attempt.ORDINARY, Attempt.PROBE


class World:
    def __init__(self, randomness: float = 0.0) -> None:
        self.now = 1_000.0
        self.breaker = CircuitBreaker(lambda: self.now, lambda: randomness)

    def begins(self) -> list[Attempt]:
        """The attempts that may begin now, and do."""
        begun = []
        while (attempt := self.breaker.begin()) is not None:
            begun.append(attempt)
        return begun

    def doubts(self) -> bool:
        return self.breaker.half_open


@given(st.floats(0, 1e3), st.floats(0, 1, exclude_max=True))
def test_spread(seconds: float, randomness: float) -> None:
    """A pause is half of what it may be to all of it."""
    assert seconds / 2 <= spread(seconds, randomness) <= seconds


def test_workers_do_not_knock_in_step() -> None:
    """Of workers that lost the database at one moment, no more than a few come back in a tenth of
    the time that they come back in."""
    randomness = random.Random(1)  # noqa: S311 - repeatable
    pauses = sorted(spread(1.0, randomness.random()) for _ in range(200))
    for since in pauses:
        assert sum(since <= pause < since + 0.05 for pause in pauses) < 40


def test_all_may_try_while_it_works() -> None:
    """As many attempts as there are connections, and one for each that has ended."""
    # Verify, health, the lease, notifications and the wait of Deletes have one each.
    assert ATTEMPTS_MAX == POOL_SIZE_MAX + 5
    world = World()
    assert world.begins() == [ORDINARY] * ATTEMPTS_MAX
    world.breaker.succeed(ORDINARY)
    assert world.begins() == [ORDINARY]


def test_a_failure_is_looked_into_at_once() -> None:
    """After a failure one tries at once, and nobody else meanwhile; if that works, all may."""
    world = World()
    assert world.begins() == [ORDINARY] * ATTEMPTS_MAX
    assert not world.doubts()
    # All connections were ended while they were made: one event, not many.
    for _ in range(ATTEMPTS_MAX):
        world.breaker.fail(ORDINARY)
        assert world.doubts()
    assert world.begins() == [PROBE]
    assert world.doubts()
    world.breaker.succeed(PROBE)
    assert not world.doubts()
    assert world.begins() == [ORDINARY] * ATTEMPTS_MAX


@pytest.mark.parametrize("randomness", [0.0, 0.99])
def test_one_finds_out_whether_it_is_back(randomness: float) -> None:
    """Once it is known to be away nobody tries for a while, then one does, again and again; if that
    works, all may."""
    world = World(randomness)
    assert world.breaker.begin() is ORDINARY
    world.breaker.fail(ORDINARY)
    pause = spread(RECONNECT_SECONDS, randomness)
    for _ in range(3):
        assert world.begins() == [PROBE]
        world.breaker.fail(PROBE)
        assert not world.doubts()
        assert world.begins() == []
        world.now += pause * 0.99
        assert world.begins() == []
        world.now += pause * 0.02
    assert world.begins() == [PROBE]
    world.breaker.succeed(PROBE)
    assert world.begins() == [ORDINARY] * ATTEMPTS_MAX


def test_attempts_that_hang_are_counted_as_they_end() -> None:
    """Those of before a failure change nothing when they fail too; their places are free again."""
    world = World()
    assert world.begins() == [ORDINARY] * ATTEMPTS_MAX
    world.breaker.fail(ORDINARY)
    assert world.begins() == [PROBE]
    world.breaker.fail(PROBE)
    for _ in range(ATTEMPTS_MAX - 1):
        world.breaker.fail(ORDINARY)
    assert world.begins() == []
    world.now += RECONNECT_SECONDS
    assert world.begins() == [PROBE]
    world.breaker.succeed(PROBE)
    assert world.begins() == [ORDINARY] * ATTEMPTS_MAX


def test_a_late_success_is_one() -> None:
    """An attempt that hung, and led to a connection after all, lets all others try."""
    world = World()
    for _ in range(2):
        assert world.breaker.begin() is ORDINARY
    world.breaker.fail(ORDINARY)
    assert world.breaker.begin() is PROBE
    world.breaker.fail(PROBE)
    world.breaker.succeed(ORDINARY)
    assert world.begins() == [ORDINARY] * ATTEMPTS_MAX


def test_attempts_a_second_are_few() -> None:
    """However many ask, a process tries some eight times in a second without success."""
    world = World()
    attempts = 0
    for _ in range(1_000):
        if (attempt := world.breaker.begin()) is not None:
            attempts += 1
            world.breaker.fail(attempt)
        world.now += 0.001
    # The first, which is told from a hiccup by the second, and then one in each eighth at most.
    assert attempts <= 2 + 8
    assert circuit_breaker.RECONNECT_SECONDS <= 0.25, "service resumes within it"

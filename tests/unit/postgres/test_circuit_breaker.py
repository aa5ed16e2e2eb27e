"""The circuit breaker: while the database is down, a process makes one attempt at a time, with
random pauses."""

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
    jittered,
)
from latchkey_service.postgres.connections import POOL_SIZE_MAX

ORDINARY, PROBE = Attempt.ORDINARY, Attempt.PROBE


class World:
    def __init__(self, randomness: float = 0.0) -> None:
        self.now = 1_000.0
        self.breaker = CircuitBreaker(lambda: self.now, lambda: randomness)

    def begins(self) -> list[Attempt]:
        """Start as many attempts as are permitted now, and return them."""
        begun = []
        while (attempt := self.breaker.begin()) is not None:
            begun.append(attempt)
        return begun

    def half_open(self) -> bool:
        return self.breaker.half_open


@given(st.floats(0, 1e3), st.floats(0, 1, exclude_max=True))
def test_jitter(seconds: float, randomness: float) -> None:
    """A pause is between half of the given time and all of it."""
    assert seconds / 2 <= jittered(seconds, randomness) <= seconds


def test_workers_do_not_retry_in_step() -> None:
    """Of workers that lost the database together, only a few retry within any twentieth of the
    pause."""
    randomness = random.Random(1)  # noqa: S311 - repeatable
    pauses = sorted(jittered(1.0, randomness.random()) for _ in range(200))
    for since in pauses:
        assert sum(since <= pause < since + 0.05 for pause in pauses) < 40


def test_closed_permits_as_many_attempts_as_connections() -> None:
    """While closed, the breaker permits as many attempts as there are connections, and another for
    each that ends."""
    # Verifies, rate limits of tokens, the lease, the wait of Deletes and checks of other hosts have
    # one connection each.
    assert ATTEMPTS_MAX == POOL_SIZE_MAX + 5
    world = World()
    assert world.begins() == [ORDINARY] * ATTEMPTS_MAX
    world.breaker.succeed(ORDINARY)
    assert world.begins() == [ORDINARY]


def test_a_failure_is_probed_at_once() -> None:
    """After a failure, one probe may start at once and nothing else. If it succeeds, the breaker
    closes."""
    world = World()
    assert world.begins() == [ORDINARY] * ATTEMPTS_MAX
    assert not world.half_open()
    # One event ended all connections while they were being made.
    for _ in range(ATTEMPTS_MAX):
        world.breaker.fail(ORDINARY)
        assert world.half_open()
    assert world.begins() == [PROBE]
    assert world.half_open()
    world.breaker.succeed(PROBE)
    assert not world.half_open()
    assert world.begins() == [ORDINARY] * ATTEMPTS_MAX


@pytest.mark.parametrize("randomness", [0.0, 0.99])
def test_open_permits_one_probe_per_pause(randomness: float) -> None:
    """While open, the breaker permits nothing during a pause and then one probe, again and again.
    If a probe succeeds, the breaker closes."""
    world = World(randomness)
    assert world.breaker.begin() is ORDINARY
    world.breaker.fail(ORDINARY)
    pause = jittered(RECONNECT_SECONDS, randomness)
    for _ in range(3):
        assert world.begins() == [PROBE]
        world.breaker.fail(PROBE)
        assert not world.half_open()
        assert world.begins() == []
        world.now += pause * 0.99
        assert world.begins() == []
        world.now += pause * 0.02
    assert world.begins() == [PROBE]
    world.breaker.succeed(PROBE)
    assert world.begins() == [ORDINARY] * ATTEMPTS_MAX


def test_hanging_attempts_free_their_slots_as_they_end() -> None:
    """Attempts from before the failure change nothing when they fail too, and their slots are free
    again."""
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


def test_a_late_success_closes() -> None:
    """An attempt that hung and then connected closes the breaker."""
    world = World()
    for _ in range(2):
        assert world.breaker.begin() is ORDINARY
    world.breaker.fail(ORDINARY)
    assert world.breaker.begin() is PROBE
    world.breaker.fail(PROBE)
    world.breaker.succeed(ORDINARY)
    assert world.begins() == [ORDINARY] * ATTEMPTS_MAX


def test_attempts_per_second_are_few() -> None:
    """However many callers ask, a process makes about eight attempts per second without success."""
    world = World()
    attempts = 0
    for _ in range(1_000):
        if (attempt := world.breaker.begin()) is not None:
            attempts += 1
            world.breaker.fail(attempt)
        world.now += 0.001
    # The first failure, the probe that confirms it, then at most one in each eighth of a second.
    assert attempts <= 2 + 8
    assert circuit_breaker.RECONNECT_SECONDS <= 0.25, "service resumes within this pause"

"""A database that is away is knocked at by one at a time, with pauses that differ."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_service import reconnection
from latchkey_service.database import POOL_SIZE_MAX
from latchkey_service.reconnection import ATTEMPTS_MAX, RECONNECT_SECONDS, Reconnection, spread


class World:
    def __init__(self, randomness: float = 0.0) -> None:
        self.now = 1_000.0
        self.reconnection = Reconnection(lambda: self.now, lambda: randomness)

    def begins(self) -> int:
        """How many attempts may begin now, and do."""
        begun = 0
        while self.reconnection.begin():
            begun += 1
        return begun


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
    assert world.begins() == ATTEMPTS_MAX
    world.reconnection.succeed()
    assert world.begins() == 1


@pytest.mark.parametrize("randomness", [0.0, 0.99])
def test_one_finds_out_whether_it_is_back(randomness: float) -> None:
    """After a failure nobody tries for a while, then one does; if that works, all may."""
    world = World(randomness)
    assert world.reconnection.begin()
    world.reconnection.fail()
    pause = spread(RECONNECT_SECONDS, randomness)
    for _ in range(3):
        assert world.begins() == 0
        world.now += pause * 0.99
        assert world.begins() == 0
        world.now += pause * 0.02
        assert world.begins() == 1
        world.reconnection.fail()
    world.now += pause
    assert world.begins() == 1
    world.reconnection.succeed()
    assert world.begins() == ATTEMPTS_MAX


def test_attempts_that_hang_are_waited_for() -> None:
    """While those of before a failure still hang, none joins them; each that ends is counted."""
    world = World()
    assert world.begins() == ATTEMPTS_MAX
    world.reconnection.fail()
    world.now += RECONNECT_SECONDS
    assert world.begins() == 0
    for _ in range(ATTEMPTS_MAX - 1):
        world.reconnection.fail()
    world.now += RECONNECT_SECONDS
    assert world.begins() == 1


def test_a_late_success_is_one() -> None:
    """An attempt that hung, and led to a connection after all, lets all others try."""
    world = World()
    assert world.reconnection.begin()
    assert world.reconnection.begin()
    world.reconnection.fail()
    world.reconnection.succeed()
    assert world.begins() == ATTEMPTS_MAX


def test_attempts_a_second_are_few() -> None:
    """However many ask, a process tries no more than eight times in a second without success."""
    world = World()
    attempts = 0
    for _ in range(1_000):
        if world.reconnection.begin():
            attempts += 1
            world.reconnection.fail()
        world.now += 0.001
    assert attempts <= 8
    assert reconnection.RECONNECT_SECONDS <= 0.25, "service resumes within it"

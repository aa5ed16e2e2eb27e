"""Retries as a pure function of time, randomness and the results of attempts."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latchkey import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    LatchkeyError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    UnexpectedStatus,
    _retry,
)


class World:
    """A clock that only sleeps and attempts advance."""

    def __init__(self, *failures: LatchkeyError | None, attempt_seconds: float = 0.0) -> None:
        self.now = 1000.0
        self.failures = list(failures)
        self.attempt_seconds = attempt_seconds
        self.attempts: list[tuple[float, float]] = []  # start and remaining seconds
        self.slept: list[float] = []

    async def attempt(self, left_seconds: float) -> str:
        self.attempts.append((self.now, left_seconds))
        self.now += self.attempt_seconds
        failure = self.failures.pop(0) if len(self.failures) > 1 else self.failures[0]
        if failure is not None:
            raise failure
        return "answer"

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    async def run(
        self,
        rpc: str = "Get",
        timeout_seconds: float = 5.0,
        budget: _retry.Budget | None = None,
        randomness: Callable[[], float] = lambda: 0.5,
    ) -> str:
        return await _retry.run(
            rpc,
            self.attempt,
            timeout_seconds=timeout_seconds,
            budget=budget or _retry.Budget(),
            monotonic=lambda: self.now,
            sleep=self.sleep,
            randomness=randomness,
        )


@pytest.mark.parametrize("rpc", list(_retry.TIMEOUTS_SECONDS))
async def test_lost_answers_are_retried(rpc: str) -> None:
    """Every call is safe to repeat and survives a transient UNAVAILABLE."""
    world = World(Unavailable("x"), Unavailable("x"), None)
    assert await world.run(rpc) == "answer"
    assert len(world.attempts) == 3


def unsent() -> Unavailable:
    error = Unavailable("no connection")
    error.unsent = True
    return error


async def test_an_attempt_that_was_sent_is_not_hidden_by_a_later_one() -> None:
    """If an early attempt may have taken effect, the raised error does not claim that nothing was
    changed, however the later attempts fail."""
    lost, refused = Unavailable("lost"), ResourceExhausted("full")
    for last in (unsent(), refused):
        world = World(unsent(), lost, last)
        with pytest.raises(Unavailable) as caught:
            await world.run("Create")
        assert caught.value is lost
        assert not caught.value.unsent
        assert caught.value.__context__ is None or caught.value.__suppress_context__


async def test_a_call_that_was_never_sent_says_so() -> None:
    """If no attempt found a connection, the raised error says that nothing was changed."""
    world = World(unsent())
    with pytest.raises(Unavailable) as caught:
        await world.run("Create")
    assert caught.value.unsent
    assert len(world.attempts) == _retry.ATTEMPTS_MAX


@pytest.mark.parametrize(
    "failure",
    [
        *(DeadlineExceeded("x"), NotFound("x"), InvalidArgument("x"), AlreadyExists("x")),
        *(PermissionDenied("x"), Unauthenticated("x"), InternalError("x"), UnexpectedStatus("x")),
        *(FailedPrecondition("x"), ResourceExhausted("too large")),
    ],
)
async def test_final_errors_are_not_retried(failure: LatchkeyError) -> None:
    """Every other error is raised at once and does not use the retry budget."""
    world, budget = World(failure), _retry.Budget()
    for _ in range(int(_retry.BUDGET_TOKENS_MAX)):
        with pytest.raises(type(failure)):
            await world.run(budget=budget)
    assert len(world.attempts) == _retry.BUDGET_TOKENS_MAX
    world = World(Unavailable("x"), None)
    assert await world.run(budget=budget) == "answer"


@pytest.mark.parametrize("rpc", list(_retry.TIMEOUTS_SECONDS))
async def test_rejections_because_of_load_are_retried(rpc: str) -> None:
    """If the rejection states a delay, every method is retried after it, since no work began."""
    refusal = ResourceExhausted("x", retry_after=timedelta(seconds=0.25))
    world = World(refusal, refusal, None)
    assert await world.run(rpc) == "answer"
    assert len(world.attempts) == 3
    assert min(world.slept) >= 0.25


async def test_no_retry_after_the_deadline() -> None:
    """If the requested delay outlasts the deadline, the error is raised at once."""
    world = World(ResourceExhausted("x", retry_after=timedelta(seconds=2)))
    with pytest.raises(ResourceExhausted):
        await world.run("Verify", timeout_seconds=1.0)
    assert len(world.attempts) == 1
    assert world.slept == []


async def test_attempts_are_bounded() -> None:
    """A call to a dead service makes at most five attempts, whatever its deadline."""
    world = World(Unavailable("x"))
    with pytest.raises(Unavailable):
        await world.run(timeout_seconds=1e9)
    assert len(world.attempts) == _retry.ATTEMPTS_MAX == 5


async def test_all_delays_fit_into_the_shortest_deadline() -> None:
    """Verify's one second suffices for every attempt if the service rejects at once."""
    world = World(Unavailable("x"))
    with pytest.raises(Unavailable):
        await world.run("Verify", _retry.VERIFY_TIMEOUT_SECONDS, randomness=lambda: 1.0)
    assert len(world.attempts) == _retry.ATTEMPTS_MAX
    assert sum(world.slept) <= 0.75


async def test_deadline_covers_attempts_and_delays() -> None:
    """Every attempt gets the remaining time. No delay exceeds it."""
    world = World(Unavailable("x"), attempt_seconds=0.3)
    with pytest.raises(Unavailable):
        await world.run(timeout_seconds=1.0)
    assert 1 < len(world.attempts) < _retry.ATTEMPTS_MAX
    for when, left in world.attempts:
        assert left == pytest.approx(1001.0 - when)
    assert world.now <= 1001.0 + world.attempt_seconds


async def test_the_cause_is_raised_if_waiting_is_useless() -> None:
    """If the service requests a delay longer than the deadline, its error is raised at once."""
    world = World(Unavailable("busy", retry_after=timedelta(seconds=10)))
    with pytest.raises(Unavailable, match="busy"):
        await world.run(timeout_seconds=1.0)
    assert world.slept == []


@given(
    st.integers(1, 100),
    st.none() | st.floats(0, 1e6).map(lambda s: timedelta(seconds=s)),
    st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None)  # the machine may be busy
def test_delays_honour_retry_info_and_are_bounded(
    failures: int, retry_after: timedelta | None, randomness: float
) -> None:
    """A delay is at least the requested one, and at most that plus the backoff."""
    delay = _retry.delay_seconds(failures, retry_after, randomness)
    asked = retry_after.total_seconds() if retry_after else 0.0
    assert delay >= asked
    assert 0.025 <= delay <= max(asked, 0.5) + _retry.BACKOFF_MAX_SECONDS / 2


def test_delays_are_spread() -> None:
    """Clients that failed together return at different times, even with the same RetryInfo."""
    for asked in (None, timedelta(seconds=0.25), timedelta(seconds=1)):
        soonest, latest = (_retry.delay_seconds(1, asked, r) for r in (0.0, 0.99))
        assert latest > 1.4 * soonest


async def test_retry_budget_empties_and_refills() -> None:
    """During an outage each call makes one attempt. After enough answers, retries resume."""
    budget = _retry.Budget()
    attempts = []
    for _ in range(5):
        world = World(Unavailable("x"))
        with pytest.raises(Unavailable):
            await world.run(budget=budget)
        attempts.append(len(world.attempts))
    assert attempts[0] == _retry.ATTEMPTS_MAX
    assert attempts[-1] == 1
    for _ in range(200):
        await World(None).run(budget=budget)
    world = World(Unavailable("x"), None)
    assert await world.run(budget=budget) == "answer"


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_deadlines_are_finite(seconds: float) -> None:
    """An invalid deadline is rejected before anything is sent."""
    with pytest.raises(InvalidArgument) as caught:
        _retry.checked_timeout(seconds)
    assert caught.value.field_violations[0].field == "timeout_seconds"

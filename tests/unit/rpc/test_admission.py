"""Admission control: slots, their queue and rejections, with a clock that the test controls."""

import asyncio
import contextlib
import random
from collections.abc import Callable

import pytest
from latchkey_service import queue_limit
from latchkey_service.errors import (
    BUSY,
    NO_ANSWER,
    FieldViolation,
    InvalidArgument,
    LatchkeyError,
    NotFound,
    Overloaded,
    StoreUnavailable,
)
from latchkey_service.queue_limit import QueueLimit
from latchkey_service.rpc import admission
from latchkey_service.rpc.admission import ConcurrencyLimiter, RejectionPacer, wait_seconds

LONG = 1_000.0
PATIENT = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Work:
    """Calls that hold a slot until the test ends them."""

    def __init__(self, limiter: ConcurrencyLimiter) -> None:
        self._limiter = limiter
        self.started: list[int] = []
        self._ends: dict[int, asyncio.Event] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def call(self, number: int, seconds: float = PATIENT) -> "asyncio.Task[None]":
        """Start a call, and let it run as far as it can."""
        self._limiter.check()
        self._ends[number] = asyncio.Event()
        task = self.tasks[number] = asyncio.create_task(self._run(number, seconds))
        await settle()
        return task

    async def end(self, number: int) -> None:
        self._ends[number].set()
        await settle()

    async def end_all(self) -> None:
        for end in self._ends.values():
            end.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)

    async def _run(self, number: int, seconds: float) -> None:
        async with self._limiter.slot(seconds):
            self.started.append(number)
            await self._ends[number].wait()


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def call_at_once(limiter: ConcurrencyLimiter) -> None:
    """Show that calls take no time."""
    async with limiter.slot(PATIENT):
        pass


def rejected(limiter: ConcurrencyLimiter) -> LatchkeyError:
    with pytest.raises(LatchkeyError) as caught:
        limiter.check()
    return caught.value


def test_burst_may_queue_but_standing_queue_is_short() -> None:
    """A queue that does not drain is cut short, until no call has been rejected for a while."""
    limit, now = QueueLimit(standing=2, burst=50), 1_000.0
    assert not limit.rejects(0, now)
    assert [limit.rejects(waiting, now) for waiting in (49, 50)] == [False, True]
    now += queue_limit.STANDING_SECONDS - 0.01
    assert not limit.rejects(49, now)
    now += 0.02
    assert [limit.rejects(waiting, now) for waiting in (1, 2, 49)] == [False, True, True]
    # Empty for a moment, which does not end the restriction.
    assert not limit.rejects(0, now)
    now += queue_limit.CALM_SECONDS - 0.01
    assert [limit.rejects(waiting, now) for waiting in (0, 1, 2)] == [False, False, True]
    now += queue_limit.CALM_SECONDS
    assert [limit.rejects(waiting, now) for waiting in (0, 49, 50)] == [False, False, True]


def test_estimated_wait() -> None:
    """With four busy slots, one becomes free in every quarter of a call's duration."""
    assert wait_seconds(waiting=0, slots=4, call_seconds=0.1) == pytest.approx(0.025)
    assert wait_seconds(waiting=7, slots=4, call_seconds=0.1) == pytest.approx(0.2)


async def test_limited_concurrency_in_order_of_arrival() -> None:
    """No more calls than slots work at once; queued calls start in order of arrival."""
    work = Work(ConcurrencyLimiter(2, 100, Clock()))
    for number in range(5):
        await work.call(number)
    assert work.started == [0, 1]
    await work.end(1)
    assert work.started == [0, 1, 2]
    await work.end(0)
    await work.end(2)
    assert work.started == [0, 1, 2, 3, 4]
    await work.end_all()


async def test_new_call_does_not_overtake_the_queue() -> None:
    """A slot that was passed on counts as taken, even before its new holder has run."""
    limiter = ConcurrencyLimiter(1, 100, Clock())
    work = Work(limiter)

    async def twice() -> None:
        async with limiter.slot(PATIENT):
            await work.call(0)
        async with limiter.slot(PATIENT):
            work.started.append(1)

    again = asyncio.create_task(twice())
    await settle()
    await settle()
    assert work.started == [0]
    await work.end(0)
    await again
    assert work.started == [0, 1]


async def test_standing_queue_rejects_at_once() -> None:
    """A burst may queue. Once the queue stands, the next call is rejected with a reason; queued
    calls stay. The next burst is rejected too, until no call has been rejected for a while."""
    clock = Clock()
    limiter = ConcurrencyLimiter(1, 1_000, clock)
    work = Work(limiter)
    for number in range(1 + admission.BURST):
        await work.call(number)
    assert isinstance(rejected(limiter), Overloaded)
    clock.now += queue_limit.STANDING_SECONDS + 0.01
    for number in range(admission.BURST - admission.STANDING):
        # Calls still finish now and then, so load is the cause.
        await work.end(number)
        assert rejected(limiter).reason == "OVERLOADED"
    await work.end(admission.BURST - admission.STANDING)
    await work.call(1_000)
    assert rejected(limiter).reason == "OVERLOADED"
    await work.end_all()

    async def burst(first: int) -> int:
        """Return how many calls of a burst are accepted."""
        taken = 0
        with contextlib.suppress(Overloaded):
            for number in range(first, first + 1 + admission.BURST):
                await work.call(number)
                taken += 1
        return taken

    assert await burst(2_000) == 1 + admission.STANDING
    await work.end_all()
    clock.now += queue_limit.CALM_SECONDS + 0.01
    assert await burst(3_000) == 1 + admission.BURST
    await work.end_all()


async def test_unreachable_deadline_is_rejected_at_once() -> None:
    """A call that would still queue at its deadline is rejected at once; any other waits."""
    clock = Clock()
    limiter = ConcurrencyLimiter(1, 100, clock)
    work = Work(limiter)
    for number in range(60):
        # Calls take a second here.
        await work.call(number)
        clock.now += 1.0
        await work.end(number)
    await work.call(100)
    hasty = await work.call(101, seconds=0.5)
    with pytest.raises(Overloaded, match="after the deadline"):
        await hasty
    patient = await work.call(102, seconds=1.5)
    assert not patient.done()
    await work.end_all()
    assert work.started[-1] == 102


async def test_hanging_database_is_not_reported_as_overload() -> None:
    """If no call has finished for a while, the error says that the database does not respond.
    The first calls of a process may take longer, because they also connect."""
    soon, later = queue_limit.STUCK_SECONDS, admission.STUCK_FIRST_SECONDS
    for known, seconds, hangs in ((True, soon, True), (False, later, True), (False, soon, False)):
        limiter = ConcurrencyLimiter(8, 1_000, clock := Clock())
        if known:
            await call_at_once(limiter)
        work = Work(limiter)
        for number in range(8 + 8 * admission.STANDING):
            await work.call(number)
        clock.now += seconds + 0.01
        assert isinstance(rejected(limiter), StoreUnavailable if hangs else Overloaded)
        await work.end_all()


async def test_one_slow_call_is_reported_as_overload() -> None:
    """In a queue with a single slot, one slow call does not show that the database hangs. A call
    that is slower than any healthy one does."""
    clock = Clock()
    limiter = ConcurrencyLimiter(1, 1_000, clock)
    await call_at_once(limiter)
    work = Work(limiter)
    for number in range(1 + admission.STANDING):
        await work.call(number)
    clock.now += 0.7
    assert rejected(limiter).reason == "OVERLOADED"
    clock.now += 0.2
    assert rejected(limiter).reason == "DATABASE_UNAVAILABLE"
    await work.end_all()


async def test_first_call_shows_how_long_calls_take() -> None:
    """A queue whose first call took a second expects the same of the next ones."""
    clock = Clock()
    limiter = ConcurrencyLimiter(1, 1_000, clock)
    work = Work(limiter)
    await work.call(0)
    clock.now += 1.0
    await work.end(0)
    for number in (1, 2):
        await work.call(number)
    clock.now += 4.9
    assert rejected(limiter).reason == "OVERLOADED"
    clock.now += 0.2
    assert rejected(limiter).reason == "DATABASE_UNAVAILABLE"
    await work.end_all()


async def test_answers_in_another_queue_show_that_the_database_responds() -> None:
    """A queue full of slow calls blames load as long as the database answers calls of other queues.
    A request that is refused without a query does not count as an answer."""
    clock, answers = Clock(), admission.Answers()
    slow, other = (ConcurrencyLimiter(1, 1_000, clock, answers=answers) for _ in range(2))
    await call_at_once(slow)
    work = Work(slow)
    for number in range(1 + admission.STANDING):
        await work.call(number)

    async def answered(error: Exception | None) -> str:
        with contextlib.suppress(LatchkeyError):
            async with other.slot(PATIENT):
                if error is not None:
                    raise error
        return rejected(slow).reason

    clock.now += 1.0
    assert await answered(InvalidArgument(FieldViolation("name", "is empty"))) == (
        "DATABASE_UNAVAILABLE"
    )
    assert await answered(NotFound("no such token")) == "OVERLOADED"
    clock.now += 1.0
    assert rejected(slow).reason == "DATABASE_UNAVAILABLE"
    assert await answered(None) == "OVERLOADED"
    await work.end_all()


async def test_rejection_says_when_a_turn_would_have_come() -> None:
    """RetryInfo follows the pace of the queue, between a quarter of a second and a second. A
    caller that retries five times outlasts a queue of slow calls."""
    for call_seconds, pause in ((0.01, 0.25), (0.3, 0.6), (2.0, 1.0)):
        clock = Clock()
        limiter = ConcurrencyLimiter(1, 1_000, clock)
        work = Work(limiter)
        await work.call(0)
        clock.now += call_seconds
        await work.end(0)
        for number in (1, 2):
            await work.call(number)
        clock.now += queue_limit.STANDING_SECONDS + 0.01
        error = rejected(limiter)
        assert error.reason == "OVERLOADED"
        assert error.retry_seconds == pytest.approx(pause)
        await work.end_all()


async def test_wait_for_a_slot_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait is bounded even for callers without a deadline."""
    monkeypatch.setattr(admission, "QUEUE_SECONDS_MAX", 0.01)
    limiter = ConcurrencyLimiter(1, 100, Clock())
    work = Work(limiter)
    await work.call(0)
    waiting = await work.call(1)
    with pytest.raises(Overloaded):
        await waiting
    await work.end_all()
    assert work.started == [0]


async def test_released_slot_frees_capacity_but_call_still_counts() -> None:
    """A Delete that waits for verifiers releases its slot, once, but counts against the total."""
    limiter = ConcurrencyLimiter(1, 2, Clock())
    ends = asyncio.Event()

    async def waiting() -> None:
        async with limiter.slot(PATIENT) as slot:
            slot.release()
            slot.release()
            await ends.wait()

    task = asyncio.create_task(waiting())
    await settle()
    work = Work(limiter)
    await work.call(0)
    assert work.started == [0]
    assert isinstance(rejected(limiter), Overloaded)
    ends.set()
    await task
    await work.call(1)
    assert work.started == [0]
    await work.end_all()
    assert work.started == [0, 1]


async def test_cancelled_call_passes_its_slot_on() -> None:
    """If a call gets a slot and is cancelled before it can run, the next call gets the slot."""
    limiter = ConcurrencyLimiter(1, 100, Clock())
    work = Work(limiter)

    async def release_and_cancel_the_next() -> None:
        async with limiter.slot(PATIENT):
            await work.call(0)
            await work.call(1)
        work.tasks[0].cancel()

    await asyncio.create_task(release_and_cancel_the_next())
    await settle()
    assert work.started == [1]
    await work.end_all()
    await work.call(2)
    assert work.started == [1, 2]
    await work.end_all()


@pytest.mark.parametrize("seed", range(20))
async def test_no_slot_is_lost_or_shared(seed: int) -> None:
    """Calls arrive, end, fail, release early and are cancelled in any order. There are never
    more running calls than slots, and in the end all slots are free.
    """
    chosen = random.Random(seed)  # noqa: S311 - for order, not for secrets
    count = chosen.randint(1, 4)
    limiter = ConcurrencyLimiter(count, 1_000, Clock())
    at_work = 0

    async def call() -> None:
        nonlocal at_work
        async with limiter.slot(PATIENT) as slot:
            at_work += 1
            assert at_work <= count
            try:
                for _ in range(chosen.randint(0, 4)):
                    await asyncio.sleep(0)
            finally:
                at_work -= 1
            if chosen.random() < 0.3:
                slot.release()
                await asyncio.sleep(0)
            if chosen.random() < 0.2:
                raise LookupError

    tasks: list[asyncio.Task[None]] = []
    for _ in range(300):
        tasks.append(asyncio.create_task(call()))
        for _ in range(chosen.randint(0, 2)):
            await asyncio.sleep(0)
        if chosen.random() < 0.4:
            chosen.choice(tasks).cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert not any(isinstance(end, AssertionError) for end in ends)
    work = Work(limiter)
    for number in range(count):
        await work.call(number)
    assert len(work.started) == count
    await work.end_all()
    assert limiter._total == 0
    assert not limiter._queue


def delays(pacer: RejectionPacer, now: Callable[[], float], count: int) -> list[float]:
    return [pacer.delay_seconds(now()) for _ in range(count)]


def test_rejections_are_paced() -> None:
    """The first rejections go out at once, later ones at a steady rate, and none later than the
    limit. After a pause, the pacer starts afresh."""
    clock = Clock()
    pacer = RejectionPacer()
    step = 1 / admission.REJECTIONS_PER_SECOND
    for _ in range(2):
        at_once = delays(pacer, clock, admission.REJECTIONS_AT_ONCE)
        assert at_once == pytest.approx([0.0] * admission.REJECTIONS_AT_ONCE, abs=1e-6)
        assert delays(pacer, clock, 10) == pytest.approx([n * step for n in range(10)], abs=1e-6)
        latest = max(delays(pacer, clock, 10_000))
        assert latest == pytest.approx(admission.REJECTION_SECONDS_MAX)
        clock.now += admission.REJECTION_SECONDS_MAX + 1.0


def test_rejection_arrives_before_the_caller_stops_waiting() -> None:
    """However many rejections precede it, a caller is answered while it still waits."""
    pacer = RejectionPacer()
    delays(pacer, Clock(), 10_000)
    assert pacer.delay_seconds(Clock().now, 0.1) <= 0.05


async def test_failed_call_marks_the_database_as_unavailable() -> None:
    """While calls fail because of the database, rejected callers get the same error. Cancelled
    calls do not change that; a successful one ends it."""
    limiter = ConcurrencyLimiter(1, 1, Clock())

    async def call(error: Exception | None) -> None:
        async with limiter.slot(PATIENT):
            if error is not None:
                raise error

    async def rejection_while_busy() -> LatchkeyError:
        work = Work(limiter)
        await work.call(0)
        error = rejected(limiter)
        work.tasks[0].cancel()
        await settle()
        return error

    assert isinstance(await rejection_while_busy(), Overloaded)
    with pytest.raises(StoreUnavailable):
        await call(StoreUnavailable("away"))
    assert isinstance(await rejection_while_busy(), StoreUnavailable)
    # The other text may concern the failed call alone.
    assert str(await rejection_while_busy()) == NO_ANSWER
    await call(None)
    assert isinstance(await rejection_while_busy(), Overloaded)
    with pytest.raises(StoreUnavailable):
        await call(StoreUnavailable(BUSY))
    assert str(await rejection_while_busy()) == BUSY

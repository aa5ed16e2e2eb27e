"""Places, the queue for them, and refusals, with a clock that the test moves."""

import asyncio
import contextlib
import random
from collections.abc import Callable

import pytest
from latchkey_service import admission
from latchkey_service.admission import Pacer, Places, QueueBound, leave_place, wait_seconds
from latchkey_service.errors import LatchkeyError, Overloaded, StoreUnavailable

LONG = 1_000.0
PATIENT = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Work:
    """Calls that hold a place until they are told to end."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.begun: list[int] = []
        self._ends: dict[int, asyncio.Event] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def call(self, number: int, seconds: float = PATIENT) -> "asyncio.Task[None]":
        """Let a call come, and get as far as it gets."""
        self._places.check()
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
        async with self._places.place(seconds):
            self.begun.append(number)
            await self._ends[number].wait()


async def settle() -> None:
    """Let everybody run who can."""
    for _ in range(5):
        await asyncio.sleep(0)


def refused(work: Places) -> LatchkeyError:
    with pytest.raises(LatchkeyError) as caught:
        work.check()
    return caught.value


def test_a_burst_may_queue_and_a_standing_queue_is_short() -> None:
    """A queue that does not empty is cut short, and stays so until nobody had to be refused."""
    bound, now = QueueBound(standing=2, burst=50), 1_000.0
    assert not bound.refuses(0, now)
    assert [bound.refuses(waiting, now) for waiting in (49, 50)] == [False, True]
    now += admission.STANDING_SECONDS - 0.01
    assert not bound.refuses(49, now)
    now += 0.02
    assert [bound.refuses(waiting, now) for waiting in (1, 2, 49)] == [False, True, True]
    # Empty for a moment, which is no end of it.
    assert not bound.refuses(0, now)
    now += admission.CALM_SECONDS - 0.01
    assert [bound.refuses(waiting, now) for waiting in (0, 1, 2)] == [False, False, True]
    now += admission.CALM_SECONDS
    assert [bound.refuses(waiting, now) for waiting in (0, 49, 50)] == [False, False, True]


def test_how_long_a_queue_takes() -> None:
    """With four places at work, every fourth part of a call's time somebody leaves."""
    assert wait_seconds(waiting=0, places=4, call_seconds=0.1) == pytest.approx(0.025)
    assert wait_seconds(waiting=7, places=4, call_seconds=0.1) == pytest.approx(0.2)


async def test_so_many_work_and_the_others_come_in_order() -> None:
    """No more than there are places work at once; who came first is next."""
    work = Work(Places(2, 100, Clock()))
    for number in range(5):
        await work.call(number)
    assert work.begun == [0, 1]
    await work.end(1)
    assert work.begun == [0, 1, 2]
    await work.end(0)
    await work.end(2)
    assert work.begun == [0, 1, 2, 3, 4]
    await work.end_all()


async def test_a_newcomer_does_not_pass_those_who_wait() -> None:
    """A place that was passed on is taken, though its new holder has not run yet."""
    places = Places(1, 100, Clock())
    work = Work(places)

    async def twice() -> None:
        async with places.place(PATIENT):
            await work.call(0)
        async with places.place(PATIENT):
            work.begun.append(1)

    again = asyncio.create_task(twice())
    await settle()
    await settle()
    assert work.begun == [0]
    await work.end(0)
    await again
    assert work.begun == [0, 1]


async def test_a_standing_queue_is_refused_at_once_and_a_burst_is_not() -> None:
    """A burst is let in. Once it stands, one more is refused, with a reason, and nobody else is;
    and so the next burst is, until there was nobody to refuse for a while."""
    clock = Clock()
    places = Places(1, 1_000, clock)
    work = Work(places)
    for number in range(1 + admission.BURST):
        await work.call(number)
    assert isinstance(refused(places), Overloaded)
    clock.now += admission.STANDING_SECONDS + 0.01
    for number in range(admission.BURST - admission.STANDING):
        # Somebody leaves now and then: it is the load.
        await work.end(number)
        assert refused(places).reason == "OVERLOADED"
    await work.end(admission.BURST - admission.STANDING)
    await work.call(1_000)
    assert refused(places).reason == "OVERLOADED"
    await work.end_all()

    async def burst(first: int) -> int:
        """Return how many of a burst get in."""
        taken = 0
        with contextlib.suppress(Overloaded):
            for number in range(first, first + 1 + admission.BURST):
                await work.call(number)
                taken += 1
        return taken

    assert await burst(2_000) == 1 + admission.STANDING
    await work.end_all()
    clock.now += admission.CALM_SECONDS + 0.01
    assert await burst(3_000) == 1 + admission.BURST
    await work.end_all()


async def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    """Who would still wait at its deadline is told so before; who would not, waits."""
    clock = Clock()
    places = Places(1, 100, clock)
    work = Work(places)
    for number in range(60):
        # Calls take a second here.
        await work.call(number)
        clock.now += 1.0
        await work.end(number)
    await work.call(100)
    hasty = await work.call(101, seconds=0.5)
    with pytest.raises(Overloaded, match="too late"):
        await hasty
    patient = await work.call(102, seconds=1.5)
    assert not patient.done()
    await work.end_all()
    assert work.begun[-1] == 102


async def test_a_database_that_hangs_is_not_called_load() -> None:
    """Where nobody has left for long, callers are told that the database does not answer."""
    clock = Clock()
    places = Places(1, 1_000, clock)
    work = Work(places)
    for number in range(1 + admission.STANDING):
        await work.call(number)
    clock.now += admission.STUCK_SECONDS + 0.01
    assert isinstance(refused(places), StoreUnavailable)
    await work.end_all()


async def test_nobody_waits_for_a_place_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait is bounded for callers without a deadline too."""
    monkeypatch.setattr(admission, "QUEUE_SECONDS_MAX", 0.01)
    places = Places(1, 100, Clock())
    work = Work(places)
    await work.call(0)
    waiting = await work.call(1)
    with pytest.raises(Overloaded):
        await waiting
    await work.end_all()
    assert work.begun == [0]


async def test_who_leaves_early_makes_room_and_counts_until_it_ends() -> None:
    """A Delete that waits for verifiers holds no place, once; but there are only so many."""
    places = Places(1, 2, Clock())
    ends = asyncio.Event()

    async def resting() -> None:
        async with places.place(PATIENT):
            leave_place()
            leave_place()
            await ends.wait()

    task = asyncio.create_task(resting())
    await settle()
    work = Work(places)
    await work.call(0)
    assert work.begun == [0]
    assert isinstance(refused(places), Overloaded)
    ends.set()
    await task
    await work.call(1)
    assert work.begun == [0]
    await work.end_all()
    assert work.begun == [0, 1]


async def test_a_place_outside_of_calls_is_nobodys() -> None:
    """To leave a place where there is none does nothing."""
    leave_place()


async def test_a_caller_that_leaves_in_the_moment_of_its_turn_passes_it_on() -> None:
    """Cancelled after the place became its own and before it could run: the next one has it."""
    places = Places(1, 100, Clock())
    work = Work(places)

    async def leave_and_cancel_the_next() -> None:
        async with places.place(PATIENT):
            await work.call(0)
            await work.call(1)
        work.tasks[0].cancel()

    await asyncio.create_task(leave_and_cancel_the_next())
    await settle()
    assert work.begun == [1]
    await work.end_all()
    await work.call(2)
    assert work.begun == [1, 2]
    await work.end_all()


@pytest.mark.parametrize("seed", range(20))
async def test_no_place_is_lost_or_had_twice_whatever_happens(seed: int) -> None:
    """Calls that come, end, fail, leave early and are cancelled in any order: never more at work
    than there are places, and in the end all places are free."""
    chosen = random.Random(seed)  # noqa: S311 - for order, not for secrets
    count = chosen.randint(1, 4)
    places = Places(count, 1_000, Clock())
    at_work = 0

    async def call() -> None:
        nonlocal at_work
        async with places.place(PATIENT):
            at_work += 1
            assert at_work <= count
            try:
                for _ in range(chosen.randint(0, 4)):
                    await asyncio.sleep(0)
            finally:
                at_work -= 1
            if chosen.random() < 0.3:
                leave_place()
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
    work = Work(places)
    for number in range(count):
        await work.call(number)
    assert len(work.begun) == count
    await work.end_all()
    assert places._there == 0
    assert not places._queue


def delays(pacer: Pacer, now: Callable[[], float], count: int) -> list[float]:
    return [pacer.delay_seconds(now()) for _ in range(count)]


def test_refusals_are_paced() -> None:
    """The first ones go out at once, the others one after the other at a steady rate, and none
    later than the bound. After a pause it is as in the beginning."""
    clock = Clock()
    pacer = Pacer()
    step = 1 / admission.REFUSALS_PER_SECOND
    for _ in range(2):
        at_once = delays(pacer, clock, admission.REFUSALS_AT_ONCE)
        assert at_once == pytest.approx([0.0] * admission.REFUSALS_AT_ONCE, abs=1e-6)
        assert delays(pacer, clock, 10) == pytest.approx([n * step for n in range(10)], abs=1e-6)
        latest = max(delays(pacer, clock, 10_000))
        assert latest == pytest.approx(admission.REFUSAL_SECONDS_MAX)
        clock.now += admission.REFUSAL_SECONDS_MAX + 1.0


def test_a_refusal_comes_in_time_to_be_heard() -> None:
    """However many are refused before it, a caller is told before it stops waiting."""
    pacer = Pacer()
    delays(pacer, Clock(), 10_000)
    assert pacer.delay_seconds(Clock().now, 0.1) <= 0.05


async def test_where_the_last_one_found_no_database_it_is_not_called_load() -> None:
    """While calls at work fail for the database, callers who are refused are told the same; what
    their callers give up tells nothing; and one that succeeds ends it."""
    places = Places(1, 1, Clock())

    async def call(error: Exception | None) -> None:
        async with places.place(PATIENT):
            if error is not None:
                raise error

    async def told_while_one_is_there() -> LatchkeyError:
        work = Work(places)
        await work.call(0)
        error = refused(places)
        work.tasks[0].cancel()
        await settle()
        return error

    assert isinstance(await told_while_one_is_there(), Overloaded)
    with pytest.raises(StoreUnavailable):
        await call(StoreUnavailable("away"))
    assert isinstance(await told_while_one_is_there(), StoreUnavailable)
    assert isinstance(await told_while_one_is_there(), StoreUnavailable)
    await call(None)
    assert isinstance(await told_while_one_is_there(), Overloaded)

"""Admission control: limits the calls in progress and in the queue, and paces rejections.

A call that queues for longer than its caller needs to ask another server is useless. A call
answered after its deadline has wasted time that others needed. So a limited number of calls may use
the database at once, and the queue for these slots is short:

- A burst may queue, up to `BURST` calls for each slot. A queue that has not been empty for
  `STANDING_SECONDS` is not a burst: demand exceeds capacity, and a long queue would only delay
  every call (CoDel, RFC 8289). Then only `STANDING` calls may wait for each slot, so that an
  accepted call takes at most a few times as long as it does alone, under any load. This lasts until
  no call has been rejected for `CALM_SECONDS`.
- A call whose deadline would pass in the queue is rejected at once.
- Callers take turns, and a full queue makes room for a caller that has less than its share. The
  total has shares too, because most calls in it are Deletes that are already committed: they cannot
  make room. A caller may have no more calls than there are free places (dynamic thresholds,
  Choudhury and Hahne 1998). So n callers that all want more end up with 1/(n+1) each, and the same
  is left for a further one. If they arrive one after another, each gets half of what the others
  left.
- Calls that only take rights away (removals) go before others, and have their own room. While other
  calls wait, every fourth slot goes to those: otherwise anyone who may delete could stop them.

Each role has its own slots, so a flood of calls in one role does not slow the others. Verifies
need no slot. A cached answer costs less than a rejection, and verifies that read the database share
their queries (`batched_lookup.py` bounds them). Two limits bound all calls: the calls per
connection, and the calls that wait to start (`native.py`).

A rejection costs as much as an answer from the cache. `RejectionPacer` keeps callers that retry at
once from using the time that answers need.
"""

import asyncio
import itertools
import math
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from latchkey_service.errors import (
    BUSY,
    CHANGING_OVER,
    NO_ANSWER,
    RETRY_DELAY_SECONDS,
    TOO_LATE,
    AlreadyExists,
    FailedPrecondition,
    LatchkeyError,
    NotFound,
    Overloaded,
    StoreUnavailable,
)
from latchkey_service.fair_queue import FairQueue
from latchkey_service.queue_limit import (
    STUCK_SECONDS,
    QueueLimit,
)

__all__ = [
    "Answers",
    "ConcurrencyLimiter",
    "RejectionPacer",
    "Slot",
    "wait_seconds",
]

TOO_MANY: Final = "Too many calls are waiting for the database; try again shortly."
STANDING: Final = 1
BURST: Final = 25
# Removals that start in a row while other calls wait. A removal waits for one of them at most, and
# a flood of removals leaves others a quarter of the slots.
REMOVALS_IN_A_ROW: Final = 3
# Longest wait for a slot. Statements have the same limit: by then, every slot's holder has failed.
QUEUE_SECONDS_MAX: Final = 2.0
# Without an answer for `STUCK_SECONDS`, as many calls as managers have slots show that the database
# hangs. Fewer calls show it only after longer: a single import of a thousand tokens takes half a
# second.
STUCK_SLOTS: Final = 8
# The period is at least this many times the average duration of a call.
STUCK_CALLS: Final = 5
# Before a call has shown how long calls take. The first ones also connect. An attempt to connect
# fails after this time, which then shows that the database hangs.
STUCK_FIRST_SECONDS: Final = 1.0
# Longest delay that a rejection asks of its caller, before jitter, which at most triples it. A
# longer one would leave the library's five attempts no time within their deadline.
RETRY_SECONDS_MAX: Final = 1.0
# Errors of calls that the database has answered. Others may be raised without a query.
DECIDED_BY_DATABASE: Final = (NotFound, AlreadyExists, FailedPrecondition)
# Texts of failures that say why other calls are rejected. Other texts concern one call alone.
SHARED_FAILURES: Final = (NO_ANSWER, BUSY, CHANGING_OVER)
# Weight of the newest sample in the moving average of a call's duration.
SMOOTHING: Final = 0.1
# This rate takes about 3 % of a core. It rises only where a rejection would otherwise be delayed
# for longer than the maximum. After a pause, a burst of rejections goes out at once.
REJECTIONS_PER_SECOND: Final = 1_000
REJECTIONS_AT_ONCE: Final = 100
REJECTION_SECONDS_MAX: Final = 1.0


def wait_seconds(waiting: int, slots: int, call_seconds: float) -> float:
    """Estimate the wait of the next call in the queue. `call_seconds` is the average duration."""
    return (waiting + 1) / slots * call_seconds


class Answers:
    """When the database last answered a call. The limiters of a process share one."""

    def __init__(self) -> None:
        self.at = -math.inf
        self.needed = False
        """Whether a call has had to wait or has failed. Until then, `at` is not kept: no call reads
        the clock for it."""


class ConcurrencyLimiter:
    """Slots for the calls of one role, and the queue for them. Event loop only.

    At most `count` calls hold a slot. At most `total_max` calls are present: this includes those in
    the queue, and those that have released their slot to wait for something else. Calls without a
    caller's name, as without a policy, share all of the total.
    """

    def __init__(
        self,
        count: int,
        total_max: int,
        monotonic: Callable[[], float],
        answering: Callable[[], float] | None = None,
        answers: Answers | None = None,
    ) -> None:
        self._count = self._free = count
        self._total_max = total_max
        self._total = 0
        # The present calls of each caller.
        self._present: dict[str, int] = {}
        self._monotonic = monotonic
        # Pauses while the event loop is late, because the database does not cause such delays.
        self._answering = answering or monotonic
        # By a number. A future with a result means that its call now holds a slot.
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue(sys.maxsize)
        self._removals: FairQueue[asyncio.Future[None]] = FairQueue(sys.maxsize)
        self._removals_max = count * BURST
        self._removals_in_a_row = 0
        self._numbers = itertools.count()
        self._queue_limit = QueueLimit(count * STANDING, count * BURST)
        # By the clock `_answering`: when the database answered any call, when the queue formed, and
        # when a call failed because of the database, with the text for rejections until it answers.
        self._answers = answers or Answers()
        self._queue_formed_at = 0.0
        self._failed_at = -math.inf
        self._failure = NO_ANSWER
        # Moving average of the time for which calls hold a slot. None before the first one.
        self._call_seconds: float | None = None

    @property
    def used(self) -> int:
        """How many calls hold a slot."""
        return self._count - self._free

    @property
    def queued(self) -> int:
        """How many calls wait for a slot."""
        return self._queue.size + self._removals.size

    def check(self, caller: str = "", *, removal: bool = False) -> None:
        """Reject a call for which there is no room, before any work is done for it.

        Raises Overloaded, or StoreUnavailable if the database hangs. Changes nothing for others:
        the call may still be refused for another reason.
        """
        if self._total >= self._total_max or self._has_its_share(caller):
            raise self._rejection()
        if self._free:
            return
        queue, full = self._room(removal=removal)
        if full and not queue.yields_to(caller):
            raise self._rejection()

    def _has_its_share(self, caller: str) -> bool:
        """Return whether a caller has as many calls present as there are free places."""
        return caller != "" and self._present.get(caller, 0) >= self._total_max - self._total

    def _room(self, *, removal: bool) -> tuple[FairQueue[asyncio.Future[None]], bool]:
        """Return the queue for a call that arrives now, and whether it is full."""
        if removal:
            return self._removals, self._removals.size >= self._removals_max
        return self._queue, self._queue_limit.rejects(self._queue.size, self._monotonic())

    def slot(self, seconds: float, caller: str = "", *, removal: bool = False) -> "Slot":
        """Return a slot as a context manager, for a call with `seconds` left that passed `check`.

        Entering it raises Overloaded or StoreUnavailable, as `check` does. In a full queue, the
        newest call of the caller with the most may be rejected instead.
        """
        return Slot(self, seconds, caller, removal)

    async def acquire(self, seconds: float, caller: str, removal: bool) -> float:  # noqa: FBT001 - from Slot
        """Wait for a slot. Return the time at which the call acquired it."""
        self._enter(caller)
        try:
            # Overtaking the queue would starve it.
            if self._free and not self.queued:
                self._free -= 1
            else:
                await self._wait(seconds, caller, removal=removal)
        except BaseException:
            self.leave(caller)
            raise
        return self._monotonic()

    def release(self, since: float, error: BaseException | None) -> None:
        """Release a slot, held since `since`, to the queue. `error` is how the call ended."""
        if type(error) is StoreUnavailable:
            self._failed_at, text = self._answering(), str(error)
            self._failure = text if text in SHARED_FAILURES else NO_ANSWER
            self._answers.needed = True
        elif error is None or isinstance(error, DECIDED_BY_DATABASE):
            # Any other error says nothing about the database.
            self._failed_at = -math.inf
            if self._answers.needed:
                self._answers.at = self._answering()
            held_seconds = self._monotonic() - since
            average = held_seconds if self._call_seconds is None else self._call_seconds
            self._call_seconds = average + SMOOTHING * (held_seconds - average)
        self._pass_on()

    def leave(self, caller: str) -> None:
        """Leave the limiter after a call of `caller` has ended."""
        self._total -= 1
        left = self._present[caller] = self._present[caller] - 1
        if not left:
            del self._present[caller]

    def _enter(self, caller: str) -> None:
        self._total += 1
        self._present[caller] = self._present.get(caller, 0) + 1

    async def _wait(self, seconds: float, caller: str, *, removal: bool) -> None:
        if not self.queued:
            # The queue was empty, so nothing is stuck yet.
            self._queue_formed_at = self._answering()
            self._answers.needed = True
        queue, full = self._room(removal=removal)
        ahead = queue.ahead_of(caller)
        if not removal:
            ahead += min(self._removals.size, (ahead + 1) * REMOVALS_IN_A_ROW)
        if wait_seconds(ahead, self._count, self._call_seconds or 0.0) > seconds:
            raise self._rejection(TOO_LATE)
        if full:
            displaced = queue.displace(caller)
            if displaced is None:
                raise self._rejection()
            if not displaced.done():
                displaced.set_exception(self._rejection())
        number, future = next(self._numbers), asyncio.get_running_loop().create_future()
        queue.add(number, caller, future, 0)
        try:
            async with asyncio.timeout(QUEUE_SECONDS_MAX):
                await future
        except BaseException as error:
            # The caller left, its deadline passed, or the wait took too long.
            if future.done() and not future.cancelled() and future.exception() is None:
                # A slot became free at the same moment; pass it on.
                self._pass_on()
            queue.remove(number)
            if isinstance(error, TimeoutError):
                raise self._rejection() from None
            raise

    def _pass_on(self) -> None:
        while self.queued:
            (future,) = self._next_queue().take(1)
            if not future.done():
                future.set_result(None)
                return
        self._free += 1

    def _next_queue(self) -> FairQueue[asyncio.Future[None]]:
        """Return the queue whose turn it is, and count its turn. One of them is not empty."""
        if self._removals.size and not (
            self._queue.size and self._removals_in_a_row >= REMOVALS_IN_A_ROW
        ):
            self._removals_in_a_row += 1
            return self._removals
        self._removals_in_a_row = 0
        return self._queue

    def _rejection(self, message: str = TOO_MANY) -> LatchkeyError:
        """Return the error of a call for which there is no room.

        A database that answers any call does not hang. RetryInfo then says when the caller's
        turn would have come, so that five attempts outlast a queue of slow calls.
        """
        answered_at, call_seconds = self._answers.at, self._call_seconds
        if self._failed_at > -math.inf and self._failed_at >= answered_at:
            return StoreUnavailable(self._failure)
        expected = STUCK_FIRST_SECONDS if call_seconds is None else STUCK_CALLS * call_seconds
        longest = max(STUCK_SECONDS * STUCK_SLOTS / self._count, expected)
        silent_seconds = self._answering() - max(answered_at, self._queue_formed_at)
        if self.queued and silent_seconds > longest:
            return StoreUnavailable(NO_ANSWER)
        error = Overloaded(message)
        pause = wait_seconds(self._queue.size, self._count, call_seconds or 0.0)
        error.retry_seconds = min(max(RETRY_DELAY_SECONDS, pause), RETRY_SECONDS_MAX)
        return error


class Slot:
    """A call's slot, from entry until it is released."""

    __slots__ = ("_caller", "_holds", "_limiter", "_removal", "_seconds", "_since")

    def __init__(
        self,
        limiter: ConcurrencyLimiter,
        seconds: float,
        caller: str,
        removal: bool,  # noqa: FBT001 - from `slot`
    ) -> None:
        self._limiter = limiter
        self._seconds = seconds
        self._caller = caller
        self._removal = removal
        self._holds = False
        self._since = 0.0

    async def __aenter__(self) -> Self:
        self._since = await self._limiter.acquire(self._seconds, self._caller, self._removal)
        self._holds = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release(error)
        self._limiter.leave(self._caller)

    def release(self) -> None:
        """Release the slot before the call ends, because the call now only waits."""
        self._release(None)

    def _release(self, error: BaseException | None) -> None:
        if self._holds:
            self._holds = False
            self._limiter.release(self._since, error)


class RejectionPacer:
    """Delays rejections, so that they take a bounded share of the time.

    A delayed caller retries later, because a connection carries a limited number of calls.
    """

    def __init__(
        self,
        per_second: float = REJECTIONS_PER_SECOND,
        seconds_max: float = REJECTION_SECONDS_MAX,
    ) -> None:
        self._per_second = per_second
        self._seconds_max = seconds_max
        self._due = 0.0

    def delay_seconds(self, now: float, seconds: float | None = None) -> float:
        """Return the delay of a rejection that is due now, and count it.

        The delay leaves the caller, who waits for `seconds`, time to receive the answer.
        """
        burst_seconds = REJECTIONS_AT_ONCE / self._per_second
        self._due = min(max(self._due, now - burst_seconds), now + self._seconds_max)
        delay = max(0.0, self._due - now)
        self._due += 1 / self._per_second
        return delay if seconds is None else min(delay, seconds / 2)

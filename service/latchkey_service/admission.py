"""Admission: how many calls are at work at once, how many wait, and who is refused.

A call that waits longer than it would take its caller to ask another server helps nobody, and one
that is answered after its deadline has taken its time from those that could still be met. So calls
that need the database work in so many places at once, and the queue for these is short:

- A burst may queue, up to `BURST` calls for each place. But a queue that has not been empty for
  `STANDING_SECONDS` does not come of a burst: more is asked than can be done, and a long queue only
  makes all late (CoDel, RFC 8289). Then only `STANDING` wait for each place, so that an accepted
  call takes a few times what it takes alone, whatever is asked. So it stays until nobody had to be
  refused for `CALM_SECONDS`.
- Whose deadline would pass in the queue is refused at once.

Each role has places of its own: a flood of one takes nothing from the others. Verifies have none.
Once begun, one that is answered from memory is done before it could be refused, and those that read
share their queries (`lookup.py`, where they are bounded). What bounds them all is how many calls a
connection may have, and how many wait to be begun (`native.py`).

Refusing is not free either: it takes as long as an answer from memory. `Pacer` keeps whoever calls
again at once from taking the time that answers need.
"""

import asyncio
import contextvars
import math
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from latchkey_service.errors import (
    NO_ANSWER,
    TOO_LATE,
    LatchkeyError,
    Overloaded,
    StoreUnavailable,
)

__all__ = ["STUCK_SECONDS", "Pacer", "Place", "Places", "QueueBound", "leave_place", "wait_seconds"]

TOO_MANY: Final = "Too many calls are waiting for the database; try again shortly."
STANDING_SECONDS: Final = 0.1
CALM_SECONDS: Final = 1.0
STANDING: Final = 1
BURST: Final = 25
# Nobody waits longer for a place. Statements have as much: whoever has one has been told by then.
QUEUE_SECONDS_MAX: Final = 2.0
# If no call at work has ended for so long it is not the load, but the database that hangs.
STUCK_SECONDS: Final = 0.1
# But some times as long as calls take.
STUCK_CALLS: Final = 5
# The share of the newest in what a call is thought to take.
SMOOTHING: Final = 0.1
# Some 3 % of a core; more only if so many wait that some would wait too long. Up to so many come
# at once.
REFUSALS_PER_SECOND: Final = 1_000
REFUSALS_AT_ONCE: Final = 100
REFUSAL_SECONDS_MAX: Final = 1.0


class QueueBound:
    """How many may wait in one queue: `burst`, or `standing` where the queue stands."""

    def __init__(self, standing: int, burst: int) -> None:
        self._standing, self._burst = standing, burst
        self._since = 0.0
        self._last_refused = -math.inf

    def empty(self, now: float) -> None:
        """Say that the queue is empty, or as good as that."""
        self._since = now

    def refuses(self, waiting: int, now: float) -> bool:
        """Tell whether one that comes now, while so many wait, may not wait too."""
        if not waiting:
            self.empty(now)
        stands = now - self._since > STANDING_SECONDS or now - self._last_refused < CALM_SECONDS
        if waiting < (self._standing if stands else self._burst):
            return False
        if stands:
            self._last_refused = now
        return True


def wait_seconds(waiting: int, places: int, call_seconds: float) -> float:
    """Return how long the next one in the queue will wait, if a call takes so long."""
    return (waiting + 1) / places * call_seconds


class Places:
    """Places for calls of one role, and the queue. Belongs to the event loop.

    At most `count` work at once, and `in_all` are there: those that wait, and those that have left
    their place to wait for something else, included.
    """

    def __init__(self, count: int, in_all: int, monotonic: Callable[[], float]) -> None:
        self._count = self._free = count
        self._in_all = in_all
        self._there = 0
        self._monotonic = monotonic
        # A future for each; the result says that the place is theirs. In order of arrival.
        self._queue: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._bound = QueueBound(count * STANDING, count * BURST)
        # When one had last done its work, or the queue began; and whether the last one could not.
        self._progress_at = 0.0
        self._failing = False
        self._call_seconds = 0.0

    def check(self) -> None:
        """Refuse a call for which there is no room, before anything is done for it.

        Raises Overloaded, or StoreUnavailable where it is not the load that keeps others from
        leaving.
        """
        if self._there >= self._in_all:
            raise self._refusal()
        if not self._free and self._bound.refuses(len(self._queue), self._monotonic()):
            raise self._refusal()

    def place(self, seconds: float) -> "Place":
        """Return a place to enter, for a call that has so many seconds and was checked.

        To enter it raises Overloaded, or StoreUnavailable, as `check` does.
        """
        return Place(self, seconds)

    async def take(self, seconds: float) -> float:
        """Wait for a place; return when it was taken."""
        self._there += 1
        try:
            # Not past those who wait: they would wait for ever.
            if self._free and not self._queue:
                self._free -= 1
            else:
                await self._wait(seconds)
        except BaseException:
            self._there -= 1
            raise
        return self._monotonic()

    def leave(self, since: float, error: BaseException | None) -> None:
        """Give up a place that was taken then, with this error: to the first in the queue."""
        # Of a caller that left there is nothing to be learned.
        if type(error) is StoreUnavailable:
            self._failing = True
        elif not isinstance(error, asyncio.CancelledError):
            self._failing = False
            self._progress_at = self._monotonic()
            held_seconds = self._progress_at - since
            self._call_seconds += SMOOTHING * (held_seconds - self._call_seconds)
        self._pass_on()

    def go(self) -> None:
        """Be there no more."""
        self._there -= 1

    async def _wait(self, seconds: float) -> None:
        now, waiting = self._monotonic(), len(self._queue)
        if not waiting:
            # Nobody has waited for others to leave before.
            self._progress_at = now
        if wait_seconds(waiting, self._count, self._call_seconds) > seconds:
            raise self._refusal(TOO_LATE)
        future = asyncio.get_running_loop().create_future()
        self._queue[future] = None
        try:
            async with asyncio.timeout(QUEUE_SECONDS_MAX):
                await future
        except BaseException as error:
            # The caller has left, its deadline has passed, or this took too long.
            if future.done() and not future.cancelled():
                # But a place had become free in that very moment, and is the next one's.
                self._pass_on()
            self._queue.pop(future, None)
            if isinstance(error, TimeoutError):
                raise self._refusal() from None
            raise

    def _pass_on(self) -> None:
        while self._queue:
            future, _ = self._queue.popitem(last=False)
            if not future.done():
                future.set_result(None)
                return
        self._free += 1

    def _refusal(self, message: str = TOO_MANY) -> LatchkeyError:
        longest = max(STUCK_SECONDS, STUCK_CALLS * self._call_seconds)
        hangs = self._queue and self._monotonic() - self._progress_at > longest
        stuck = self._failing or hangs
        return StoreUnavailable(NO_ANSWER) if stuck else Overloaded(message)


class Place:
    """A call's place, from when it is entered until it is left or given up."""

    __slots__ = ("_holds", "_places", "_seconds", "_since")

    def __init__(self, places: Places, seconds: float) -> None:
        self._places = places
        self._seconds = seconds
        self._holds = False
        self._since = 0.0

    async def __aenter__(self) -> Self:
        self._since = await self._places.take(self._seconds)
        self._holds = True
        _place.set(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave(error)
        self._places.go()

    def leave(self) -> None:
        """Give it up before the call ends, since what is left of the call is waiting."""
        self._leave(None)

    def _leave(self, error: BaseException | None) -> None:
        if self._holds:
            self._holds = False
            self._places.leave(self._since, error)


# Of the call that runs.
_place: contextvars.ContextVar[Place] = contextvars.ContextVar("place")


def leave_place() -> None:
    """Give up the place of the call that runs, if it has one: it waits for others from now on."""
    place = _place.get(None)
    if place is not None:
        place.leave()


class Pacer:
    """Says when a refusal is to go out, so that refusals take a bounded share of the time.

    Who is refused later calls again later: a connection has only so many calls at once.
    """

    def __init__(self) -> None:
        self._due = 0.0

    def delay_seconds(self, now: float, seconds: float | None = None) -> float:
        """Return how long to wait before the refusal that is due now, and count it.

        Never so long that its caller, who waits for `seconds`, would not be told any more.
        """
        burst_seconds = REFUSALS_AT_ONCE / REFUSALS_PER_SECOND
        self._due = min(max(self._due, now - burst_seconds), now + REFUSAL_SECONDS_MAX)
        delay = max(0.0, self._due - now)
        self._due += 1 / REFUSALS_PER_SECOND
        return delay if seconds is None else min(delay, seconds / 2)

"""The `native` transport's server, with a way in that is bounded and fair.

As it comes (0.5.0) it begins every call as soon as it is there. With hundreds in flight a turn of
the event loop then takes as long as answering all of them, and a call that waits for Postgres waits
for such a turn each time: a flood of verifies would hold up a Create for a second, and a flood of
Creates the verifies. So calls wait in lanes, by role, and a few of each are begun in each turn.

How long the lanes may be is bounded as other queues are (`admission.py`). Health checks have none.

It also forgets calls that were cancelled before they began, which the library keeps for ever, and
ends streams whose clients take nothing, for which the library waits in threads.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

import grpc

# Not as `from pygrpc_native import aio`, which sends the package's lazy attributes (0.5.0) into an
# endless recursion.
import pygrpc_native.aio
from pygrpc_native import EVENT_CANCEL, STREAM_CLOSED, STREAM_FULL

from latchkey_service.access.methods import MANAGER, METHODS, OPEN, OPERATOR, VERIFIER
from latchkey_service.admission import QueueBound
from latchkey_service.errors import StatusParts
from latchkey_service.lenient import BATCH_VERIFY

__all__ = ["Refuse", "Server"]

# Calls begun in a turn: some 0.2 ms of each. A batch may be a thousand verifies. And as long as no
# other call has come for a while, to which turns would be dear, more verifies: each turn costs.
VERIFIES_IN_TURN: Final = 16
VERIFIES_ALONE: Final = 64
ALONE_SECONDS: Final = 1.0
OTHERS_IN_TURN: Final = 4
BATCHES_IN_TURN: Final = 1
# Calls that may wait to be begun where they stand, beside those of the next turn: some 1 ms of
# verifies. And in a burst, some 2 kB each.
STANDING: Final = 48
BURST: Final = 5_000
# It is looked for new calls after so many were begun; for so many at most.
FETCH_AFTER: Final = 48
FETCH_MAX: Final = 256
# What the library's thread may take to send answers, on cores that are busy: a thousand times what
# it takes on others.
ANSWERS_OUT_SECONDS: Final = 0.1
# When a stream is looked at again whose client had no room for a message: twice as late each time.
# And when it is ended.
ROOM_SECONDS_MIN: Final = 0.001
ROOM_SECONDS_MAX: Final = 0.25
UNREAD_SECONDS: Final = 20.0
# Calls that were cancelled and have not come yet. More than are ever on their way.
CANCELLED_MAX: Final = 2_000

Event = Sequence[Any]


class Refuse(Protocol):
    """Says how a call of this path is refused, and after how many seconds.

    `seconds`: how long its caller waits; None: for ever.
    """

    def __call__(self, path: str, seconds: float | None) -> tuple[StatusParts, float]:
        """Count a refusal."""
        ...


class _Lane:
    """Calls that wait to be begun, by id, in order, each with when it came."""

    def __init__(self, in_turn: int) -> None:
        self.in_turn = in_turn
        self.waiting: OrderedDict[int, tuple[float, Event]] = OrderedDict()
        self.bound = QueueBound(STANDING, BURST)

    def take(self, count: int, now: float) -> list[Event]:
        """Take up to so many."""
        count = min(count, len(self.waiting))
        return [_begun_at(now, *self.waiting.popitem(last=False)[1]) for _ in range(count)]


class _Unhurried:
    """The library's part in Rust, but that it ends a moment after it is told to.

    It ends with what its thread has not sent yet. The library tells it when the last call has ended
    for Python, and where cores are busy that was one answer in ten.
    """

    def __init__(self, front: Any) -> None:
        self._front = front

    def __getattr__(self, name: str) -> Any:
        return getattr(self._front, name)

    def close(self) -> None:
        """End it. Called in a thread of its own."""
        time.sleep(ANSWERS_OUT_SECONDS)
        self._front.close()


class Server(pygrpc_native.aio.Server):
    """A server on one plaintext address."""

    def __init__(
        self,
        options: Sequence[tuple[str, Any]],
        refuse: Refuse,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        # One thread for HTTP/2, not two: they share this process's core with Python, and switching
        # between them took a fifth of it. More workers, not more threads, use more cores.
        super().__init__(options=options, io_threads=1)
        self._refuse = refuse
        self._monotonic = monotonic
        self._verifies = _Lane(VERIFIES_IN_TURN)
        self._batches = _Lane(BATCHES_IN_TURN)
        self._by_role = {
            VERIFIER: self._verifies,
            MANAGER: _Lane(OTHERS_IN_TURN),
            OPERATOR: _Lane(OTHERS_IN_TURN),
        }
        self._lanes = (self._batches, *self._by_role.values())
        # A cancellation may overtake its call: both the library's thread and this one fetch.
        self._cancelled: OrderedDict[int, None] = OrderedDict()
        # By the numbers that methods have in events. None: begun at once.
        self._lane_of: list[_Lane | None] = []
        # When the last call came that is no verify.
        self._others_at = -math.inf
        # Whether a turn's share has been begun, and the next turn will be.
        self._in_turn = False
        # Calls since it was last looked for new ones.
        self._begun = 0

    async def start(self) -> None:
        """Serve."""
        # Before the first event: there is no turn of the loop between.
        await super().start()
        self._lane_of = [self._lane(path) for path, _ in self._table]

    async def stop(self, grace: float | None) -> None:
        """Let what is there have the grace, and end it."""
        # What waits has come before the end was said, and is not to be turned away.
        waiting = [event for lane in self._lanes for _, event in lane.waiting.values()]
        for lane in self._lanes:
            lane.waiting.clear()
        super()._on_events(waiting)  # type: ignore[arg-type]
        if self._front is not None and not self._stopping:
            self._front = _Unhurried(self._front)  # type: ignore[assignment]
        await super().stop(grace)

    def _lane(self, path: str) -> _Lane | None:
        if path == BATCH_VERIFY:
            return self._batches
        return self._by_role.get(METHODS.get(path, OPEN).role or "")

    def _on_events(self, events: Sequence[Event]) -> None:
        """Take what has come, in order, and begin some of it if none was begun in this turn."""
        if not self._in_turn and self._is_share(events):
            # Nothing waits, as is usual: the lanes would cost a verify a twentieth of its time.
            self._begin(events)
            return
        at_once, now = [], self._monotonic()
        for event in events:
            kind, call_id, method_id = event[0], event[1], event[2]
            if kind == EVENT_CANCEL:
                if not any(lane.waiting.pop(call_id, None) for lane in self._lanes):
                    at_once.append(event)
                continue
            if self._cancelled and call_id in self._cancelled:
                del self._cancelled[call_id]
                continue
            lane = self._lane_of[method_id]
            if lane is not None and lane is not self._verifies:
                self._others_at = now
            if lane is None:
                at_once.append(event)
            # What the next turn takes is no queue.
            elif (queued := len(lane.waiting) - lane.in_turn) >= 0 and lane.bound.refuses(
                queued, now
            ):
                self._turn_away(event)
            else:
                lane.waiting[call_id] = now, event
        if at_once:
            super()._on_events(at_once)  # type: ignore[arg-type]
            self._forget_cancelled(at_once)
        if not self._in_turn:
            self._begin_some()

    def _forget_cancelled(self, events: Sequence[Event]) -> None:
        """See to it that calls which have just been cancelled are neither kept nor begun.

        The library keeps each, its request included, until the call's task removes it. A task that
        is cancelled before its first step does nothing at all: a client that cancels its calls as
        soon as they are sent would fill the memory.
        """
        for kind, call_id, *_ in events:
            if kind != EVENT_CANCEL:
                continue
            call = self._calls.get(call_id)
            if call is None:
                # It has not come yet, or was refused.
                self._cancelled[call_id] = None
                if len(self._cancelled) > CANCELLED_MAX:
                    self._cancelled.popitem(last=False)
            elif call.task is not None:
                call.task.add_done_callback(partial(self._forget, call_id))

    def _forget(self, call_id: int, _task: "asyncio.Task[None]") -> None:
        self._calls.pop(call_id, None)

    def _begin_some(self) -> None:
        """Begin this turn's share of each lane, and see to the next turn."""
        if self._begun >= FETCH_AFTER:
            # While the loop is busy the library's thread seldom gets its turn, and what has come
            # would wait where nobody counts it.
            self._begun = 0
            # What is fetched waits for its turn, which is this one.
            self._in_turn = True
            assert self._front is not None, "it has started"  # noqa: S101 - for the type checker
            try:
                self._on_events(self._front.recv_batch_details(FETCH_MAX, 0) or ())
            except BaseException:
                # What waits is the next turn's.
                asyncio.get_running_loop().call_soon(self._begin_some)
                raise
        share: list[Event] = []
        now = self._monotonic()
        for lane in self._lanes:
            if lane.waiting:
                share += lane.take(self._share_of(lane, now), now)
        self._in_turn = bool(share)
        if share:
            self._begin(share)

    def _begin(self, share: Sequence[Event]) -> None:
        """Begin a turn's share, and see to the next turn."""
        self._in_turn = True
        self._begun += len(share)
        try:
            super()._on_events(share)  # type: ignore[arg-type]
        finally:
            # After the calls that were just begun have had their first step. And whatever became of
            # them, or no other would be begun any more.
            asyncio.get_running_loop().call_soon(self._begin_some)

    def _share_of(self, lane: _Lane, now: float) -> int:
        """Return how many calls of a lane are begun in a turn."""
        if lane is self._verifies and now - self._others_at > ALONE_SECONDS:
            return VERIFIES_ALONE
        return lane.in_turn

    def _is_share(self, events: Sequence[Event]) -> bool:
        """Tell whether these are all verifies, and no more than are begun in a turn."""
        verifies, lanes, cancelled = self._verifies, self._lane_of, self._cancelled
        if len(events) > self._share_of(verifies, self._monotonic()):
            return False
        for event in events:
            if event[0] == EVENT_CANCEL or lanes[event[2]] is not verifies:
                return False
            if cancelled and event[1] in cancelled:
                return False
        return True

    async def _send(self, call: Any, context: Any, response: Any) -> bool:
        """Send a stream's message once its client has room for it; tell whether that was so.

        The library waits in a thread, for ever, and there are as few as six. A health watch is open
        to everybody: with some that read nothing, whatever else needs a thread would have none.
        """
        data = self._encode(call, context, response)
        if data is None:
            return False
        assert self._front is not None, "it has started"  # noqa: S101 - for the type checker
        context._initial_sent = True  # noqa: SLF001 - the library's own, as it does
        give_up = self._monotonic() + UNREAD_SECONDS
        pause_seconds = ROOM_SECONDS_MIN
        while (sent := self._front.stream_try_send(call.call_id, data)) == STREAM_FULL:
            if self._monotonic() >= give_up:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Nothing of the stream was read.")
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, ROOM_SECONDS_MAX)
        return sent != STREAM_CLOSED

    def _turn_away(self, event: Event) -> None:
        call_id, path, seconds = event[1], self._table[event[2]][0], _seconds_left(event)
        status, delay_seconds = self._refuse(path, seconds)

        def fail() -> None:
            assert self._front is not None, "it has started"  # noqa: S101 - for the type checker
            self._front.fail(
                call_id,
                status.code.value[0],
                status.message,
                trailing_metadata=list(status.trailing_metadata),
            )

        if delay_seconds:
            asyncio.get_running_loop().call_later(delay_seconds, fail)
        else:
            fail()


def _seconds_left(event: Event) -> float | None:
    """Return how long the caller waited for when the event was fetched; None: for ever."""
    _, _, seconds = event[5]
    return None if seconds is None else float(seconds)


def _begun_at(now: float, came: float, event: Event) -> Event:
    """Return an event with what is left of its caller's time now."""
    seconds = _seconds_left(event)
    # A turn's wait is not worth a new one.
    if seconds is None or now - came < 0.001:
        return event
    metadata, peer, _ = event[5]
    return (*event[:5], (metadata, peer, max(0.0, seconds - (now - came))))

"""The `native` transport's server, with a way in that is bounded and fair.

As it comes (0.5.0) it begins every call as soon as it is there. With hundreds in flight a turn of
the event loop then takes as long as answering all of them, and a call that waits for Postgres waits
for such a turn each time: a flood of verifies would hold up a Create for a second, and a flood of
Creates the verifies. So calls wait in two lanes, and a few of each lane are begun in each turn.

How long the lanes may be is bounded as other queues are (`admission.py`). Health checks have none.

It also forgets calls that were cancelled before they began, which the library keeps for ever.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

# Not as `from pygrpc_native import aio`, which sends the package's lazy attributes (0.5.0) into an
# endless recursion.
import pygrpc_native.aio
from pygrpc_native import EVENT_CANCEL

from latchkey_service.access.methods import METHODS, OPEN, VERIFIER
from latchkey_service.admission import QueueBound
from latchkey_service.errors import StatusParts

__all__ = ["Refuse", "Server"]

# Calls begun in a turn: some 0.2 ms of verifies, and as much of management.
VERIFIES_IN_TURN: Final = 16
OTHERS_IN_TURN: Final = 4
# Calls that may wait to be begun where they stand, beside those of the next turn: some 1 ms of
# verifies. And in a burst, some 2 kB each.
STANDING: Final = 48
BURST: Final = 5_000
# It is looked for new calls after so many were begun; for so many at most.
FETCH_AFTER: Final = 48
FETCH_MAX: Final = 256

Event = Sequence[Any]


class Refuse(Protocol):
    """Says how a call of this path is refused, and after how many seconds."""

    def __call__(self, path: str) -> tuple[StatusParts, float]:
        """Count a refusal."""
        ...


class _Lane:
    """Calls that wait to be begun, by id, in order."""

    def __init__(self, in_turn: int) -> None:
        self.in_turn = in_turn
        self.waiting: OrderedDict[int, Event] = OrderedDict()
        self.bound = QueueBound(STANDING, BURST)


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
        self._lanes = (_Lane(VERIFIES_IN_TURN), _Lane(OTHERS_IN_TURN))
        # By the numbers that methods have in events. None: begun at once.
        self._lane_of: list[_Lane | None] = []
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
        waiting = [event for lane in self._lanes for event in lane.waiting.values()]
        for lane in self._lanes:
            lane.waiting.clear()
        super()._on_events(waiting)  # type: ignore[arg-type]
        await super().stop(grace)

    def _lane(self, path: str) -> _Lane | None:
        rule = METHODS.get(path, OPEN)
        if rule.role is None:
            return None
        return self._lanes[0 if rule.role == VERIFIER else 1]

    def _on_events(self, events: Sequence[Event]) -> None:
        """Take what has come, in order, and begin some of it if none was begun in this turn."""
        at_once = []
        for event in events:
            kind, call_id, method_id = event[0], event[1], event[2]
            if kind == EVENT_CANCEL:
                if not any(lane.waiting.pop(call_id, None) for lane in self._lanes):
                    at_once.append(event)
                continue
            lane = self._lane_of[method_id]
            if lane is None:
                at_once.append(event)
            # What the next turn takes is no queue.
            elif (queued := len(lane.waiting) - lane.in_turn) >= 0 and lane.bound.refuses(
                queued, self._monotonic()
            ):
                self._turn_away(call_id, self._table[method_id][0])
            else:
                lane.waiting[call_id] = event
        if at_once:
            super()._on_events(at_once)  # type: ignore[arg-type]
            self._forget_cancelled(at_once)
        if not self._in_turn:
            self._begin_some()

    def _forget_cancelled(self, events: Sequence[Event]) -> None:
        """See to it that calls which have just been cancelled are not kept.

        The library keeps each, its request included, until the call's task removes it. A task that
        is cancelled before its first step does nothing at all: a client that cancels its calls as
        soon as they are sent would fill the memory.
        """
        for event in events:
            call = self._calls.get(event[1]) if event[0] == EVENT_CANCEL else None
            if call is not None and call.task is not None:
                call.task.add_done_callback(partial(self._forget, call.call_id))

    def _forget(self, call_id: int, _task: "asyncio.Task[None]") -> None:
        self._calls.pop(call_id, None)

    def _begin_some(self) -> None:
        """Begin this turn's share of each lane, and see to the next turn."""
        if self._begun >= FETCH_AFTER:
            # While the loop is busy the library's thread seldom gets its turn, and what has come
            # would wait where nobody counts it.
            self._begun = 0
            assert self._front is not None, "it has started"  # noqa: S101 - for the type checker
            self._on_events(self._front.recv_batch_details(FETCH_MAX, 0) or ())
        share: list[Event] = []
        for lane in self._lanes:
            count = min(lane.in_turn, len(lane.waiting))
            share += [lane.waiting.popitem(last=False)[1] for _ in range(count)]
        self._begun += len(share)
        self._in_turn = bool(share)
        if share:
            super()._on_events(share)  # type: ignore[arg-type]
            # After the calls that were just begun have had their first step.
            asyncio.get_running_loop().call_soon(self._begin_some)

    def _turn_away(self, call_id: int, path: str) -> None:
        status, delay_seconds = self._refuse(path)

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

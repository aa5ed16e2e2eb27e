"""The queues of the `native` transport: one per role, and how many calls start from each in a turn.

Decides which calls wait and in which order they start. `native.py` puts them into the queues, and
starts them.
"""

import sys
from collections.abc import Sequence
from typing import Any, Final

from latchkey_service.access.methods import (
    BATCH_VERIFY,
    METHODS,
    OPEN,
    REMOVALS,
    ROLES,
    VERIFIER,
    Rule,
)
from latchkey_service.fair_queue import FairQueue
from latchkey_service.queue_limit import QueueLimit

__all__ = [
    "ALONE_SECONDS",
    "BATCHES_IN_TURN",
    "BURST",
    "OPEN_IN_TURN",
    "OTHERS_IN_TURN",
    "QUEUED_BYTES_MAX",
    "STANDING",
    "VERIFIES_ALONE",
    "VERIFIES_IN_TURN",
    "Event",
    "Queue",
    "Queues",
    "seconds_left",
]

# Calls started per turn: about 0.2 ms for each queue. A batch may contain a thousand verifies.
# Turns have a cost, so more verifies start per turn while no other call arrives that would have to
# wait.
VERIFIES_IN_TURN: Final = 16
VERIFIES_ALONE: Final = 64
ALONE_SECONDS: Final = 1.0
OTHERS_IN_TURN: Final = 4
BATCHES_IN_TURN: Final = 1
# Health checks: a probe must not wait, and a flood of probes must not delay others.
OPEN_IN_TURN: Final = 16
# Calls that may wait beyond those of the next turn. Under sustained load: about 1 ms of verifies.
# In a burst: more, at about 2 kB each.
STANDING: Final = 48
BURST: Final = 5_000
# The bytes of the requests in a queue: a burst of the largest verifies, or a hundred of the largest
# batches.
QUEUED_BYTES_MAX: Final = 32 * 1024 * 1024

# An event of the library: kind, number of the call, number of the method, request, header or peer,
# details.
Event = Sequence[Any]


class Queue:
    """Calls that wait to start, each with its arrival time."""

    def __init__(self, in_turn: int) -> None:
        self.in_turn = in_turn
        self.waiting: FairQueue[tuple[float, Event]] = FairQueue(QUEUED_BYTES_MAX)
        self.limit = QueueLimit(STANDING, BURST)

    def take(self, count: int, now: float) -> list[Event]:
        """Remove and return the next `count` calls, or fewer."""
        return [_with_time_left(now, came, event) for came, event in self.waiting.take(count)]

    def has_room(self, size_bytes: int, now: float) -> bool:
        """Return whether another call may wait."""
        # Calls that the next turn starts do not count as queued.
        queued = self.waiting.size - self.in_turn
        if queued >= 0 and self.limit.rejects(queued, now):
            return False
        return self.waiting.fits(size_bytes)


class Queues:
    """The queues of a server."""

    def __init__(self) -> None:
        self.removals = Queue(OTHERS_IN_TURN)
        self.open = Queue(OPEN_IN_TURN)
        self.verifies = Queue(VERIFIES_IN_TURN)
        self.batches = Queue(BATCHES_IN_TURN)
        by_role = {role: Queue(OTHERS_IN_TURN) for role in ROLES}
        by_role[VERIFIER] = self.verifies
        self._by_role = by_role
        self.all = (self.open, self.removals, self.batches, *by_role.values())
        # Both by the method's number in events.
        self.of_method: list[Queue] = []
        self.rule_of: list[Rule] = []

    def set_paths(self, paths: Sequence[str]) -> None:
        """Set the paths of the methods, in the order of their numbers."""
        self.of_method = [self.of(path) for path in paths]
        self.rule_of = [METHODS.get(path, OPEN) for path in paths]

    def of(self, path: str) -> Queue:
        """Return the queue of a method."""
        if path == BATCH_VERIFY:
            return self.batches
        if path in REMOVALS:
            return self.removals
        return self._by_role.get(METHODS.get(path, OPEN).role or "", self.open)

    def remove(self, call_id: int) -> bool:
        """Remove a call. Return whether it waited."""
        return any(queue.waiting.remove(call_id) for queue in self.all)

    def take_all(self) -> list[Event]:
        """Remove and return all calls."""
        return [event for queue in self.all for _, event in queue.waiting.take(sys.maxsize)]


def seconds_left(event: Event) -> float | None:
    """Return the caller's remaining time when the event was fetched; None means no limit."""
    _, _, seconds = event[5]
    return None if seconds is None else float(seconds)


def _with_time_left(now: float, came: float, event: Event) -> Event:
    """Return the event with the caller's remaining time updated."""
    seconds = seconds_left(event)
    # After a wait of less than a turn, updating it is not worth the cost.
    if seconds is None or now - came < 0.001:
        return event
    metadata, peer, _ = event[5]
    return (*event[:5], (metadata, peer, max(0.0, seconds - (now - came))))

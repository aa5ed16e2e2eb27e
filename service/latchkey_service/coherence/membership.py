"""This process as a verifier: what it has applied, its lease, its row. Pure (rules 2, 3, 4, 7).

A verify may be answered while `lease_ends` lies ahead, from memory or from a read (rule 5).
"""

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from latchkey_coherence.lease import server_lease_end
from latchkey_coherence.memory import Entry, Memory

from latchkey_service.coherence.subleases import SubLeases

__all__ = ["Log", "Membership"]

E = TypeVar("E", bound=Entry)


@dataclass(frozen=True, slots=True)
class Log:
    """The log after some revision, from one snapshot.

    `complete` is False when what comes after that revision is no longer all there, or is too much.
    """

    head: int
    token_ids: tuple[str, ...]
    complete: bool = True


class Membership(Generic[E]):
    """The state of this process as a verifier. Times are seconds on its own clock."""

    __slots__ = ("acknowledged", "lease_ends", "lease_seconds", "memory", "registered", "subleases")

    def __init__(self, memory: Memory[E], subleases: SubLeases, lease_seconds: float) -> None:
        self.memory = memory
        self.subleases = subleases
        self.lease_seconds = lease_seconds
        self.lease_ends = -math.inf
        self.registered = False
        self.acknowledged = 0
        """What its row says."""

    def register(self, head: int, acknowledged: int) -> None:
        """Its row is committed, while head was this, with so much acknowledged (rule 2).

        That gives no lease: the first one comes with a renewal, whose read of the log began after
        the row was committed.
        """
        self.memory.reset(head)
        self.acknowledged = acknowledged
        self.registered = True

    def apply(self, log: Log) -> bool:
        """Drop what the log names after `memory.applied`; tell whether there was anything new.

        Where the log does not reach back, all goes (rule 11). Nor does it when its head is behind
        what was applied: a database that was set back has another history.
        """
        applied = self.memory.applied
        if log.head < applied:
            self.subleases.unconfirm()
        if not log.complete or log.head < applied:
            self.memory.reset(log.head)
            return True
        self.memory.apply(log.head, log.token_ids)
        return log.head > applied

    def acknowledgeable(self, now: float) -> int:
        """Return the revision up to which it and each client under its lease are done (rule 7)."""
        floor = self.subleases.floor(now)
        return self.memory.applied if floor is None else min(floor, self.memory.applied)

    def renew(self, began: float, acknowledged: int) -> None:
        """Its row was updated, and it alone, after the log was read, before which the clock said
        `began` (rule 3)."""
        self.lease_ends = max(self.lease_ends, server_lease_end(began, self.lease_seconds))
        self.acknowledged = acknowledged

    def lose(self) -> None:
        """Its row is gone: somebody has seen it lapse. Nothing is answered until it registers.

        The memory is emptied then (`register`), and clients are told to begin anew.
        """
        self.registered = False
        self.lease_ends = -math.inf

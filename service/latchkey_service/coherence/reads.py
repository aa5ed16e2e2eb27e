"""Decides which reads of the database to accept (rules 5 and 12).

A session may reach a deposed primary: it may have stayed open across a failover, or a pooler or a
moved address may have connected it to that server. So each read returns the position and timeline
of its snapshot, and is accepted only if that position lies on the history of this process's lease.

Owns the rule, which is pure (`ReadBegan`), and waits for the lease and for the log.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

from latchkey_service.coherence.lease_renewer import LeaseRenewer
from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.coherence.verifier_state import VerifierState
from latchkey_service.errors import CHANGING_OVER, CacheStartedOver, StoreUnavailable

__all__ = ["LeasedReads", "ReadBegan", "Standing"]


class Standing(enum.Enum):
    """How the snapshot of a read relates to the history of the lease (rule 12)."""

    BELIEVED = enum.auto()
    AHEAD = enum.auto()
    """The revision is not applied yet: read the log first, then check again."""
    REFUSED = enum.auto()
    """The snapshot belongs to another history or server, or is too old."""


class ReadBegan(NamedTuple):
    """The state of the verifier when a read was sent."""

    applied: int
    epoch: int

    @classmethod
    def now(cls, state: VerifierState[Any]) -> "ReadBegan":
        """Return the current state. Call it just before a read is sent."""
        return cls(state.cache.position.revision, state.epoch)

    def standing(self, snapshot: Snapshot, state: VerifierState[Any]) -> Standing:
        """Return whether this read is acceptable. `state` is that of the verifier when the answer
        has arrived.

        If the snapshot is older than the position applied when the read was sent, it comes from
        another server, such as a deposed primary, because the lease's server cannot return it. A
        read that was sent in an earlier epoch is rejected, because the lease of that epoch was on
        another history.
        """
        if snapshot.timeline != state.server.timeline or self.epoch != state.epoch:
            return Standing.REFUSED
        position = snapshot.position
        if position.revision > state.cache.position.revision:
            return Standing.AHEAD
        if position.revision < self.applied or not state.cache.knows(position):
            return Standing.REFUSED
        return Standing.BELIEVED


class LeasedReads:
    """Checks the reads of one kind of connection. `disconnect` closes those connections."""

    def __init__(
        self,
        renewer: LeaseRenewer,
        state: VerifierState[Any],
        clock: Callable[[], float],
        disconnect: Callable[[], None],
    ) -> None:
        self._renewer = renewer
        self._state = state
        self._clock = clock
        self._disconnect = disconnect

    async def begin(self, deadline: float) -> ReadBegan:
        """Wait for the lease, and return the state that `accept` compares the read with.

        Call it before the read is sent. Raises StoreUnavailable if the lease cannot be renewed,
        Overloaded if too many calls wait, and Unavailable at `deadline`, seconds on the process's
        clock.
        """
        if self._clock() >= self._state.lease_ends:
            await self._renewer.wait_for_lease(deadline)
        return ReadBegan.now(self._state)

    async def accept(self, snapshot: Snapshot, began: ReadBegan, deadline: float) -> None:
        """Return if the read is acceptable.

        If the snapshot is ahead of the log, wait for the log to be read. Raises StoreUnavailable if
        the read came from another history or server, CacheStartedOver if the cache started over
        meanwhile, Overloaded if too many calls wait, and Unavailable at `deadline`.
        """
        state = self._state
        standing = began.standing(snapshot, state)
        if standing is Standing.AHEAD and await self._renewer.read_log_to(
            snapshot.position.revision, deadline
        ):
            standing = began.standing(snapshot, state)
        if standing is not Standing.BELIEVED:
            if began.epoch != state.epoch:
                raise CacheStartedOver(CHANGING_OVER)
            self._disconnect()
            # Either side may lag. The next renewal shows which one.
            self._renewer.wake()
            raise StoreUnavailable(CHANGING_OVER)

    def require_lease(self) -> None:
        """Raise StoreUnavailable if the process has no lease at this moment."""
        if self._clock() >= self._state.lease_ends:
            raise StoreUnavailable(CHANGING_OVER)

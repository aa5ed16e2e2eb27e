"""Which reads of the database may be believed (coherence rules 5 and 12).

A session may lead to a primary that was deposed: it stayed open across a failover, or a pooler or
an address that moved led it there. So each read brings along where its snapshot was taken, and is
believed only if that lies on the history that this process's lease stands on.
"""

from collections.abc import Callable
from typing import Any

from latchkey_service.coherence.lease_renewer import LeaseRenewer
from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.coherence.verifier_state import ReadBegan, Standing, VerifierState
from latchkey_service.errors import CHANGING_OVER, StoreUnavailable

__all__ = ["LeasedReads"]


class LeasedReads:
    """Checks reads for one kind of connection. `disconnect` gives up its connections."""

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
        """Wait for the lease, and return what `accept` has to know of this moment.

        Call it before the read is sent. Raises StoreUnavailable, Overloaded, and Unavailable at
        `deadline`, seconds on the process's clock.
        """
        if self._clock() >= self._state.lease_ends:
            await self._renewer.wait_for_lease(deadline)
        return self._state.begin_read()

    async def accept(self, snapshot: Snapshot, began: ReadBegan, deadline: float) -> None:
        """Return if a read may be believed.

        Waits for the log to be read where the snapshot is ahead of it. Raises StoreUnavailable
        when the read came from another history or server, Overloaded, and Unavailable at
        `deadline`.
        """
        state = self._state
        standing = state.standing(snapshot, began)
        if standing is Standing.AHEAD and await self._renewer.read_log_to(
            snapshot.position.revision, deadline
        ):
            standing = state.standing(snapshot, began)
        if standing is not Standing.BELIEVED:
            if began.epoch == state.epoch:
                self._disconnect()
                # Either side may be the one that lags: the lease finds out by its next renewal.
                self._renewer.wake()
            raise StoreUnavailable(CHANGING_OVER)

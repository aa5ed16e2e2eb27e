"""Lets a change of tokens take effect everywhere before its call returns, as Delete does (rule 8).

Deletions store their receipts, and wait in `management.py`.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from latchkey_coherence.verdict_cache import Position

from latchkey_service.audit.audit_log import AuditContext
from latchkey_service.coherence.ack_rules import NO_ACKNOWLEDGEMENTS, Acknowledgements
from latchkey_service.coherence.ack_waiter import AckWaiter
from latchkey_service.errors import ChangeNotConfirmed, NotConfirmed
from latchkey_service.lifetime import UNLIMITED, Lifetime
from latchkey_service.tokens.receipt_table import Deletion

__all__ = ["Call", "Confirmations"]


@dataclass(frozen=True, slots=True)
class Call:
    """A management call. Times are seconds on the process's clock."""

    audit_context: AuditContext
    deadline: float
    wait_until: float | None = None
    """Until when to wait for verifiers. None: the call does not wait."""
    on_commit: Callable[[str], None] = lambda _token_id: None
    """Called with the token's id when a change is committed with its audit entry. The id is empty
    if the change concerns several tokens."""
    on_wait: Callable[[], None] = lambda: None
    """Called when the change is committed and only the wait remains."""
    lifetime: Lifetime = UNLIMITED
    """The caller's limit for tokens of the account."""


class Confirmations:
    """Waits until changes are in effect.

    `settle` returns once no failover can undo what a read at a position has shown.
    """

    def __init__(
        self,
        ack_waiter: AckWaiter,
        now: Callable[[], datetime],
        settle: Callable[[Position], Awaitable[None]],
    ) -> None:
        self._ack_waiter = ack_waiter
        self._now = now
        self.settle = settle

    def announce(self, position: Position) -> None:
        """Notify verifiers of a change that nobody waits for."""
        self._ack_waiter.announce(position.revision)

    async def wait(self, position: Position, call: Call) -> Acknowledgements | None:
        """Wait until no verifier can answer under an older state. Return None if that needs no
        wait.

        Raises ChangeNotConfirmed at the end of the call's wait.
        """
        self._ack_waiter.announce(position.revision)
        if call.wait_until is None:
            return None
        call.on_wait()
        try:
            return await self._ack_waiter.wait(position, call.wait_until)
        except NotConfirmed:
            raise ChangeNotConfirmed(
                "The change is made, but not all verifiers have confirmed it yet: repeat the call."
            ) from None

    async def receipt(self, position: Position, commit_time: datetime, call: Call) -> Deletion:
        """Wait for a change and return its receipt, which is stored nowhere."""
        acknowledgements = await self.wait(position, call)
        effective_time = None if acknowledgements is None else max(commit_time, self._now())
        return Deletion(
            position, commit_time, effective_time, *(acknowledgements or NO_ACKNOWLEDGEMENTS)
        )

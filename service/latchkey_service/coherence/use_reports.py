"""The reports of uses on one Watch stream: which to accept, and when to confirm them. Pure.

A client sends its next report after the confirmation. So a late confirmation slows down a client
that reports more than this process can take, without delaying its other messages.
"""

import math
from typing import Final

__all__ = ["USES_IN_REPORT_MAX", "UseReports"]

# About 100 kB, and about 2 ms for the event loop.
USES_IN_REPORT_MAX: Final = 1_000
# Uses that a stream may report at once, and those that it may add per second. A client with 100,000
# cached tokens, which is the default, reports each of them every four seconds without a delay.
BURST: Final = 100_000
USES_PER_SECOND: Final = 25_000
# A client may send its last reports without waiting, as many as fit into one burst. Beyond that,
# reports are ignored: such a client does not follow the protocol.
DEBT_MAX: Final = 2 * BURST


class UseReports:
    """The reports of one stream."""

    def __init__(self) -> None:
        self._debt = 0.0
        self._counted_at = -math.inf
        self._received = 0
        self._confirmed = 0

    def accept(self, number: int, uses: int, now: float) -> bool:
        """Return whether to record a report with this number, which has `uses` uses."""
        self._pay(now)
        # An empty report costs something too.
        cost = max(uses, 1)
        if number <= self._received or self._debt + cost > DEBT_MAX:
            return False
        self._received = number
        self._debt += cost
        return True

    @property
    def unconfirmed(self) -> bool:
        """Whether the client waits for a confirmation."""
        return self._received > self._confirmed

    def confirm(self, now: float) -> int:
        """Return the number to confirm now, or 0."""
        if not self.unconfirmed:
            return 0
        self._pay(now)
        if self._debt > BURST:
            return 0
        self._confirmed = self._received
        return self._confirmed

    def _pay(self, now: float) -> None:
        if now > self._counted_at:
            self._debt = max(0.0, self._debt - (now - self._counted_at) * USES_PER_SECOND)
            self._counted_at = now

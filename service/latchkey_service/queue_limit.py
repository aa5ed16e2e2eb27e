"""Decides when a queue is too long to accept another call. Pure; after CoDel, RFC 8289.

Owns the decision, not the queue: callers report its length and pass in the time.
"""

import math
from typing import Final

__all__ = ["CALM_SECONDS", "STANDING_SECONDS", "STUCK_SECONDS", "QueueLimit"]

# A queue that has not drained for this long is a standing queue: the interval of RFC 8289, §4.2.
STANDING_SECONDS: Final = 0.1
# After a rejection, the lower limit stays in force this long.
CALM_SECONDS: Final = 1.0
# If no call has finished for this long, the database hangs; load alone does not explain it.
STUCK_SECONDS: Final = 0.1


class QueueLimit:
    """Limits one queue: `burst` calls, or `standing` if the queue has not drained for a while."""

    def __init__(self, standing: int, burst: int) -> None:
        self._standing, self._burst = standing, burst
        self._since = 0.0
        self._last_rejected = -math.inf

    def empty(self, now: float) -> None:
        """Record that the queue is empty or nearly empty."""
        self._since = now

    def rejects(self, waiting: int, now: float) -> bool:
        """Return whether a call that arrives now, behind `waiting` others, must be rejected."""
        if not waiting:
            self.empty(now)
        stands = now - self._since > STANDING_SECONDS or now - self._last_rejected < CALM_SECONDS
        if waiting < (self._standing if stands else self._burst):
            return False
        if stands:
            self._last_rejected = now
        return True

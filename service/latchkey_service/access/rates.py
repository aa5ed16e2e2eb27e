"""How much a caller may ask in a second, by the role whose methods it calls. Clock passed in."""

from collections.abc import Mapping

__all__ = ["RateLimits"]

# A caller that was idle may ask as much at once as in a second.
BURST_SECONDS = 1.0


class RateLimits:
    """One caller's limits in one process, and what it has used. Belongs to the event loop.

    A leaky bucket (GCRA): for each role, the moment at which all that was asked would have been
    asked at the steady rate. More may be asked as long as that is not a burst ahead. What is asked
    then counts in full, also a batch larger than the burst, which is paid for by waiting longer.
    """

    def __init__(self, per_second: Mapping[str, float]) -> None:
        self.per_second = per_second
        self._paid_until = dict.fromkeys(per_second, 0.0)

    def charge(self, role: str, count: int, now: float) -> float:
        """Count so many questions or calls. Return 0, or the seconds until there is room.

        What there is no room for does not count. `now`: seconds on a clock that does not go back.
        """
        rate = self.per_second.get(role)
        if rate is None:
            return 0.0
        paid_until = max(self._paid_until[role], now)
        wait = paid_until - now - BURST_SECONDS + 1 / rate
        # The sum of many small steps is off by a little.
        if wait > 1e-9:
            return wait
        self._paid_until[role] = paid_until + count / rate
        return 0.0

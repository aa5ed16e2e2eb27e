"""Rate limits of a caller, by the role of the method. The clock is passed in."""

from collections.abc import Mapping

from latchkey_service.errors import RateLimited

__all__ = ["RateLimits"]

# An idle caller may use up one second's calls at once.
BURST_SECONDS = 1.0


class RateLimits:
    """One caller's limits and usage in one process. Event loop only.

    A leaky bucket (GCRA). For each role it stores the theoretical arrival time: the moment at which
    the calls so far would have ended at the steady rate. A call is allowed while that time is less
    than a burst ahead. Each call then counts in full. A batch larger than the burst is allowed too;
    the caller pays for it with a longer wait.
    """

    def __init__(self, per_second: Mapping[str, float]) -> None:
        self.per_second = per_second
        self._paid_until = dict.fromkeys(per_second, 0.0)

    def charge(self, role: str, count: int, now: float) -> float:
        """Charge `count` calls or questions. Return 0, or the seconds to wait if over the limit.

        A rejected call is not charged. `now` is monotonic, in seconds.
        """
        rate = self.per_second.get(role)
        if rate is None:
            return 0.0
        paid_until = max(self._paid_until[role], now)
        wait = paid_until - now - BURST_SECONDS + 1 / rate
        # Adding many small steps accumulates a rounding error.
        if wait > 1e-9:
            return wait
        self._paid_until[role] = paid_until + count / rate
        return 0.0

    def spend(self, role: str, count: int, now: float) -> None:
        """Charge `count` calls or questions. Raises RateLimited if over the limit."""
        wait = self.charge(role, count, now)
        if wait:
            raise RateLimited("The caller has exceeded its rate limit.", wait)

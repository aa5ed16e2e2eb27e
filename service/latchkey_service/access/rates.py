"""Rate limits of a caller, by the role of the method. The clock is passed in."""

from collections.abc import Mapping

from latchkey_service.errors import RateLimited

__all__ = ["DEFAULT_PER_SECOND", "RateLimits", "limits_for"]

# An idle caller may use up one second's calls at once.
BURST_SECONDS = 1.0
# Calls per second of a caller that the policy limits to accounts, unless the policy says otherwise.
# Such a caller is often somebody else's program. A worker can serve several times as many.
DEFAULT_PER_SECOND: Mapping[str, float] = {"manager": 100.0, "operator": 20.0}
_BOTH = (False, True)


class RateLimits:
    """One caller's limits and usage in one process. Event loop only.

    A caller that has used up its rate can still take rights away: removals have the same rate, but
    are counted separately.

    A leaky bucket (GCRA). For each role it stores the theoretical arrival time: the moment at which
    the calls so far would have ended at the steady rate. A call is allowed while that time is less
    than a burst ahead. Each call then counts in full. A batch larger than the burst is allowed too;
    the caller pays for it with a longer wait.
    """

    def __init__(self, per_second: Mapping[str, float]) -> None:
        self.per_second = per_second
        self._paid_until = {(role, removal): 0.0 for role in per_second for removal in _BOTH}

    def charge(self, role: str, count: int, now: float, *, removal: bool = False) -> float:
        """Charge `count` calls or questions. Return 0, or the seconds to wait if over the limit.

        A rejected call is not charged. `now` is monotonic, in seconds.
        """
        rate = self.per_second.get(role)
        if rate is None:
            return 0.0
        paid_until = max(self._paid_until[role, removal], now)
        wait = paid_until - now - BURST_SECONDS + 1 / rate
        # Adding many small steps accumulates a rounding error.
        if wait > 1e-9:
            return wait
        self._paid_until[role, removal] = paid_until + count / rate
        return 0.0

    def spend(self, role: str, count: int, now: float, *, removal: bool = False) -> None:
        """Charge `count` calls or questions. Raises RateLimited if over the limit."""
        wait = self.charge(role, count, now, removal=removal)
        if wait:
            raise RateLimited("The caller has exceeded its rate limit.", wait)


def limits_for(per_second: Mapping[str, float] | None, *, restricted: bool) -> RateLimits | None:
    """Return the limits of a caller. `per_second` are those in the policy, if any.

    `restricted` says whether the policy limits the caller to accounts.
    """
    limits = {**(DEFAULT_PER_SECOND if restricted else {}), **(per_second or {})}
    return RateLimits(limits) if limits else None

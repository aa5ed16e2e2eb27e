"""When to try again to reach a database that is away. Pure: clock and randomness are passed in."""

import math
from collections.abc import Callable

__all__ = ["Reconnection", "spread"]

# While the database is away, between the end of one attempt and the next. Whoever needs a
# connection in between fails at once instead of piling up, and service resumes this soon after
# Postgres does.
RECONNECT_SECONDS = 0.25
# Attempts of a process under way at once: all connections that it ever has. A database that is
# frozen leaves attempts without an answer, and those whose callers have left meanwhile still wait
# at its door: it would meet all of them as it thaws.
ATTEMPTS_MAX = 15


def spread(seconds: float, randomness: float) -> float:
    """Return a pause of half of `seconds` to all of it. `randomness` is in [0, 1).

    Workers and hosts that lost the database at one moment do not knock in step.
    """
    return seconds * (0.5 + 0.5 * randomness)


class Reconnection:
    """Tells a process whether an attempt to connect may begin.

    As long as attempts succeed any may, up to a bound. When one has failed, the database is taken
    to be away: one attempt at a time finds out whether it still is, after a pause each, for all who
    need it.
    """

    def __init__(self, clock: Callable[[], float], randomness: Callable[[], float]) -> None:
        self._clock = clock
        self._randomness = randomness
        self._under_way = 0
        self._away = False
        self._not_before = -math.inf

    def begin(self) -> bool:
        """Tell whether an attempt may begin; if so it counts, until `succeed` or `fail`."""
        if self._clock() < self._not_before:
            return False
        if self._under_way >= (1 if self._away else ATTEMPTS_MAX):
            return False
        self._under_way += 1
        return True

    def succeed(self) -> None:
        """Count an attempt that has led to a connection."""
        self._under_way -= 1
        self._away = False
        self._not_before = -math.inf

    def fail(self) -> None:
        """Count an attempt that has led to nothing."""
        self._under_way -= 1
        self._away = True
        self._not_before = self._clock() + spread(RECONNECT_SECONDS, self._randomness())

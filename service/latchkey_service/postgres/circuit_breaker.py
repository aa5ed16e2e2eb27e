"""When to try again to reach a database that is away. Pure: clock and randomness are passed in."""

import enum
import math
from collections.abc import Callable

__all__ = ["Attempt", "Reconnection", "spread"]

# While the database is away, between the end of one attempt and the next. Whoever needs a
# connection in between fails at once instead of piling up, and service resumes this soon after
# Postgres does.
RECONNECT_SECONDS = 0.25
# Attempts of a process under way at once: all connections that it ever has. A database that is
# frozen leaves attempts without an answer, and those whose callers have left meanwhile still wait
# at its door: it would meet all of them as it thaws.
ATTEMPTS_MAX = 21


def spread(seconds: float, randomness: float) -> float:
    """Return a pause of half of `seconds` to all of it. `randomness` is in [0, 1).

    Workers and hosts that lost the database at one moment do not knock in step.
    """
    return seconds * (0.5 + 0.5 * randomness)


class Attempt(enum.Enum):
    """What an attempt to connect is."""

    ORDINARY = enum.auto()
    PROBE = enum.auto()
    """It finds out whether the database is back, for all who need it."""


class Reconnection:
    """Tells a process whether an attempt to connect may begin.

    As long as attempts succeed any may, up to a bound. When one has failed, the database is in
    doubt: a connection may have been ended while it was made, and all else be well. So one attempt,
    a probe, finds out at once, and those who come meanwhile do well to wait for it. If it fails the
    database is away, and the next probe may begin after a pause.
    """

    def __init__(self, clock: Callable[[], float], randomness: Callable[[], float]) -> None:
        self._clock = clock
        self._randomness = randomness
        self._ordinary = 0
        self._probing = False
        self._well = True
        self._away = False
        self._not_before = -math.inf

    @property
    def in_doubt(self) -> bool:
        """Whether it is not known yet if the database is away."""
        return not (self._well or self._away)

    def begin(self) -> Attempt | None:
        """Return what an attempt that begins now is, until `succeed` or `fail`. None: it may not
        begin."""
        if self._well:
            if self._ordinary >= ATTEMPTS_MAX:
                return None
            self._ordinary += 1
            return Attempt.ORDINARY
        if self._probing or self._clock() < self._not_before:
            return None
        self._probing = True
        return Attempt.PROBE

    def succeed(self, attempt: Attempt) -> None:
        """Count an attempt that has led to a connection."""
        self._end(attempt)
        self._well, self._away = True, False
        self._not_before = -math.inf

    def fail(self, attempt: Attempt) -> None:
        """Count an attempt that has led to nothing."""
        self._end(attempt)
        self._well = False
        # Ordinary ones began before there was a doubt: what happened to the first may have happened
        # to all of them.
        if attempt is Attempt.PROBE:
            self._away = True
            self._not_before = self._clock() + spread(RECONNECT_SECONDS, self._randomness())

    def _end(self, attempt: Attempt) -> None:
        if attempt is Attempt.PROBE:
            self._probing = False
        else:
            self._ordinary -= 1

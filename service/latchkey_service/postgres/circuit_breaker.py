"""Decides when a process may try to connect to Postgres.

Owns the state of the circuit breaker and the pauses between attempts. It does not connect: clock
and randomness are passed in, and `connections.py` reports how each attempt ended.
"""

import enum
import math
from collections.abc import Callable

__all__ = ["Attempt", "CircuitBreaker", "jittered"]

# Pause between failed attempts while the database is unreachable. Callers that need a connection
# in the meantime fail at once instead of piling up, and service resumes this soon after Postgres.
RECONNECT_SECONDS = 0.25
# Attempts that one process has in progress at once: as many as it ever has connections. A frozen
# database never answers an attempt, and the attempts of callers that gave up stay in its accept
# queue. When it continues, it has to serve all of them.
ATTEMPTS_MAX = 24


def jittered(seconds: float, randomness: float) -> float:
    """Return a random pause between half of `seconds` and all of it. `randomness` is in [0, 1).

    Without jitter, workers and hosts that lost the database together would also retry together.
    """
    return seconds * (0.5 + 0.5 * randomness)


class Attempt(enum.Enum):
    """Kind of an attempt to connect."""

    ORDINARY = enum.auto()
    PROBE = enum.auto()
    """The single attempt that finds out, for all callers, whether the database is back."""


class _State(enum.Enum):
    CLOSED = enum.auto()
    """Connecting works."""
    HALF_OPEN = enum.auto()
    """An attempt failed, and no probe has confirmed yet that the database is unreachable."""
    OPEN = enum.auto()
    """A probe failed: the database is unreachable."""


class CircuitBreaker:
    """Permits or refuses attempts to connect.

    While closed, it permits up to `ATTEMPTS_MAX` attempts at once. The first failure makes it half
    open: perhaps only that connection was ended while it was being made. One probe then finds out
    at once, and callers that arrive in the meantime should wait for its result. If the probe fails,
    the breaker opens and permits one probe after each pause.
    """

    def __init__(self, clock: Callable[[], float], randomness: Callable[[], float]) -> None:
        self._clock = clock
        self._randomness = randomness
        self._ordinary = 0
        self._probing = False
        self._state = _State.CLOSED
        self._not_before = -math.inf

    @property
    def state(self) -> str:
        """The state's name: closed, half_open or open."""
        return self._state.name.lower()

    @property
    def half_open(self) -> bool:
        """Whether an attempt failed, and a probe has not yet shown whether the database is
        unreachable.
        """
        return self._state is _State.HALF_OPEN

    def begin(self) -> Attempt | None:
        """Start an attempt and return its kind, or None if no attempt may start now.

        Report its end with `succeed` or `fail`.
        """
        if self._state is _State.CLOSED:
            if self._ordinary >= ATTEMPTS_MAX:
                return None
            self._ordinary += 1
            return Attempt.ORDINARY
        if self._probing or self._clock() < self._not_before:
            return None
        self._probing = True
        return Attempt.PROBE

    def succeed(self, attempt: Attempt) -> None:
        """Record that an attempt succeeded, and close the breaker."""
        self._end(attempt)
        self._state = _State.CLOSED
        self._not_before = -math.inf

    def fail(self, attempt: Attempt) -> None:
        """Record that an attempt failed."""
        self._end(attempt)
        if attempt is Attempt.PROBE:
            self._state = _State.OPEN
            self._not_before = self._clock() + jittered(RECONNECT_SECONDS, self._randomness())
        elif self._state is _State.CLOSED:
            # Ordinary attempts began before the first failure, and one event may have ended all of
            # them. So their failures never open the breaker; only a probe's does.
            self._state = _State.HALF_OPEN

    def _end(self, attempt: Attempt) -> None:
        if attempt is Attempt.PROBE:
            self._probing = False
        else:
            self._ordinary -= 1

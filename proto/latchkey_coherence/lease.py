"""Lease arithmetic. Durations are seconds on the process's own `boottime`, not on a wall clock."""

import time
from collections.abc import Callable
from functools import partial
from typing import Final

__all__ = [
    "DRIFT_MAX",
    "LEASE_SECONDS_MAX",
    "boottime",
    "client_lease_end",
    "outwait_seconds",
    "server_lease_end",
]

# How far the rates of two machines' clocks may differ: a thousandth, many times what clocks that
# are kept by NTP do, and twice what NTP allows itself to slew them by.
DRIFT_MAX: Final = 0.001

# The longest lease that a server may be set to. Who does not know which servers there are waits for
# this long.
LEASE_SECONDS_MAX: Final = 5.0

# Goes on while the machine sleeps, which `time.monotonic` on Linux does not: a lease that stood
# still during a suspend would come back to life. On macOS CLOCK_MONOTONIC is of this kind.
boottime: Final[Callable[[], float]] = partial(
    time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
)


def server_lease_end(began: float, lease_seconds: float) -> float:
    """Return when a server's lease ends that it began to renew at `began` (coherence rule 3).

    `began` is read before the log is.
    """
    return began + lease_seconds * (1 - DRIFT_MAX)


def client_lease_end(asked: float, granted_seconds: float) -> float:
    """Return when a client's lease ends that it asked for at `asked` (coherence rule 6).

    A thousandth less than was granted, so that it ends before the server's own, by whose clock the
    grant was measured.
    """
    return asked + granted_seconds * (1 - DRIFT_MAX)


def outwait_seconds(lease_seconds: float) -> float:
    """Return how long to wait, by whosever clock, for a lease of this length to have ended.

    Counted from a moment after which it cannot have been renewed (coherence rules 8 and 9).
    """
    return lease_seconds * (1 + DRIFT_MAX)

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

# Maximum difference between the rates of two machines' clocks: a thousandth. That is many times the
# difference under NTP, and twice the rate at which NTP may slew a clock.
DRIFT_MAX: Final = 0.001

# The longest lease that can be configured for a server. A process that does not know which servers
# exist waits for this long.
LEASE_SECONDS_MAX: Final = 5.0

# Keeps running while the machine sleeps, unlike `time.monotonic` on Linux: otherwise a lease could
# still seem valid hours later. On macOS CLOCK_MONOTONIC keeps running too.
boottime: Final[Callable[[], float]] = partial(
    time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
)


def server_lease_end(began: float, lease_seconds: float) -> float:
    """Return the end of a server's lease whose renewal began at `began` (rule 3).

    `began` is the clock before the log was read.
    """
    return began + lease_seconds * (1 - DRIFT_MAX)


def client_lease_end(asked: float, granted_seconds: float) -> float:
    """Return the end of a client's lease that was requested at `asked` (rule 6).

    A thousandth shorter than granted, so that it ends before the server's lease, whose clock
    measured the grant.
    """
    return asked + granted_seconds * (1 - DRIFT_MAX)


def outwait_seconds(lease_seconds: float) -> float:
    """Return how long to wait, on any machine's clock, until a lease of this length has ended.

    Counted from a moment after which the lease cannot have been renewed (rules 8 and 9).
    """
    return lease_seconds * (1 + DRIFT_MAX)

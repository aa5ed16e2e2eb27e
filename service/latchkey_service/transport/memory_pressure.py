"""Decides when a worker has to give up connections to stay below its limit on memory.

The supervisor kills a worker above the limit, and all its callers lose their connections. Well
below it, the connection guard ends the connections that have not shown an identity: a stranger can
make a worker keep almost nothing else. Owns the decision, the known peers, and the return of free
memory to the system; `connection_guard.py` ends connections.
"""

import ctypes
import math
import os
import sys
import threading
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Final

__all__ = ["KnownPeers", "MemoryPressure", "resident_bytes", "trim"]

# Of the limit. A burst of 90,000 calls filled 500 MB more until its connections had ended.
PRESSURE_SHARE: Final = 0.5
# Further growth, as a share of the limit, before more connections end. Otherwise a worker whose
# memory is in use for good would end each new connection.
STEP_SHARE: Final = 0.05
# From the end of connections to the second return of free memory, which their calls have left by
# then. A return takes a few tenths of a second for a gigabyte, and delays allocations meanwhile, so
# memory that stays in use causes no further one.
TRIM_SECONDS: Final = 10.0
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class KnownPeers:
    """The peers, as gRPC reports them, that have shown an identity on their connection."""

    def __init__(self) -> None:
        self._new: set[str] = set()
        self._old: AbstractSet[str] = frozenset()
        self._forgetting = threading.Lock()

    def add(self, peer: str) -> None:
        """Record that a peer has shown an identity. Without a guard, nobody would forget it."""
        if sys.platform == "linux":
            self._new.add(peer)

    def __contains__(self, peer: str) -> bool:
        return peer in self._old or peer in self._new

    def keep(self, connected: AbstractSet[str]) -> None:
        """Forget those that are not connected. Others may be added meanwhile, by another thread."""
        with self._forgetting:
            # Peers that are new may have connected after `connected` was read.
            new, self._new = self._new, set()
            self._old = (self._old & connected) | new

    def clear(self) -> None:
        """Forget all of them, because a new policy may not know them. Their next calls add them."""
        with self._forgetting:
            self._new, self._old = set(), frozenset()


class MemoryPressure:
    """Judges the resident memory of a worker with a limit of `bytes_max`; 0: no limit."""

    def __init__(
        self,
        bytes_max: int,
        resident: Callable[[], int],
        trim: Callable[[], None],
    ) -> None:
        self._least = self._level = PRESSURE_SHARE * bytes_max or math.inf
        self._step = STEP_SHARE * bytes_max
        self._resident = resident
        self._trim = trim
        self._trim_at = math.inf

    def is_due(self, now: float) -> bool:
        """Return whether `judge` has something to do, and let the level follow memory down.

        Takes a few microseconds. `now` is in seconds on any clock.
        """
        resident = self._resident()
        if resident < self._least:
            # Not the threshold at once: memory that stays near it would be returned ten times a
            # second.
            self._level = max(self._least, min(self._level, resident + self._step))
        return resident >= self._level or now >= self._trim_at

    def judge(self, now: float) -> bool:
        """Return free memory to the system, and return whether connections must end.

        May take a few tenths of a second.
        """
        grown = self._resident() >= self._level
        # The allocator may keep most of it for the next burst.
        self._trim()
        resident = self._resident()
        ends = resident >= self._level
        self._trim_at = now + TRIM_SECONDS if ends else math.inf
        if grown:
            self._level = max(self._least, resident + self._step)
        return ends


def resident_bytes() -> int:
    """Return the resident memory of this process, or 0 if unknown."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - avoids a Path object
            return int(file.read().split()[1]) * PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return 0


def trim() -> None:
    """Return free memory to the system, where the C library has a function for that."""
    # Not in musl.
    if (function := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        function(0)

"""Measures how late the event loop of a process runs, to tell a busy process from a slow database.

An answer of the database waits in the socket while the event loop is busy. So a statement that
seems to take long may have been answered at once. `WATCH.clock` is a clock that pauses during
delays of the loop: whatever is late by that clock has a cause outside this process.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from latchkey_service.errors import BUSY, NO_ANSWER
from latchkey_service.settings.logs import logger

__all__ = ["LATE_SECONDS", "TICK_SECONDS", "WATCH", "LoopWatch", "reason_for"]

# How often the loop ticks. Each tick costs a few microseconds.
TICK_SECONDS: Final = 0.05
# A tick that is late by no more than this does not count as delayed.
GRACE_SECONDS: Final = 0.02
# A delay that callers notice. It takes up a part of every time limit of the database.
LATE_SECONDS: Final = 0.25
# How long the longest delay is reported. Prometheus asks at such intervals.
KEPT_SECONDS: Final = 15.0
# Longer than any time limit of the database. An earlier delay did not make one of them pass.
RECENT_SECONDS: Final = 3.0
# Between two log lines.
LOG_SECONDS: Final = 10.0


class LoopWatch:
    """Watches the event loop of a process. `monotonic` measures seconds."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        # None while `run` does not run: then no delay is known.
        self._ticked_at: float | None = None
        # The delays up to the last tick.
        self._delayed_seconds = 0.0
        self._delays: list[tuple[float, float]] = []
        self._logged_at = -LOG_SECONDS

    def clock(self) -> float:
        """Return seconds of a clock that pauses while the event loop is delayed."""
        now = self._monotonic()
        return now - self._delayed_seconds - self._delay_at(now)

    def longest_seconds(self, kept_seconds: float = KEPT_SECONDS) -> float:
        """Return the longest delay of the last seconds, including one that still lasts."""
        now = self._monotonic()
        since = now - kept_seconds
        kept = (seconds for ended_at, seconds in self._delays if ended_at >= since)
        return max(self._delay_at(now), *kept, 0.0)

    @property
    def is_late(self) -> bool:
        """Whether the event loop is so late that time limits say little about the database."""
        return self.longest_seconds(RECENT_SECONDS) >= LATE_SECONDS

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            while True:
                self._ticked_at = self._monotonic()
                await asyncio.sleep(TICK_SECONDS)
                self.tick()
        finally:
            self._ticked_at = None

    def tick(self) -> None:
        """Record the delay since the last tick, and log it if callers notice it."""
        now = self._monotonic()
        delay = self._delay_at(now)
        self._ticked_at = now
        if not delay:
            return
        self._delayed_seconds += delay
        since = now - KEPT_SECONDS
        self._delays = [one for one in self._delays if one[0] >= since and one[1] > delay]
        self._delays.append((now, delay))
        if delay >= LATE_SECONDS and now - self._logged_at >= LOG_SECONDS:
            self._logged_at = now
            logger().warning(
                "the event loop is late",
                seconds=round(delay, 3),
                what_to_do="this process gets too little processor time for its load: add workers "
                "or processors; the database is not the cause",
            )

    def _delay_at(self, now: float) -> float:
        if self._ticked_at is None:
            return 0.0
        late = now - self._ticked_at - TICK_SECONDS
        return late if late > GRACE_SECONDS else 0.0


# A process has one event loop that answers calls.
WATCH: Final = LoopWatch()


def reason_for(error: BaseException) -> str:
    """Return the text that explains to the caller why a statement failed with a driver error."""
    return BUSY if isinstance(error, TimeoutError) and WATCH.is_late else NO_ANSWER

"""Writes the uses of tokens to Postgres every few seconds, beside the calls.

Owns when batches are written, and that each is written once. It does not own what they contain
(`usage.py`) or the SQL (`usage_table.py`).
"""

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Final

from latchkey_service.coherence.watch_events import ReportedUse
from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres.circuit_breaker import jittered
from latchkey_service.settings.logs import logger
from latchkey_service.tokens.usage import PendingUses, Use
from latchkey_service.tokens.usage_table import UsageTable

__all__ = ["UsageWriter"]

# A client reports every 4 s. Together with the time that both messages take, a use is in the table
# within the documented 15 s, even if one write fails.
WRITE_SECONDS: Final = 3.0
# Between two writes while uses arrive faster than every write can take. Other statements need the
# database too.
WRITE_GAP_SECONDS: Final = 0.05
# A statement with this many rows takes about 0.2 s, a tenth of the statement time-out, and about 3
# ms of the event loop.
BATCH_MAX: Final = 2_000
# How long a stopping server tries, within the time that the supervisor gives it beyond its grace.
# Enough for the uses of about 20,000 secrets in the last seconds.
CLOSE_SECONDS: Final = 2.0


class UsageWriter:
    """Writes the pending uses. `writer` is unique to this process. Event loop only."""

    def __init__(self, table: UsageTable, writer: str, unix_time: Callable[[], float]) -> None:
        self._filling = asyncio.Event()
        self.pending = PendingUses(self._filling.set)
        self.table = table
        self._writer = writer
        self._unix_time = unix_time
        # The batch that is being written, until its outcome is known, and its number.
        self._batch: list[Use] = []
        self._number = 0
        self._failing = False

    def report(self, caller: str, uses: Iterable[ReportedUse]) -> None:
        """Add uses that a client of `caller` reports."""
        self.pending.report(caller, uses, self._unix_time())

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            try:
                async with asyncio.timeout(
                    # At a different time in each worker.
                    jittered(WRITE_SECONDS, random.random())  # noqa: S311 - jitter
                ):
                    await self._filling.wait()
            except TimeoutError:
                pass
            self._filling.clear()
            # What arrives meanwhile can wait for the next round.
            for _ in range(1 + len(self.pending) // BATCH_MAX):
                if not await self.write_batch():
                    break
                await asyncio.sleep(WRITE_GAP_SECONDS)

    async def write_batch(self) -> bool:
        """Write one batch. Return False if nothing is left, or if the database is unavailable.

        In the latter case, the batch is kept for the next call.
        """
        if not self._batch:
            self._batch = self.pending.take(BATCH_MAX)
            self._number += 1
        if not self._batch:
            return False
        log = logger()
        try:
            await self.table.record(self._writer, self._number, self._batch)
        except StoreUnavailable as error:
            if not self._failing:
                log.warning("uses of tokens delayed", error=type(error).__name__)
            self._failing = True
            return False
        except Exception as error:  # noqa: BLE001 - one bad batch must not hold up the others
            # Only the type: the text may contain anything.
            log.error("uses of tokens lost", entries=len(self._batch), error=type(error).__name__)  # noqa: TRY400
        self._failing = False
        self._batch = []
        if dropped := self.pending.take_dropped():
            log.warning("uses of tokens not counted: too many at once", uses=dropped)
        return True

    async def close(self) -> None:
        """Write the remaining uses, for a limited time."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                while self._batch or len(self.pending):
                    if not await self.write_batch():
                        await asyncio.sleep(WRITE_GAP_SECONDS)
        except TimeoutError:
            left = len(self._batch) + len(self.pending)
            logger().error("uses of tokens lost", entries=left)

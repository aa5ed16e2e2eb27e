"""Extends the audit log's chain in the background, and removes what retention no longer keeps."""

import asyncio
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final

from latchkey_service.audit.audit_chain import NO_BATCH, Batch, ChainKeys, Head, batch_digest
from latchkey_service.audit.audit_table import Entry
from latchkey_service.audit.chain_table import ChainTable
from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres.circuit_breaker import jittered
from latchkey_service.settings.logs import logger

__all__ = ["BATCH_MAX", "SEAL_SECONDS", "AuditSealer"]

# Whoever removes an entry within this time of its commit leaves no trace in the chain. Each pass
# adds a row to it.
SEAL_SECONDS: Final = 5.0
# Digesting takes a few microseconds per entry, on the event loop.
BATCH_MAX: Final = 1_000
# How often the log names the newest batch, as evidence outside of the database.
LOG_SECONDS: Final = 3_600.0


class AuditSealer:
    """Extends the chain. One instance per worker process. Event loop only.

    All workers try, and one at a time succeeds.
    """

    def __init__(
        self,
        table: ChainTable,
        keys: ChainKeys,
        monotonic: Callable[[], float],
        randomness: Callable[[], float],
    ) -> None:
        self._table = table
        self._keys = keys
        self._monotonic = monotonic
        self._randomness = randomness
        self.head = NO_BATCH
        """The newest batch that this process has seen."""
        self.regressions = 0
        """How often the newest batch was gone or different. Only rises."""
        self._logged_at = -math.inf
        self._log = logger()

    async def run(self) -> None:
        """Extend the chain until cancelled."""
        failing = False
        while True:
            await asyncio.sleep(jittered(SEAL_SECONDS, self._randomness()))
            try:
                await self.seal()
            except StoreUnavailable:
                # The audit log reports it.
                pass
            except Exception as error:  # noqa: BLE001 - logged and repeated
                if not failing:
                    self._log.error("audit entries not sealed", error=type(error).__name__)
                failing = True
            else:
                failing = False

    async def seal(self) -> None:
        """Cover all entries that no batch covers yet, unless another process is doing this."""
        digest, newest, waiting = await self._table.look(self.head.number)
        self._compare(digest, newest)
        # The chain is sealed again with a new pepper, so that the old one can be removed.
        waiting = waiting or (newest is not None and newest.pepper_id != self._keys.newest_id)
        while waiting and (batch := await self._table.append(BATCH_MAX, self._next)) is not None:
            self.head = batch.head
            if self._monotonic() - self._logged_at >= LOG_SECONDS:
                self._logged_at = self._monotonic()
                self._log.info("audit log sealed", newest_batch=str(self.head))
            waiting = len(batch.entry_ids) == BATCH_MAX

    async def purge(self, before: datetime, limit: int) -> int:
        """Remove up to `limit` entries older than `before`, or one batch; return how many."""
        last = await self._table.removable(before, limit)
        if last is None:
            return 0
        return await self._table.remove(
            before, last, self._keys.newest_id, self._keys.seal_start(last)
        )

    def _compare(self, digest: bytes | None, newest: Batch | None) -> None:
        """Report if the newest batch that this process knows is gone.

        `digest` is what the database has for it.
        """
        head = NO_BATCH if newest is None else newest.head
        if self.head is not NO_BATCH and digest != self.head.digest:
            self.regressions += 1
            self._log.error(
                "sealed audit entries are missing",
                known_batch=str(self.head),
                newest_batch=str(head),
                what_to_do="If the database was not restored, somebody removed entries.",
            )
        self.head = head

    def _next(self, newest: Batch | None, entries: Sequence[Entry]) -> Batch | None:
        """Return the batch after `newest`, or None if it would prove nothing new."""
        before, times = NO_BATCH, [entry.time for entry in entries]
        if newest is not None:
            before = newest.head
            times.append(newest.time)
            if not (self._keys.knows(newest.pepper_id) and self._keys.is_genuine(newest)):
                # Somebody else wrote it. A seal over its digest would prove a history that this
                # service never saw. So the chain breaks here, and a check shows it.
                self._log.error("newest audit batch is not genuine", batch=str(before))
                before = Head(before.number, NO_BATCH.digest)
            elif not entries and newest.pepper_id == self._keys.newest_id:
                return None
        elif not entries:
            return None
        head = Head(before.number + 1, batch_digest(before, entries))
        return Batch(
            head.number,
            [entry.id for entry in entries],
            head.digest,
            self._keys.newest_id,
            self._keys.seal(head),
            max(times),
        )

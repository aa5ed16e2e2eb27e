"""Makes Deletes wait until no verifier can accept the token (rule 8).

Owns the polling of verifiers' rows and the notification after a commit. The decision is made by
`ack_rules`; the deletion and its receipt belong to the token store.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from latchkey_coherence.verdict_cache import Position

from latchkey_service import tracing
from latchkey_service.coherence.ack_rules import (
    PAUSE_SECONDS_MIN,
    Acknowledgements,
    PendingDeletion,
    pause_seconds,
)
from latchkey_service.coherence.rows import RowId
from latchkey_service.coherence.verifier_table import Rows, VerifierTable, read_rows
from latchkey_service.errors import NotConfirmed, StoreUnsupported
from latchkey_service.histogram import Histogram
from latchkey_service.postgres.connections import DedicatedConnection
from latchkey_service.settings.logs import logger

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["ACKNOWLEDGED", "OUTWAITED", "UNCONFIRMED", "AckWaiter"]

# The buckets of the metric: from a few milliseconds to the longest lease and the longest call.
WAIT_BOUNDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ACKNOWLEDGED, OUTWAITED, UNCONFIRMED = "acknowledged", "outwaited", "unconfirmed"


class AckWaiter:
    """Waits for acknowledgements. Each process has one waiter, so concurrent Deletes share the
    polls.
    """

    def __init__(
        self,
        table: VerifierTable,
        connect: "Callable[[], Awaitable[Connection]]",
        wake: Callable[[], None],
        clock: Callable[[], float],
        rows_complete_at: Callable[[], float],
        own_row: Callable[[], RowId | None],
        *,
        notify: bool,
    ) -> None:
        self._table = table
        # A database without the row of this process may lack other rows, too: it was restored from
        # a backup, and this process has not detected that yet. The row may be that of its host's
        # lead, which may have detected it and registered again: hence the incarnation (rule 8).
        self._own_row = own_row
        # Polls have a dedicated connection, because waiting Deletes may occupy the whole pool.
        self._connection = DedicatedConnection(connect)
        self._failing = False
        # Wakes this process's own lease renewer directly.
        self._wake = wake
        self._clock = clock
        # From this time on, a database that has this process's row also has those of all other
        # verifiers.
        self._rows_complete_at = rows_complete_at
        self._notify = notify
        self._waits: dict[asyncio.Future[Acknowledgements], PendingDeletion] = {}
        self._poller: asyncio.Task[None] | None = None
        self._pause_seconds = PAUSE_SECONDS_MIN
        self._announcer: asyncio.Task[None] | None = None
        self._unannounced = 0
        self.seconds = {
            result: Histogram(WAIT_BOUNDS) for result in (ACKNOWLEDGED, OUTWAITED, UNCONFIRMED)
        }
        """How long Deletes waited, by result: everyone acknowledged, the lease of a silent verifier
        or client had to expire, or the caller's time ran out."""
        self._log = logger()

    def __len__(self) -> int:
        return len(self._waits)

    def announce(self, revision: int) -> None:
        """Notify all verifiers of a new revision, without blocking. A verifier that misses the
        notification reads the revision at its next renewal.
        """
        self._wake()
        if not self._notify:
            return
        # While one notification is being sent, only the newest of the following revisions is kept.
        self._unannounced = max(self._unannounced, revision)
        if self._announcer is None:
            self._announcer = asyncio.create_task(self._announce(), name="announce deletions")

    async def wait(self, position: Position, deadline: float) -> Acknowledgements:
        """Wait until every verifier has acknowledged the committed `position`, or is outwaited.

        Raises NotConfirmed at `deadline`, seconds on the process's clock.
        """
        if tracing.of_task() is None:
            return await self._wait(position, deadline)
        with tracing.span("wait for verifiers", {}) as span:
            found = await self._wait(position, deadline)
            if span is not None:
                span.set({f"latchkey.verifiers.{name}": n for name, n in found._asdict().items()})
            return found

    async def _wait(self, position: Position, deadline: float) -> Acknowledgements:
        future: asyncio.Future[Acknowledgements] = asyncio.get_running_loop().create_future()
        began = self._clock()
        self._waits[future] = PendingDeletion(position, began)
        # A new deletion is likely to be acknowledged sooner than those that are already waiting.
        self._pause_seconds = PAUSE_SECONDS_MIN
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll(), name="confirm deletions")
        try:
            left = deadline - self._clock()
            async with asyncio.timeout(left if math.isfinite(left) else None):
                acknowledgements = await future
            expired = acknowledgements.outwaited or acknowledgements.clients_outwaited
            self.seconds[OUTWAITED if expired else ACKNOWLEDGED].observe(self._clock() - began)
            return acknowledgements
        except TimeoutError:
            self.seconds[UNCONFIRMED].observe(self._clock() - began)
            raise NotConfirmed(
                "The token is deleted, but not all verifiers have confirmed it yet: "
                "delete it again for the receipt."
            ) from None
        finally:
            self._waits.pop(future, None)

    def rest(self) -> None:
        """Close the connection if no Delete has used it for a while."""
        if self._poller is None:
            self._connection.rest(self._clock())

    async def close(self) -> None:
        """Stop. Close the waiter. No Delete may be waiting."""
        tasks = [task for task in (self._poller, self._announcer) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._connection.drop()

    async def _announce(self) -> None:
        """Send notifications until there is no newer revision."""
        tracing.leave()
        try:
            while self._unannounced:
                revision, self._unannounced = self._unannounced, 0
                try:
                    await self._table.notify(revision)
                except Exception as error:  # noqa: BLE001 - a lost notification only costs time
                    if isinstance(error, StoreUnsupported):
                        self._notify, self._unannounced = False, 0
                    self._log.warning("notification failed", error=type(error).__name__)
        finally:
            self._announcer = None

    async def _poll(self) -> None:
        """Poll the rows until no Delete waits."""
        tracing.leave()
        try:
            while self._waits:
                await asyncio.sleep(self._pause_seconds)
                # Only these: if a deletion arrives while the rows are read, they may have been read
                # before its commit.
                behind = await self._look(list(self._waits.items()))
                self._pause_seconds = pause_seconds(self._pause_seconds, behind)
        finally:
            # There is no await between the last check of `_waits` and this line.
            self._poller = None

    async def _look(
        self, waits: "list[tuple[asyncio.Future[Acknowledgements], PendingDeletion]]"
    ) -> list[PendingDeletion]:
        """Read the rows and answer the Deletes whose deletions they confirm. Return the others that
        the rows say anything about.
        """
        now, own_row = self._clock(), self._own_row()
        rows = await self._read({wait.position for _, wait in waits})
        if rows is None or now < self._rows_complete_at():
            return []
        if own_row is None or all(row[:2] != own_row for row in rows.verifiers):
            return []
        behind = []
        for future, wait in waits:
            if wait.position not in rows.known:
                # The connection leads to another history, such as a deposed primary's.
                # Acknowledgements there do not refer to this deletion (rule 12).
                self._connection.drop()
                continue
            acknowledgements = wait.evaluate(rows.verifiers, now)
            if acknowledgements is None:
                behind.append(wait)
            elif not future.done():
                future.set_result(acknowledgements)
                self._waits.pop(future, None)
        return behind

    async def _read(self, positions: set[Position]) -> Rows | None:
        """Return the rows, or None if they cannot be read. In that case, all Deletes continue to
        wait, until their deadlines at most.
        """
        try:
            rows = await read_rows(await self._connection.get(), positions)
        except Exception as error:  # noqa: BLE001 - logged once
            self._connection.drop()
            if not self._failing:
                self._log.warning("deletions cannot be confirmed", error=type(error).__name__)
            self._failing = True
            return None
        self._failing = False
        return rows

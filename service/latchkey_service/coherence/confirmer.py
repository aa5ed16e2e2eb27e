"""Waits, for Deletes, until no verifier can answer with the token (coherence rule 8)."""

import asyncio
import math
from collections.abc import Callable

from latchkey_service.coherence.confirmation import Confirmation, Wait
from latchkey_service.coherence.table import VerifierTable
from latchkey_service.errors import NotConfirmed, StoreUnavailable
from latchkey_service.log import logger

__all__ = ["Confirmer"]

# Between looks at the rows. A healthy verifier takes a few milliseconds, one that has to be waited
# out takes seconds; each look costs all of them a little.
POLL_SECONDS_MIN = 0.002
POLL_SECONDS_MAX = 0.05
POLL_FACTOR = 1.3


class Confirmer:
    """One for each process: Deletes that wait at the same time share the looks at the rows."""

    def __init__(
        self,
        table: VerifierTable,
        wake: Callable[[], None],
        clock: Callable[[], float],
        *,
        notify: bool,
    ) -> None:
        self._table = table
        # This process's own heart need not be notified.
        self._wake = wake
        self._clock = clock
        self._notify = notify
        self._waits: dict[asyncio.Future[Confirmation], Wait] = {}
        self._poller: asyncio.Task[None] | None = None
        self._poll_seconds = POLL_SECONDS_MIN
        self._announcer: asyncio.Task[None] | None = None
        self._unannounced = 0
        self._log = logger()

    def announce(self, revision: int) -> None:
        """Tell all verifiers that there is news. Nobody waits for that: they find it anyway."""
        self._wake()
        if not self._notify:
            return
        # The latest of those that come while one is on its way stands for all of them.
        self._unannounced = max(self._unannounced, revision)
        if self._announcer is None:
            self._announcer = asyncio.create_task(self._announce(), name="announce deletions")

    async def confirm(self, revision: int, deadline: float) -> Confirmation:
        """Wait for a revision that is committed. Raises NotConfirmed at `deadline`, its clock's."""
        future: asyncio.Future[Confirmation] = asyncio.get_running_loop().create_future()
        self._waits[future] = Wait(revision, self._clock())
        # Somebody new is more likely to be done soon than those who wait already.
        self._poll_seconds = POLL_SECONDS_MIN
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll(), name="confirm deletions")
        try:
            left = deadline - self._clock()
            async with asyncio.timeout(left if math.isfinite(left) else None):
                return await future
        except TimeoutError:
            raise NotConfirmed(
                "The token is deleted, but not all verifiers have confirmed it yet: "
                "delete it again for the receipt."
            ) from None
        finally:
            self._waits.pop(future, None)

    async def close(self) -> None:
        """Stop. Nobody waits any more when a server is closed."""
        tasks = [task for task in (self._poller, self._announcer) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _announce(self) -> None:
        """Notify until there is nothing new to notify of."""
        try:
            while self._unannounced:
                revision, self._unannounced = self._unannounced, 0
                try:
                    await self._table.notify(revision)
                except Exception as error:  # noqa: BLE001 - costs time, and nothing else
                    # Where it is not supported (0A000) there is no use in trying again.
                    self._notify = self._notify and isinstance(error, StoreUnavailable)
                    self._log.warning("not notified", error=type(error).__name__)
        finally:
            self._announcer = None

    async def _poll(self) -> None:
        """Look at the rows until nobody waits."""
        try:
            while self._waits:
                await asyncio.sleep(self._poll_seconds)
                self._poll_seconds = min(self._poll_seconds * POLL_FACTOR, POLL_SECONDS_MAX)
                # Only these: of one that comes while the rows are read, it is not known that they
                # were read after its commit.
                waits = list(self._waits.items())
                now = self._clock()
                try:
                    rows = await self._table.rows()
                except Exception as error:  # noqa: BLE001 - they wait on, each to its deadline
                    self._log.warning("rows not read", error=type(error).__name__)
                    continue
                for future, wait in waits:
                    confirmation = wait.judge(rows, now)
                    if confirmation is not None and not future.done():
                        future.set_result(confirmation)
                        self._waits.pop(future, None)
        finally:
            # No await between the last look at the dictionary and this.
            self._poller = None

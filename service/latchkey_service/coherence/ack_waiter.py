"""Waits, for Deletes, until no verifier can answer with the token (coherence rule 8)."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from latchkey_coherence.memory import Position

from latchkey_service.coherence.ack_rules import Confirmation, Wait
from latchkey_service.coherence.verifier_table import Rows, VerifierTable, read_rows
from latchkey_service.errors import NotConfirmed, StoreUnsupported
from latchkey_service.postgres.connections import answers
from latchkey_service.settings.logs import logger

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

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
        connect: "Callable[[], Awaitable[Connection]]",
        wake: Callable[[], None],
        clock: Callable[[], float],
        settles_at: Callable[[], float],
        own_id: str,
        *,
        notify: bool,
    ) -> None:
        self._table = table
        # A database without this process's row may lack other rows, too: it was restored from a
        # backup, and this process has not noticed yet.
        self._own_id = own_id
        # Its looks have a connection of their own: the Deletes that wait for them, and those that
        # wait to begin, may have all of the pool's.
        self._connect = connect
        self._connection: Connection | None = None
        self._failing = False
        # This process's own heart need not be notified.
        self._wake = wake
        self._clock = clock
        # From when on the rows that are read are certain to be complete.
        self._settles_at = settles_at
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

    async def confirm(self, position: Position, deadline: float) -> Confirmation:
        """Wait for a revision that is committed. Raises NotConfirmed at `deadline`, its clock's."""
        future: asyncio.Future[Confirmation] = asyncio.get_running_loop().create_future()
        self._waits[future] = Wait(position, self._clock())
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
        self._drop_connection()

    async def _announce(self) -> None:
        """Notify until there is nothing new to notify of."""
        try:
            while self._unannounced:
                revision, self._unannounced = self._unannounced, 0
                try:
                    await self._table.notify(revision)
                except Exception as error:  # noqa: BLE001 - costs time, and nothing else
                    if isinstance(error, StoreUnsupported):
                        self._notify, self._unannounced = False, 0
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
                rows = await self._look({wait.position for _, wait in waits})
                if rows is None or now < self._settles_at():
                    continue
                if all(row.id != self._own_id for row in rows.verifiers):
                    continue
                for future, wait in waits:
                    if wait.position not in rows.known:
                        # The connection leads to another history, such as a deposed primary's: what
                        # verifiers have acknowledged there is not this deletion (rule 12).
                        self._drop_connection()
                        continue
                    confirmation = wait.judge(rows.verifiers, now)
                    if confirmation is not None and not future.done():
                        future.set_result(confirmation)
                        self._waits.pop(future, None)
        finally:
            # No await between the last look at the dictionary and this.
            self._poller = None

    async def _look(self, positions: set[Position]) -> Rows | None:
        """Return the rows, or None where they cannot be read: all wait on, to their deadlines."""
        try:
            if self._connection is None or not await answers(self._connection):
                self._drop_connection()
                self._connection = await self._connect()
            rows = await read_rows(self._connection, positions)
        except Exception as error:  # noqa: BLE001 - logged once
            self._drop_connection()
            if not self._failing:
                self._log.warning("deletions cannot be confirmed", error=type(error).__name__)
            self._failing = True
            return None
        self._failing = False
        return rows

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

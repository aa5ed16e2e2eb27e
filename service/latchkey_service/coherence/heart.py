"""Keeps this process a verifier: registers, reads the log, renews the lease, acknowledges.

One task does all of it, beat by beat, so that no two steps overlap: what is applied was read after
the beat's clock, and a lease is only ever extended to what that clock allows (coherence rule 3).
"""

import asyncio
import contextlib
import math
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from latchkey_service.coherence.confirmation import Census
from latchkey_service.coherence.membership import Membership
from latchkey_service.coherence.table import Identity, OwnRow
from latchkey_service.errors import NO_ANSWER, TOO_LATE, Overloaded, StoreUnavailable, Unavailable
from latchkey_service.log import logger
from latchkey_service.reconnection import spread

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Heart"]

# After a failure. Verifies that need a lease fail at once in between instead of piling up, and
# service resumes this soon after Postgres does.
RETRY_SECONDS = 0.25
# A stop does not wait for a database that hangs: the row lapses by itself.
REMOVE_SECONDS = 1.0
# Verifies that wait for the lease: as many as may wait for a look-up.
WAITING_MAX = 10_000


class Heart:
    """Drives a membership. Belongs to the event loop that it is used on."""

    def __init__(
        self,
        membership: Membership[Any],
        identity: Identity,
        connect: "Callable[[], Awaitable[Connection]]",
        clock: Callable[[], float],
    ) -> None:
        self.membership = membership
        self._on_news: Callable[[], None] = lambda: None
        self._clients: Callable[[], int] = lambda: 0
        self._notifications: Callable[[], int] = lambda: 0
        self._identity = identity
        self._connect = connect
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._log = logger()
        self._connection: Connection | None = None
        self._incarnation = 0
        self._census = Census()
        self._woken = asyncio.Event()
        self._news = True
        self._next_renewal = -math.inf
        self._began = -math.inf
        self._retry_at = -math.inf
        self._failing = False
        self._lost = False
        # Of verifies that wait for the lease.
        self._renewed: asyncio.Future[None] | None = None
        self._waiting = 0

    def attach(
        self,
        on_news: Callable[[], None],
        clients: Callable[[], int],
        notifications: Callable[[], int],
    ) -> None:
        """Call `on_news` after something was applied, and after each renewal; put into the row
        how many clients there are and how notifications do, as the contract has it."""
        self._on_news, self._clients, self._notifications = on_news, clients, notifications

    def wake(self) -> None:
        """There may be news in the log: read it now, not at the next renewal (rule 10)."""
        self._news = True
        self._woken.set()

    def wake_to_acknowledge(self) -> None:
        """Look whether there is something to acknowledge: a client has confirmed, or has left."""
        self._woken.set()

    def has_lease(self) -> bool:
        """Tell whether verifies may be answered."""
        return self._clock() < self.membership.lease_ends

    async def lease(self, deadline: float) -> None:
        """Wait until there is a lease (rule 5).

        Raises StoreUnavailable when it cannot be renewed, Overloaded, and Unavailable at
        `deadline`, seconds on the process's clock.
        """
        while not self.has_lease():
            if self._clock() < self._retry_at:
                raise StoreUnavailable(NO_ANSWER)
            if self._waiting >= WAITING_MAX:
                raise Overloaded("Too many verifies are waiting for the database; try again.")
            if self._renewed is None:
                self._renewed = self._loop.create_future()
                self._next_renewal = -math.inf
                self._woken.set()
            self._waiting += 1
            try:
                # Shielded: it is shared, and one caller's end is not the others'.
                async with asyncio.timeout(deadline - self._clock()):
                    await asyncio.shield(self._renewed)
            except TimeoutError:
                raise Unavailable(TOO_LATE) from None
            finally:
                self._waiting -= 1

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            try:
                await self._beat()
            except Exception as error:  # noqa: BLE001 - whatever it is, the lease runs out
                self._fail(error)
            else:
                self._succeed()
            await self._pause()

    async def stop(self, *, remove: bool) -> None:
        """End it, after `run` was. Nothing is answered from now on.

        With `remove` the row goes, since no client holds a sub-lease any more; without, Deletes
        wait until it has lapsed.
        """
        self.membership.lose()
        self._tell(StoreUnavailable("The server is stopping."))
        # The beat may have been cut short in the middle of a statement, and left its connection
        # of no use.
        self._drop_connection()
        if remove and self._incarnation:
            with contextlib.suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(REMOVE_SECONDS):
                    row = OwnRow(await self._connected(), self._identity)
                    await row.remove(self._incarnation)
            self._drop_connection()

    async def _beat(self) -> None:
        """Read what is new and renew what is due."""
        membership = self.membership
        due = self._clock() >= self._next_renewal
        if not (self._news or due or self._acknowledgeable() > membership.acknowledged):
            return
        row = OwnRow(await self._connected(), self._identity)
        if not membership.registered:
            self._incarnation += 1
            confirmed = membership.subleases.floor(self._clock())
            membership.register(*await row.register(self._incarnation, confirmed))
            self._log.info("registered", verifier=self._identity.id, incarnation=self._incarnation)
            due = self._news = True
        if self._news or due:
            # Before the log is read: news that comes while it is read is read again.
            self._news = False
            self._began = self._clock()
            if membership.apply(await row.read_log(membership.memory.applied)):
                # Clients are told at once, and acknowledge while the row below is written.
                self._on_news()
        acknowledgeable = self._acknowledgeable()
        if not due and acknowledgeable <= membership.acknowledged:
            return
        # Not sooner than this, whatever becomes of it: the beat after a failure is bounded too.
        self._next_renewal = self._began + membership.lease_seconds / 3
        renewed = await row.renew(
            self._incarnation, acknowledgeable, self._clients(), self._notifications()
        )
        if not renewed:
            self._log.warning("the row is gone: registering anew", verifier=self._identity.id)
            membership.lose()
            self._next_renewal = -math.inf
            if self._lost:
                # Twice in a row: whatever takes it away would go on.
                self._retry_at = self._clock() + _pause_after_failure()
            self._lost = True
            return
        self._lost = False
        membership.renew(self._began, acknowledgeable)
        # Those who wait for a lease to grant from, or to answer under.
        self._succeed()
        self._on_news()
        if due:
            membership.subleases.sweep(self._clock())
            await self._remove_dead(row)

    def _acknowledgeable(self) -> int:
        return self.membership.acknowledgeable(self._clock())

    async def _remove_dead(self, row: OwnRow) -> None:
        """Remove the rows of dead processes, so that no further Delete waits for them (rule 9)."""
        asked = self._clock()
        rows = await row.all_rows()
        for dead in self._census.dead(rows, asked, self._clock()):
            if await row.remove_dead(dead):
                self._log.warning("removed a dead verifier", verifier=dead.id)

    async def _pause(self) -> None:
        """Wait for a wake-up, the next renewal, or a client's lease to run out."""
        now = self._clock()
        if now < self._retry_at:
            await asyncio.sleep(self._retry_at - now)
            return
        until = min(self._next_renewal, self.membership.subleases.pinned_until)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - now)):
                await self._woken.wait()
        self._woken.clear()

    def _succeed(self) -> None:
        if self._failing:
            self._log.info("the lease is renewed again")
        self._failing = False
        if self.has_lease():
            self._tell(None)

    def _fail(self, error: Exception) -> None:
        """After this nothing is known of the connection, nor of what was sent on it."""
        self._drop_connection()
        if not isinstance(error, StoreUnavailable):
            self._log.exception("the heart stumbled", error=type(error).__name__)
        elif not self._failing:
            self._log.warning("the lease cannot be renewed", cause=type(error.__cause__).__name__)
        self._failing = self._news = True
        self._next_renewal = -math.inf
        self._retry_at = self._clock() + _pause_after_failure()
        self._tell(StoreUnavailable(NO_ANSWER))

    def _tell(self, error: Exception | None) -> None:
        renewed, self._renewed = self._renewed, None
        if renewed is None or renewed.done():
            return
        if error is None:
            renewed.set_result(None)
        else:
            renewed.set_exception(error)
            # Else asyncio complains where those who waited have left.
            renewed.exception()

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def _connected(self) -> "Connection":
        if self._connection is None or self._connection.is_closed():
            # A lease is for what was read and renewed on one connection: the one before may have
            # led to a primary that has been deposed since.
            self._news = True
            self._connection = await self._connect()
        return self._connection


def _pause_after_failure() -> float:
    return spread(RETRY_SECONDS, random.random())  # noqa: S311 - a spread

"""Keeps this process a verifier: registers, reads the log, renews the lease, acknowledges.

One task does all of it, beat by beat, so that no two steps overlap. A lease rests on one statement,
which renews, acknowledges and reads the log on one server, and it is counted from the clock before
that statement (coherence rule 3). A read of the log on its own only brings the memory forward.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from latchkey_service.coherence.ack_rules import Census
from latchkey_service.coherence.primary import Primary
from latchkey_service.coherence.verifier_state import Log, Membership
from latchkey_service.coherence.verifier_table import Identity, OwnRow, Report
from latchkey_service.errors import (
    NO_ANSWER,
    TOO_LATE,
    Overloaded,
    StoreUnavailable,
    Unavailable,
)
from latchkey_service.postgres.circuit_breaker import spread
from latchkey_service.settings.logs import logger

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
# A healthy client confirms within milliseconds. One that takes longer is named.
WAITED_SECONDS = 0.5
# Reads of the log until one has begun after a wake-up: one may be under way.
READS_TO_REACH = 2


class Heart:
    """Drives a membership. Belongs to the event loop that it is used on."""

    def __init__(
        self,
        membership: Membership[Any],
        identity: Identity,
        primary: Primary,
        clock: Callable[[], float],
    ) -> None:
        self.membership = membership
        self._on_news: Callable[[bool], None] = lambda _: None
        self._streams: Callable[[], int] = lambda: 0
        self._notifications: Callable[[], int] = lambda: 0
        self._identity = identity
        self._primary = primary
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._log = logger()
        self._connection: Connection | None = None
        self._incarnation = 0
        self._census = Census()
        self._woken = asyncio.Event()
        self._news = True
        self._next_renewal = -math.inf
        self._retry_at = -math.inf
        self._failing = False
        self._row_lost = False
        self._waiting_for: list[str] = []
        # Of verifies that wait for the lease.
        self._renewed: asyncio.Future[None] | None = None
        # Of reads that wait for the log to be applied up to their snapshot.
        self._read: asyncio.Future[None] | None = None
        self._waiting = 0

    def attach(
        self,
        on_news: Callable[[bool], None],
        streams: Callable[[], int],
        notifications: Callable[[], int],
    ) -> None:
        """Call `on_news` after each read of the log, with whether it changed anything; put into the
        row how many streams there are and how notifications do, as the contract has it."""
        self._on_news, self._streams, self._notifications = on_news, streams, notifications

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
            if self._renewed is None:
                self._renewed = self._loop.create_future()
                self._next_renewal = -math.inf
                self._woken.set()
            await self._wait(self._renewed, deadline)

    async def reach(self, revision: int, deadline: float) -> bool:
        """Read the log, and tell whether it reaches `revision` (rule 12).

        False: it ends before, so the revision is of another history. True does not say that it is
        of this one. Raises StoreUnavailable when the log cannot be read, Overloaded, and
        Unavailable at `deadline`, seconds on the process's clock.
        """
        for _ in range(READS_TO_REACH):
            if self._clock() < self._retry_at:
                raise StoreUnavailable(NO_ANSWER)
            self.wake()
            if self._read is None:
                self._read = self._loop.create_future()
            await self._wait(self._read, deadline)
            if self.membership.memory.position.revision >= revision:
                return True
        return False

    async def _wait(self, shared: "asyncio.Future[None]", deadline: float) -> None:
        if self._waiting >= WAITING_MAX:
            raise Overloaded("Too many verifies are waiting for the database; try again.")
        self._waiting += 1
        try:
            # Shielded: it is shared, and one caller's end is not the others'.
            async with asyncio.timeout(deadline - self._clock()):
                await asyncio.shield(shared)
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
        stopping = StoreUnavailable("The server is stopping.")
        self._tell(stopping)
        _fail(self._read, stopping)
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
            await self._register(row)
            due = True
        elif self._news:
            # Before the log is read: news that comes meanwhile is read again.
            self._news = False
            began = self._clock()
            log = await row.read_log(membership.memory.position)
            if log.known and log.server != membership.server:
                # Believed, it would let reads of that server be believed under a lease that stands
                # on another one. Only a renewal can bring the lease there.
                due = True
            else:
                changed = membership.apply(log, began)
                # Clients hear of it at once, and acknowledge while the row below is written.
                self._applied(changed=changed)
                if not log.known:
                    self._lost_history(log)
                    return
        acknowledgeable = self._acknowledgeable()
        if not due and acknowledgeable <= membership.acknowledged:
            return
        await self._renew(row, acknowledgeable)
        if due and membership.registered:
            membership.sweep(self._clock())
            await self._remove_dead(row)

    async def _register(self, row: OwnRow) -> None:
        self._incarnation += 1
        # A client that may still answer from memory has confirmed nothing on this history.
        clear = self.membership.subleases.floor(self._clock()) is None
        registration = await row.register(self._incarnation, acknowledge=clear)
        self.membership.register(*registration, self._clock())
        self._log.info("registered", verifier=self._identity.id, incarnation=self._incarnation)

    async def _renew(self, row: OwnRow, acknowledgeable: int) -> None:
        """Acknowledge, renew, and apply what the same statement read of the log."""
        membership = self.membership
        began = self._clock()
        # Not sooner than this, whatever becomes of it: the beat after a failure is bounded too.
        self._next_renewal = began + membership.lease_seconds / 3
        self._news = False
        renewed, log = await row.renew(
            self._incarnation,
            membership.memory.position,
            acknowledgeable,
            self._report(acknowledgeable),
        )
        changed = membership.apply(log, began)
        if renewed:
            self._row_lost = False
            membership.renew(began, acknowledgeable)
            if self._connection is not None:
                self._primary.renewed(self._connection, membership.server)
            self._succeed()
            # Also for clients that wait for a lease to be granted from.
            self._applied(changed=changed)
            return
        if log.known:
            self._log.warning("the row is gone: registering again", verifier=self._identity.id)
            membership.lose()
        self._applied(changed=True)
        self._lost_history(log)

    def _report(self, acknowledgeable: int) -> Report:
        now = self._clock()
        subleases = self.membership.subleases
        connection = self._connection
        seconds, waiting_for = self.membership.waiting_for(now)
        if seconds < WAITED_SECONDS:
            waiting_for = []
        if waiting_for != self._waiting_for:
            self._waiting_for = waiting_for
            if waiting_for:
                self._log.warning(
                    "deletions wait for clients", clients=waiting_for, seconds=round(seconds, 2)
                )
        return Report(
            self._streams(),
            subleases.confirmed(acknowledgeable, now),
            subleases.outwaited,
            waiting_for,
            self._notifications(),
            # Where this renewal goes, not where the last one went: the same statement writes which
            # server it reaches.
            "" if connection is None else self._primary.host_of(connection),
            self._primary.warnings(),
        )

    def _lost_history(self, log: Log) -> None:
        """Register again, at once the first time. The memory is empty by now."""
        if not log.known:
            connection = self._connection
            self._log.warning(
                "the database follows another history: starting over",
                verifier=self._identity.id,
                address="" if connection is None else self._primary.host_of(connection),
                system_identifier=log.server.identifier,
                timeline=log.server.timeline,
            )
        self._next_renewal = -math.inf
        if self._row_lost:
            # Twice in a row: whatever takes the row away would go on.
            self._retry_at = self._clock() + _pause_after_failure()
        self._row_lost = True

    def _applied(self, *, changed: bool) -> None:
        """Wake the reads and the clients that wait for the log."""
        read, self._read = self._read, None
        if read is not None and not read.done():
            read.set_result(None)
        self._on_news(changed)

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
        if self._news or self._acknowledgeable() > self.membership.acknowledged:
            return
        until = min(self._next_renewal, self.membership.subleases.pinned_until)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - now)):
                await self._woken.wait()
        self._woken.clear()

    def _succeed(self) -> None:
        if not self.has_lease():
            # A beat that found its history or its row lost has not failed, and renewed nothing.
            return
        if self._failing:
            self._log.info("the lease is renewed again")
        self._failing = False
        self._tell(None)

    def _fail(self, error: Exception) -> None:
        """After this nothing is known of the connection, nor of what was sent on it."""
        self._primary.failed(self._connection, error)
        self._drop_connection()
        if not isinstance(error, StoreUnavailable):
            self._log.exception("the heart stumbled", error=type(error).__name__)
        elif not self._failing:
            self._log.warning("the lease cannot be renewed", cause=type(error.__cause__).__name__)
        self._failing = self._news = True
        self._next_renewal = -math.inf
        self._retry_at = self._clock() + _pause_after_failure()
        self._tell(StoreUnavailable(NO_ANSWER))
        read, self._read = self._read, None
        _fail(read, StoreUnavailable(NO_ANSWER))

    def _tell(self, error: Exception | None) -> None:
        renewed, self._renewed = self._renewed, None
        if renewed is None or renewed.done():
            return
        if error is None:
            renewed.set_result(None)
        else:
            _fail(renewed, error)

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    async def _connected(self) -> "Connection":
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._primary.connect()
        return self._connection


def _fail(waiting: "asyncio.Future[None] | None", error: Exception) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_exception(error)
        # Else asyncio complains where those who waited have left.
        waiting.exception()


def _pause_after_failure() -> float:
    return spread(RETRY_SECONDS, random.random())  # noqa: S311 - a spread

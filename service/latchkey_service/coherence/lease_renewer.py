"""Keeps this process a verifier: registers, reads the log, renews the lease, acknowledges.

Owns the order of these steps. The rules are in `verifier_state`, the row and its connection in
`rows`, the SQL in `verifier_table`, and the choice of the database server in `primary`. A sibling
has its row at the lead of its host (`host_rows`), with the same steps.

One task takes all steps in sequence, so that they do not overlap. A single statement extends the
lease: it renews, acknowledges and reads the log on one server. The lease begins at the clock
reading before that statement (rule 3). Reading the log by itself only updates the cache.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import Callable
from typing import Any

from latchkey_service.coherence.dead_rows import DeadRows
from latchkey_service.coherence.rows import RowId, Rows
from latchkey_service.coherence.verifier_state import Log, VerifierState
from latchkey_service.coherence.verifier_table import Report, SiblingReport
from latchkey_service.errors import (
    NO_ANSWER,
    TOO_LATE,
    Overloaded,
    StoreUnavailable,
    Unavailable,
)
from latchkey_service.loop_delay import WATCH
from latchkey_service.postgres.circuit_breaker import jittered
from latchkey_service.settings.logs import logger

__all__ = ["LeaseRenewer"]

# Pause after a failure. During the pause, verifies that need a lease fail at once instead of piling
# up. The pause is short, so that service resumes soon after Postgres does.
RETRY_SECONDS = 0.25
# Limit of verifies that wait for the lease: the same as for a look-up.
WAITING_MAX = 10_000
# A healthy client confirms within milliseconds. The log names a client that needs longer than this.
WAITED_SECONDS = 0.5
# In leases: a sibling renews when this much of its lease is left, but not sooner than this pause
# after its last renewal. The lead renews a little earlier, and its siblings then hear of it.
EARLY_LEASES = 0.6
SOON_LEASES = 1 / 12
# A statement that takes longer suggests that Postgres does not answer.
SLOW_SECONDS = 0.25


class LeaseRenewer:
    """Runs the statements of a VerifierState, on the event loop on which it was created."""

    def __init__(
        self,
        state: VerifierState[Any],
        own_id: str,
        rows: Rows,
        clock: Callable[[], float],
    ) -> None:
        self.state = state
        self._on_news: Callable[[bool], None] = lambda _: None
        self._streams: Callable[[], int] = lambda: 0
        self._notifications: Callable[[], int] = lambda: 0
        # The siblings with a lease, and the confirmed and the outwaited clients of those.
        self._siblings: Callable[[], list[SiblingReport]] = list
        self._siblings_clients: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._id = own_id
        self._rows = rows
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._log = logger()
        self._dead_rows = DeadRows(own_id, state.lease_seconds, clock)
        self._woken = asyncio.Event()
        self._news = True
        self._next_renewal = self._next_detection = -math.inf
        # When the row next lists the siblings.
        self._next_list = -math.inf
        self._retry_at = -math.inf
        self._failing = False
        # When the statement in progress began.
        self._busy_since = math.inf
        self._row_lost = False
        self._waiting_for: list[str] = []
        self.renewals = self.failures = self.registrations = 0
        """How often the lease was renewed, how often that failed, and how often this process has
        registered, which empties the cache. These only increase."""
        # Verifies that wait for the lease share this future.
        self._renewed: asyncio.Future[None] | None = None
        # Reads that wait until the log is applied up to their snapshot share this future.
        self._read: asyncio.Future[None] | None = None
        self._waiting = 0

    def attach(
        self,
        on_news: Callable[[bool], None],
        streams: Callable[[], int],
        notifications: Callable[[], int],
    ) -> None:
        """Set the callbacks, which are created after the renewer.

        `on_news` is called after each read of the log, with whether it changed anything. `streams`
        and `notifications` provide what the row reports: the number of streams, and the state of
        notifications as numbered in the contract.
        """
        self._on_news, self._streams, self._notifications = on_news, streams, notifications

    def attach_siblings(
        self,
        reports: Callable[[], list[SiblingReport]],
        clients: Callable[[], tuple[int, int]],
    ) -> None:
        """Set the callbacks for what the row reports about the siblings of this process."""
        self._siblings, self._siblings_clients = reports, clients

    @property
    def row(self) -> RowId | None:
        """The row that represents this process, or None while it moves."""
        return self._rows.row

    def renew_now(self) -> None:
        """Renew at once, because the lead of this host has a longer lease or cannot be reached, or
        because a sibling has connected.
        """
        self._next_renewal = self._next_list = -math.inf
        self._woken.set()

    def wake(self) -> None:
        """Read the log now instead of at the next renewal, because it may have new entries (rule
        10).
        """
        self._news = True
        self._woken.set()

    def wake_to_apply(self) -> None:
        """Apply a log that the lead of this host has sent."""
        self._woken.set()

    def wake_to_acknowledge(self) -> None:
        """Check whether a revision can be acknowledged, because a client has confirmed or has
        left.
        """
        self._woken.set()

    def in_doubt(self) -> bool:
        """Return whether Postgres seems to fail: the last renewal failed, or one is slow."""
        slow = self._clock() - self._busy_since > SLOW_SECONDS
        return self._failing or slow or self._rows.in_doubt

    def has_lease(self) -> bool:
        """Return whether verifies may be answered."""
        return self._clock() < self.state.lease_ends

    async def wait_for_lease(self, deadline: float) -> None:
        """Wait until there is a lease (rule 5).

        Raises StoreUnavailable if the lease cannot be renewed, Overloaded if too many calls wait,
        and Unavailable at `deadline`, seconds on the process's clock.
        """
        while not self.has_lease():
            if self._clock() < self._retry_at:
                raise StoreUnavailable(NO_ANSWER)
            if self._renewed is None:
                self._renewed = self._loop.create_future()
                self._next_renewal = -math.inf
                self._woken.set()
            await self._wait(self._renewed, deadline)

    async def read_log_to(self, revision: float, deadline: float) -> bool:
        """Read the log, and return whether it reaches `revision` (rule 12).

        Returns False only after a read that began after this call: then the revision belongs to
        another history. If it does, the revision may still belong to another history. Raises
        StoreUnavailable if the log cannot be read, Overloaded if too many calls wait, and
        Unavailable at `deadline`, seconds on the process's clock.
        """
        asked = self._clock()
        while True:
            if self._clock() < self._retry_at:
                raise StoreUnavailable(NO_ANSWER)
            self.wake()
            if self._read is None:
                self._read = self._loop.create_future()
            await self._wait(self._read, deadline)
            if self.state.cache.position.revision >= revision:
                return True
            if self.state.log_read_began >= asked:
                return False

    async def _wait(self, shared: "asyncio.Future[None]", deadline: float) -> None:
        if self._waiting >= WAITING_MAX:
            raise Overloaded("Too many verifies are waiting for the database; try again.")
        self._waiting += 1
        try:
            # Shielded, because callers share the future: the cancellation of one caller must not
            # cancel it for the others.
            async with asyncio.timeout(deadline - self._clock()):
                await asyncio.shield(shared)
        except TimeoutError:
            raise Unavailable(TOO_LATE) from None
        finally:
            self._waiting -= 1

    async def run(self) -> None:
        """Renew until cancelled."""
        while True:
            self._busy_since = self._clock()
            try:
                await self._renew_once()
            except Exception as error:  # noqa: BLE001 - whatever the error, the lease ends
                self._fail(error)
            else:
                self._succeed()
            self._busy_since = math.inf
            await self._pause()

    async def stop(self, *, remove: bool) -> None:
        """Give up the lease after `run` has ended: from now on, no verify is answered. With
        `remove`, delete the row, because no client holds a lease. Without it, Deletes wait until
        the row's lease has expired.
        """
        self.state.lose()
        stopping = StoreUnavailable("The server is stopping.")
        self._wake_waiters(stopping)
        _fail(self._read, stopping)
        await self._rows.leave(remove=remove)

    async def _renew_once(self) -> None:
        """Read the log if it may have new entries, and renew the lease if that is due."""
        state = self.state
        due = self._clock() >= self._next_renewal
        received = self._rows.unasked_log(state.cache.position)
        acknowledgeable = self._acknowledgeable()
        if not (self._news or due or received or acknowledgeable > state.acknowledged):
            return
        await self._rows.get()
        if not state.registered:
            due, self._news = True, False
            await self._register()
        elif self._news or received:
            # A wake-up asks for a read that begins after it, so a log that was sent is too old.
            began = self._clock()
            log = received if received and not self._news else await self._read_log()
            if log.known and log.server != state.server:
                # If this log were applied, reads of that server would be accepted under a lease
                # from another one. Only a renewal can move the lease to it.
                due = True
            else:
                changed = state.apply(log, began)
                # Clients are notified at once, and confirm while the row below is being written.
                self._applied(changed=changed)
                if not log.known:
                    self._lost_history(log)
                    return
        acknowledgeable = self._acknowledgeable()
        if not due and acknowledgeable <= state.acknowledged:
            return
        await self._renew(acknowledgeable)
        if due and state.registered:
            state.sweep(self._clock())
            if self._clock() >= self._next_detection and (row := await self._rows.own_row()):
                self._next_detection = await self._dead_rows.remove(row)

    async def _read_log(self) -> Log:
        # Cleared before the log is read, so that a wake-up during the read causes another read.
        self._news = False
        return await self._rows.read_log(self.state.cache.position)

    async def _register(self) -> None:
        self.registrations += 1
        self._next_list = -math.inf
        # A client that may still answer from its cache has confirmed nothing on this history.
        clear = self.state.client_leases.floor(self._clock()) is None
        registration = await self._rows.register(acknowledge=clear)
        self.state.register(*registration, self._clock())
        # The first one is part of each start. A later one means that row or history was lost.
        log = self._log.debug if self.registrations == 1 else self._log.info
        log("registered", verifier=self._id, registrations=self.registrations)

    async def _renew(self, acknowledgeable: int) -> None:
        """Acknowledge, renew, and apply the log that the same statement read."""
        state = self.state
        began = self._clock()
        # Set before the statement, so that a slow renewal does not delay the next one. After a
        # failure, `_fail` decides when to try again.
        self._next_renewal = began + state.lease_seconds / 3
        news, self._news = self._news, False
        renewed, log, ends = await self._rows.renew(
            state.cache.position, acknowledgeable, self._report(acknowledgeable)
        )
        # The lead of a host has read the log earlier, and a wake-up asks for a later read.
        self._news |= news and log.read_began < began
        changed = state.apply(log, began)
        if renewed:
            self._row_lost = False
            state.renew(began, acknowledgeable, ends)
            if math.isfinite(ends):
                # Some of a lease that another process shares has passed already.
                soon, early = (state.lease_seconds * part for part in (SOON_LEASES, EARLY_LEASES))
                self._next_renewal = min(self._next_renewal, max(began + soon, ends - early))
            self.renewals += 1
            self._succeed()
            # This also wakes clients whose grants wait for this lease.
            self._applied(changed=changed)
            await self._rows.renewed(state)
            return
        if log.known:
            self._log.warning("verifier row is gone; registering again", verifier=self._id)
            state.lose()
        self._applied(changed=True)
        self._lost_history(log)

    def _report(self, acknowledgeable: int) -> Report:
        now = self._clock()
        client_leases = self.state.client_leases
        seconds, waiting_for = self.state.waiting_for(now)
        if seconds < WAITED_SECONDS:
            waiting_for = []
        if waiting_for != self._waiting_for:
            self._waiting_for = waiting_for
            if waiting_for:
                self._log.warning(
                    "deletions wait for clients", clients=waiting_for, seconds=round(seconds, 2)
                )
        confirmed, outwaited = self._siblings_clients()
        return Report(
            self._streams(),
            client_leases.count_confirmed(acknowledgeable, now) + confirmed,
            client_leases.outwaited + outwaited,
            waiting_for,
            self._notifications(),
            processes=1 + client_leases.count_processes(now),
            processes_outwaited=client_leases.processes_outwaited,
            siblings=self._listed_siblings(now),
        )

    def _listed_siblings(self, now: float) -> list[SiblingReport] | None:
        # The list is long and only for people, and a lead renews once for each Delete.
        if now < self._next_list:
            return None
        self._next_list = now + self.state.lease_seconds / 3
        return self._siblings()

    def _lost_history(self, log: Log) -> None:
        """Register again, with an empty cache: at once the first time, and after a pause from
        then on.
        """
        if not log.known:
            self._log.warning(
                "the database follows another history: starting over",
                verifier=self._id,
                address=self._rows.address,
                system_identifier=log.server.identifier,
                timeline=log.server.timeline,
            )
        self._next_renewal = -math.inf
        if self._row_lost:
            # The second time in a row: without a pause, repeated removals of the row would keep
            # this loop busy.
            self._retry_at = self._clock() + _pause_after_failure()
        self._row_lost = True

    def _applied(self, *, changed: bool) -> None:
        """Wake the reads and the clients that wait for the log."""
        read, self._read = self._read, None
        if read is not None and not read.done():
            read.set_result(None)
        self._on_news(changed)

    def _acknowledgeable(self) -> int:
        return self.state.acknowledgeable(self._clock())

    async def _pause(self) -> None:
        """Wait for a wake-up, the next renewal, or the end of a client's lease."""
        now = self._clock()
        if now < self._retry_at:
            await asyncio.sleep(self._retry_at - now)
            return
        if self._news or self._acknowledgeable() > self.state.acknowledged:
            return
        until = min(self._next_renewal, self.state.client_leases.pinned_until)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - now)):
                await self._woken.wait()
        self._woken.clear()

    def _succeed(self) -> None:
        if not self.has_lease():
            # A renewal that found its history or row lost has not failed, but has not extended the
            # lease either.
            return
        if self._failing:
            self._log.info("the lease is renewed again")
        self._failing = False
        self._wake_waiters(None)

    def _fail(self, error: Exception) -> None:
        """Drop the connection, because its state and the effect of the last statement are
        unknown.
        """
        self.failures += 1
        self._rows.failed(error)
        if not isinstance(error, StoreUnavailable):
            self._log.exception("lease renewal failed", error=type(error).__name__)
        elif not self._failing:
            late = round(WATCH.longest_seconds(), 3)
            self._log.warning(
                "the lease cannot be renewed",
                cause=type(error.__cause__).__name__,
                # If this is large, the process is too busy, and the database may be healthy.
                event_loop_late_seconds=late,
            )
        self._failing = self._news = True
        self._next_renewal = self._next_detection = -math.inf
        self._retry_at = self._clock() + _pause_after_failure()
        self._wake_waiters(StoreUnavailable(NO_ANSWER))
        read, self._read = self._read, None
        _fail(read, StoreUnavailable(NO_ANSWER))

    def _wake_waiters(self, error: Exception | None) -> None:
        renewed, self._renewed = self._renewed, None
        if renewed is None or renewed.done():
            return
        if error is None:
            renewed.set_result(None)
        else:
            _fail(renewed, error)


def _fail(waiting: "asyncio.Future[None] | None", error: Exception) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_exception(error)
        # Marks the exception as retrieved. Otherwise asyncio would log it if all waiters have left.
        waiting.exception()


def _pause_after_failure() -> float:
    return jittered(RETRY_SECONDS, random.random())  # noqa: S311 - jitter

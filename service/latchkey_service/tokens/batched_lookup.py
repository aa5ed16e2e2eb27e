"""Verify's way to Postgres: look-ups that happen together share one query.

The first look-up of a loop tick starts a query; those of the same tick join it, and those that
come while it is under way wait for the next one. So one look-up waits for one round trip, and a
thousand at once cost one query. A look-up never joins a query that was sent before it began
(coherence rule 4).

It holds one connection of its own: a pool would add a round trip and a wait. A second connection
was tried, and made batches smaller and each call dearer (60 instead of 51 µs of CPU).
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.errors import NO_ANSWER, TOO_LATE, Overloaded, StoreUnavailable, Unavailable
from latchkey_service.postgres.circuit_breaker import spread
from latchkey_service.postgres.connections import answers, retry_on_conflict, translate_errors
from latchkey_service.tokens.queue_limit import STUCK_SECONDS, QueueLimit
from latchkey_service.tokens.token_store import FIND_BY_DIGEST, record_of, snapshot_of
from latchkey_service.tokens.verdict import TokenRecord

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Found", "Lookup"]

# Digests to a query: BatchVerify's limit, so that a full batch is one query.
BATCH_MAX = 1_000
# Digests waiting: some 200 ms of work. More would only make everyone late.
WAITING_MAX = 10_000
# Calls that make Postgres busy; and where there are more for long, so many more may be there.
BUSY = 96
STANDING = 32
# Between attempts to connect. Look-ups in between fail at once instead of piling up, and service
# resumes this soon after Postgres does.
RECONNECT_SECONDS = 0.25
# The share of the newest in what a query is thought to take.
SMOOTHING = 0.2
# How late a look-up may be told that its deadline has passed: well within deadlines.ANSWER_SECONDS.
SWEEP_SECONDS = 0.02


class Found(NamedTuple):
    """A token's record, or None, and the snapshot that it was read in."""

    record: TokenRecord | None
    snapshot: Snapshot


class _Waiter:
    """One call's digests, the future that gets what is found, in order, and its deadline."""

    __slots__ = ("deadline", "digests", "future")

    def __init__(
        self, digests: Sequence[bytes], future: "asyncio.Future[list[Found]]", deadline: float
    ) -> None:
        self.digests = digests
        self.future = future
        self.deadline = deadline

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Lookup:
    """Finds records by digest. Belongs to the event loop that it is used on."""

    def __init__(
        self, connect: "Callable[[], Awaitable[Connection]]", monotonic: Callable[[], float]
    ) -> None:
        self._monotonic = monotonic
        # Asked for once: asyncio asks the kernel for the process id every time (Python 3.11).
        self._loop = asyncio.get_running_loop()
        self._link = _Link(connect, monotonic)
        self._waiting: list[_Waiter] = []
        self._waiting_digests = 0
        self._bound = QueueLimit(STANDING, WAITING_MAX)
        # Of queries: when the one under way began, and how long they take.
        self._asked_at: float | None = None
        self._query_seconds = 0.0
        self._closed = False
        self._worker: asyncio.Task[None] | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def find(self, digest: bytes, deadline: float) -> Found:
        """Return what is stored under a digest.

        Raises StoreUnavailable, Overloaded, and Unavailable at `deadline` (monotonic seconds).
        """
        return (await self._ask((digest,), deadline))[0]

    async def find_all(self, digests: Sequence[bytes], deadline: float) -> list[Found]:
        """Return what is stored under each of 1 to 1,000 digests, in order, from one snapshot."""
        return await self._ask(digests, deadline)

    def reconnect(self) -> None:
        """Give up the connection, which leads to the wrong place. Those who wait are told so."""
        self._link.drop()

    async def close(self) -> None:
        """Stop and give up the connection. Callers still waiting get StoreUnavailable."""
        self._closed = True
        stopping = StoreUnavailable("The server is stopping.")
        for waiter in self._outstanding():
            waiter.fail(stopping)
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._link.drop()

    def _ask(self, digests: Sequence[bytes], deadline: float) -> "asyncio.Future[list[Found]]":
        """Put digests in the queue. A future for each caller, since it may be cancelled."""
        if self._closed:
            raise StoreUnavailable("The server is stopping.")
        now = self._monotonic()
        if self._worker is None:
            self._bound.empty(now)
        more = len(self._waiting) + len(self._link.batch) - BUSY
        if self._waiting_digests + len(digests) > WAITING_MAX or (
            more > 0 and self._bound.rejects(more, now)
        ):
            if self._asked_at is not None and now - self._asked_at > STUCK_SECONDS:
                raise StoreUnavailable(NO_ANSWER)
            raise Overloaded("Too many verifies are waiting for the database; try again shortly.")
        if now + self._seconds_until_asked() > deadline:
            raise Overloaded(TOO_LATE)
        future: asyncio.Future[list[Found]] = self._loop.create_future()
        self._waiting.append(_Waiter(digests, future, deadline))
        self._waiting_digests += len(digests)
        if self._worker is None:
            # A task of its own, so that no caller's end stops it. It runs at the loop's next turn,
            # and so takes all that this turn's callers ask.
            self._worker = self._loop.create_task(self._work(), name="lookup")
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)
        return future

    async def _work(self) -> None:
        """Query until nobody waits."""
        try:
            while self._waiting:
                batch = self._next_batch()
                self._asked_at = self._monotonic()
                if len(batch) < BUSY:
                    self._bound.empty(self._asked_at)
                if await self._link.answer(batch):
                    took = self._monotonic() - self._asked_at
                    self._query_seconds += SMOOTHING * (took - self._query_seconds)
        finally:
            self._asked_at = None
            # No await between the last look at the list and this: nobody is left waiting unseen.
            self._worker = None

    def _seconds_until_asked(self) -> float:
        """Return how long it will take, as things go, until a look-up that comes now is asked."""
        if self._asked_at is None:
            return 0.0
        left = max(0.0, self._query_seconds - (self._monotonic() - self._asked_at))
        return left + self._waiting_digests // BATCH_MAX * self._query_seconds

    def _next_batch(self) -> list[_Waiter]:
        """Take waiters, in order, up to a full query."""
        size = count = 0
        for waiter in self._waiting:
            size += len(waiter.digests)
            if size > BATCH_MAX and count:
                break
            count += 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        self._waiting_digests -= sum(len(waiter.digests) for waiter in taken)
        return taken

    def _outstanding(self) -> Iterable[_Waiter]:
        yield from self._link.batch
        yield from self._waiting

    def _sweep(self) -> None:
        """Tell those whose deadline has passed. One timer for all: one each costs a verify 8 µs."""
        now = self._monotonic()
        pending = False
        for waiter in self._outstanding():
            if waiter.deadline <= now:
                waiter.fail(Unavailable(TOO_LATE))
            pending = pending or not waiter.future.done()
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep) if pending else None


class _Link:
    """One connection, made when first needed and again after a failure."""

    def __init__(
        self, connect: "Callable[[], Awaitable[Connection]]", monotonic: Callable[[], float]
    ) -> None:
        self._connect = connect
        self._monotonic = monotonic
        self._connection: Connection | None = None
        self._connect_after = 0.0
        self.batch: list[_Waiter] = []

    async def answer(self, batch: list[_Waiter]) -> bool:
        """Query for a batch and give each waiter its part, or the reason why there is none.

        Tell whether Postgres has answered.
        """
        self.batch = batch
        try:
            if wanted := [
                d for waiter in batch if not waiter.future.done() for d in waiter.digests
            ]:
                _deliver(await _find(await self._connected(), wanted), batch)
        except Exception as error:  # noqa: BLE001 - handed to every waiter, who raises it
            # Also after a time-out: what became of the query is unknown, so is the connection.
            self.drop()
            for waiter in batch:
                waiter.fail(error)
            return False
        else:
            return True
        finally:
            self.batch = []
            for waiter in batch:
                # Nobody waits for ever, whatever ended this.
                waiter.fail(StoreUnavailable("The server is stopping."))

    def drop(self) -> None:
        """Give up the connection, without a word to a server that may not listen."""
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            connection.terminate()

    async def _connected(self) -> "Connection":
        if (kept := self._connection) is not None:
            if await answers(kept):
                return kept
            self.drop()
        if self._monotonic() < self._connect_after:
            raise StoreUnavailable(NO_ANSWER)
        try:
            # Its plan is the same for every array; planning each time would double the cost.
            self._connection = connection = await self._connect()
        except Exception:
            self._connect_after = self._monotonic() + spread(
                RECONNECT_SECONDS,
                random.random(),  # noqa: S311 - a spread
            )
            raise
        return connection


@retry_on_conflict
async def _find(connection: "Connection", digests: list[bytes]) -> "list[asyncpg.Record]":
    with translate_errors():
        return await connection.fetch(FIND_BY_DIGEST, digests)


def _deliver(rows: "Sequence[asyncpg.Record]", batch: list[_Waiter]) -> None:
    """Give each waiter of a batch what the rows of its query hold."""
    snapshot = snapshot_of(rows[0])
    # The snapshot comes first, then the digest, NULL for "nothing found", then the token.
    by_digest = {row[3]: Found(record_of(row), snapshot) for row in rows if row[3] is not None}
    nothing = Found(None, snapshot)
    for waiter in batch:
        if not waiter.future.done():
            waiter.future.set_result([by_digest.get(d, nothing) for d in waiter.digests])

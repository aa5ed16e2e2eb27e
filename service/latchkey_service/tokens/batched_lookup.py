"""Looks up tokens for Verify: simultaneous look-ups share one query.

Owns the queue, its limits and one connection. It does not own the SQL (`token_table.py`), the rules
of seals (`seal.py`) or the verdict (`verifier.py`). Each row that was read is converted, and its
seal is checked, once for all look-ups that asked for it.

The first look-up of an event loop tick starts a query. Look-ups of the same tick join that query,
and later ones wait for the next query. So a single look-up waits for one round trip, and a thousand
simultaneous ones cost one query. A look-up never joins a query that was sent before it began
(coherence rule 4).

The connection is not from the pool, which would add a round trip and a wait. A second connection
made batches smaller and each call more expensive (60 instead of 51 µs of CPU).
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from latchkey_service import tracing
from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.coherence.snapshot import Snapshot, snapshot_of
from latchkey_service.errors import (
    NO_ANSWER,
    TOO_LATE,
    CacheStartedOver,
    LatchkeyError,
    Overloaded,
    StoreUnavailable,
    Unavailable,
)
from latchkey_service.histogram import Histogram
from latchkey_service.loop_delay import WATCH
from latchkey_service.postgres.connections import (
    DedicatedConnection,
    retry_on_conflict,
    translate_errors,
)
from latchkey_service.queue_limit import STUCK_SECONDS, QueueLimit
from latchkey_service.secret_format import Keyring
from latchkey_service.tokens.seal import Sealer
from latchkey_service.tokens.token_table import FIND_BY_DIGEST, record_of, secret_of
from latchkey_service.tokens.verdict import SecretRecord, TokenRecord

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Found", "LeasedLookup", "Lookup"]

# Digests per query: the limit of BatchVerify, so that a full batch is one query.
BATCH_MAX = 1_000
# Digests in the queue: about 200 ms of work. A longer queue would only make every caller late.
WAITING_MAX = 10_000
# Calls in progress that keep Postgres busy, and how many more may wait while that lasts.
BUSY = 96
STANDING = 32
# Weight of the newest sample in the moving average of query time.
SMOOTHING = 0.2
# The buckets of the metrics: digests per query, and seconds from about one round trip on a fast
# network to the time-out of a statement.
BATCH_BOUNDS = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000)
SECONDS_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2)
# The cache rarely starts over, and hardly ever twice within one round trip.
READS_MAX = 3
# Longest delay between a deadline and its error. Calls reserve more than that for their answer.
EXPIRY_CHECK_SECONDS = 0.02


class Found(NamedTuple):
    """A token and the secret that was looked up, or None twice, and the snapshot of the read."""

    record: TokenRecord | None
    secret: SecretRecord | None
    snapshot: Snapshot
    proven: bool = False
    """Whether the seal is valid. If not, `SealGuard.trusts` decides about the row."""


class _Waiter:
    """The digests of one call, the future for the results in the same order, and its deadline."""

    __slots__ = ("deadline", "digests", "future", "span")

    def __init__(
        self, digests: Sequence[bytes], future: "asyncio.Future[list[Found]]", deadline: float
    ) -> None:
        self.digests = digests
        self.future = future
        self.deadline = deadline
        # The span of the call, if it is recorded.
        self.span = tracing.of_task()

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Lookup:
    """Finds token records by digest. Use it on one event loop only.

    The peppers of `keyring` check the seals of the rows.
    """

    def __init__(
        self,
        connect: "Callable[[], Awaitable[Connection]]",
        monotonic: Callable[[], float],
        keyring: Keyring,
        answering: Callable[[], float] = WATCH.clock,
    ) -> None:
        self._monotonic = monotonic
        # Pauses while the event loop is late, because the database does not cause such delays.
        self._answering = answering
        self._asked_at = 0.0
        # Kept: get_running_loop() asks the kernel for the process id each time (Python 3.11).
        self._loop = asyncio.get_running_loop()
        self._lookup_connection = _LookupConnection(connect, Sealer(keyring.peppers))
        self._waiting: list[_Waiter] = []
        self._waiting_digests = 0
        self._queue_limit = QueueLimit(STANDING, WAITING_MAX)
        # Start of the query in progress, and the moving average of query time.
        self._query_began: float | None = None
        self._query_seconds = 0.0
        self.batch_sizes = Histogram(BATCH_BOUNDS)
        """Digests per query."""
        self.seconds = Histogram(SECONDS_BOUNDS)
        """The time of each query that Postgres answered."""
        self.failures = 0
        """Queries that failed."""
        self._closed = False
        self._worker: asyncio.Task[None] | None = None
        self._expiry_timer: asyncio.TimerHandle | None = None

    async def find_all(self, digests: Sequence[bytes], deadline: float) -> list[Found]:
        """Return the tokens with these digests, in order, from one snapshot.

        Up to 1,000, or as many for each pepper if the secrets are imported ones.

        Raises StoreUnavailable, Overloaded, and Unavailable at `deadline` (monotonic seconds).
        """
        return await self._enqueue(digests, deadline)

    @property
    def waiting(self) -> int:
        """How many digests wait for a query."""
        return self._waiting_digests

    def reconnect(self) -> None:
        """Close the connection, which leads to the wrong server. Waiting callers get an error."""
        self._lookup_connection.drop()

    def rest(self) -> None:
        """Close the connection if nobody has used it for a while."""
        if self._worker is None and not self._waiting:
            self._lookup_connection.rest(self._monotonic())

    async def close(self) -> None:
        """Stop and close the connection. Waiting callers get StoreUnavailable."""
        self._closed = True
        stopping = StoreUnavailable("The server is stopping.")
        for waiter in self._outstanding():
            waiter.fail(stopping)
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        self._lookup_connection.drop()

    def _enqueue(self, digests: Sequence[bytes], deadline: float) -> "asyncio.Future[list[Found]]":
        """Queue digests. Each caller gets its own future, which it may cancel."""
        if self._closed:
            raise StoreUnavailable("The server is stopping.")
        now = self._monotonic()
        more = len(self._waiting) + len(self._lookup_connection.batch) - BUSY
        if self._waiting_digests + len(digests) > WAITING_MAX or (
            more > 0 and self._is_too_long(more, now)
        ):
            if self._query_began is not None and self._answering() - self._asked_at > STUCK_SECONDS:
                raise StoreUnavailable(NO_ANSWER)
            raise Overloaded("Too many verifies are waiting for the database; try again shortly.")
        if now + self._expected_wait_seconds() > deadline:
            raise Overloaded(TOO_LATE)
        future: asyncio.Future[list[Found]] = self._loop.create_future()
        self._waiting.append(_Waiter(digests, future, deadline))
        self._waiting_digests += len(digests)
        if self._worker is None:
            # A separate task, which survives a cancelled caller. It starts in the loop's next tick,
            # so it takes all look-ups of this one.
            self._worker = self._loop.create_task(self._run_queries(), name="lookup")
        if self._expiry_timer is None:
            self._expiry_timer = self._loop.call_later(EXPIRY_CHECK_SECONDS, self._expire_waiters)
        return future

    def _is_too_long(self, more: int, now: float) -> bool:
        """Return whether the queue, with `more` calls than keep Postgres busy, is too long."""
        if self._query_began is None:
            # No query is in progress, so the queue was empty until this tick.
            self._queue_limit.empty(now)
        return self._queue_limit.rejects(more, now)

    async def _run_queries(self) -> None:
        """Run queries until the queue is empty."""
        tracing.leave()
        try:
            while self._waiting:
                batch = self._next_batch()
                self._query_began, self._asked_at = self._monotonic(), self._answering()
                if len(batch) < BUSY:
                    self._queue_limit.empty(self._query_began)
                self.batch_sizes.observe(sum(len(waiter.digests) for waiter in batch))
                if not await self._lookup_connection.answer(batch):
                    self.failures += 1
                else:
                    took = self._monotonic() - self._query_began
                    self.seconds.observe(took)
                    self._query_seconds += SMOOTHING * (took - self._query_seconds)
        finally:
            self._query_began = None
            # No await since the last check of the queue, so no caller is left in it.
            self._worker = None

    def _expected_wait_seconds(self) -> float:
        """Return the expected time until the query of a look-up that arrives now."""
        if self._query_began is None:
            return 0.0
        left = max(0.0, self._query_seconds - (self._monotonic() - self._query_began))
        return left + self._waiting_digests // BATCH_MAX * self._query_seconds

    def _next_batch(self) -> list[_Waiter]:
        """Remove waiters from the queue, in order, up to a full query."""
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
        yield from self._lookup_connection.batch
        yield from self._waiting

    def _expire_waiters(self) -> None:
        """Fail the waiters past their deadline.

        One timer serves all of them, because a timer each would cost a verify 8 µs.
        """
        now = self._monotonic()
        pending = False
        for waiter in self._outstanding():
            if waiter.deadline <= now:
                waiter.fail(Unavailable(TOO_LATE))
            pending = pending or not waiter.future.done()
        self._expiry_timer = (
            self._loop.call_later(EXPIRY_CHECK_SECONDS, self._expire_waiters) if pending else None
        )


class LeasedLookup:
    """Look-ups whose results count only under the process's lease."""

    def __init__(self, lookup: Lookup, reads: LeasedReads) -> None:
        self._lookup = lookup
        self._reads = reads

    @property
    def waiting(self) -> int:
        """How many digests wait for a query."""
        return self._lookup.waiting

    async def find(self, digests: Sequence[bytes], deadline: float) -> list[Found]:
        """Look up digests as `Lookup.find_all` does, and return the accepted records, in order.

        If the cache starts over during the read, because of an `InvalidateAll` or a new timeline,
        the read is not acceptable, and is repeated.
        """
        for _ in range(READS_MAX - 1):
            with contextlib.suppress(CacheStartedOver):
                return await self._find_once(digests, deadline)
        return await self._find_once(digests, deadline)

    async def _find_once(self, digests: Sequence[bytes], deadline: float) -> list[Found]:
        began = await self._reads.begin(deadline)
        found = await self._lookup.find_all(digests, deadline)
        await self._reads.accept(found[0].snapshot, began, deadline)
        return found


class _LookupConnection:
    """One connection, and the batch that is being looked up on it."""

    def __init__(self, connect: "Callable[[], Awaitable[Connection]]", sealer: Sealer) -> None:
        self._sealer = sealer
        # One plan fits every array; planning each query would double its cost.
        self._connection = DedicatedConnection(connect)
        self.batch: list[_Waiter] = []

    async def answer(self, batch: list[_Waiter]) -> bool:
        """Query for a batch and give each waiter its results or an error.

        Return whether Postgres answered.
        """
        self.batch = batch
        try:
            if wanted := [
                d for waiter in batch if not waiter.future.done() for d in waiter.digests
            ]:
                connection = await self._connection.get()
                spans = [waiter.span for waiter in batch if waiter.span is not None]
                with tracing.joined(spans) if spans else contextlib.nullcontext():
                    rows = await _find(connection, wanted)
                _deliver(rows, batch, self._sealer)
        except Exception as failure:  # noqa: BLE001 - every waiter raises it
            error: Exception = failure
            current = self._connection.current
            if not isinstance(failure, LatchkeyError) and (current is None or current.is_closed()):
                # The connection was terminated in the meantime, perhaps by `drop`. asyncpg may then
                # raise AttributeError or RuntimeError if it was about to look up a type.
                error = StoreUnavailable(NO_ANSWER)
                error.__cause__ = failure
            # After a time-out too: the state of the query is unknown, and so is the connection.
            self.drop()
            for waiter in batch:
                waiter.fail(error)
            return False
        else:
            return True
        finally:
            self.batch = []
            for waiter in batch:
                # Whatever ended this, no waiter is left behind.
                waiter.fail(StoreUnavailable("The server is stopping."))

    def rest(self, now: float) -> None:
        """Close the connection if it was idle for long. `now` is a reading of `boottime`."""
        self._connection.rest(now)

    def drop(self) -> None:
        """Close the connection. A batch under way gets an error."""
        self._connection.drop()


@retry_on_conflict
async def _find(connection: "Connection", digests: list[bytes]) -> "list[asyncpg.Record]":
    with translate_errors():
        return await connection.fetch(FIND_BY_DIGEST, digests)


def _deliver(rows: "Sequence[asyncpg.Record]", batch: list[_Waiter], sealer: Sealer) -> None:
    """Give each waiter of a batch its results from the rows."""
    snapshot = snapshot_of(rows[0])
    by_digest: dict[bytes, Found] = {}
    for row in rows:
        # Columns: the snapshot, the secret (its digest is NULL if nothing was found), then the
        # token.
        if row[3] is not None:
            record, secret = record_of(row), secret_of(row)
            proven = sealer.is_genuine(record, secret)
            by_digest[row[3]] = Found(record, secret, snapshot, proven)
    nothing = Found(None, None, snapshot)
    for waiter in batch:
        if not waiter.future.done():
            waiter.future.set_result([by_digest.get(d, nothing) for d in waiter.digests])

"""Draws calls of tokens with a rate limit from their buckets, for this process and its clients.

Draws that arrive while a statement is under way share the next one. Owns the queue and one
connection. It does not own the buckets (`rate_table.py`), or the shares in which calls are kept
until they are spent (`latchkey_coherence.rate`).

A draw is accepted only under a lease, and only if it reached the database that granted the lease
(rule 12). So a deposed primary stops issuing calls when the last leases that it granted end.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from latchkey_coherence.rate import RateLimit, share_end

from latchkey_service import tracing
from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.errors import (
    NO_ANSWER,
    TOO_LATE,
    LatchkeyError,
    Overloaded,
    StoreUnavailable,
    Unavailable,
)
from latchkey_service.postgres.connections import DedicatedConnection
from latchkey_service.tokens.rate_table import Issued, Want, draw_all

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Drawn", "RateDraws"]

# Tokens in one statement: as many as in one query of look-ups.
BATCH_MAX: Final = 1_000
# Tokens that wait for a statement: about ten statements, which take about as long as one second.
WAITING_MAX: Final = 10_000
# Limit for a statement with its connection, and for the wait for the lease. Later, its calls would
# have ended.
SECONDS_MAX: Final = 1.0


class Drawn(NamedTuple):
    """What one caller of `draw` gets for one token."""

    live: bool
    limit: RateLimit | None
    """None: the token has no limit any more, so every call that was needed is accepted."""
    calls: int
    """How many of the calls that were needed are accepted."""
    ahead: int
    """How many calls may be spent later, until `ends`."""
    retry_seconds: float
    """When the bucket can issue another call."""
    ends: float
    """Seconds on the process's clock."""


class _Waiter:
    __slots__ = ("future", "span", "wants")

    def __init__(self, wants: Sequence[Want], future: "asyncio.Future[list[Drawn]]") -> None:
        self.wants = wants
        self.future = future
        # The span of the call, if it is recorded.
        self.span = tracing.of_task()


class RateDraws:
    """Draws calls. Event loop only."""

    def __init__(
        self,
        connect: "Callable[[], Awaitable[Connection]]",
        reads: Callable[[Callable[[], None]], LeasedReads],
        clock: Callable[[], float],
    ) -> None:
        self._connection = DedicatedConnection(connect)
        self._reads = reads(self.reconnect)
        self._clock = clock
        self._waiting: list[_Waiter] = []
        self._waiting_tokens = 0
        self._worker: asyncio.Task[None] | None = None
        self._under_way: list[_Waiter] = []
        self._closed = False
        self.statements = 0
        """How many statements were sent. Only rises."""

    async def draw(self, wants: Sequence[Want], deadline: float) -> list[Drawn]:
        """Draw from the buckets of 1 to 1,000 tokens, and return what each issued, in order.

        Raises StoreUnavailable, Overloaded, and Unavailable at `deadline`, seconds on the process's
        clock. Calls that were issued nevertheless are lost.
        """
        if self._closed:
            raise StoreUnavailable("The server is stopping.")
        # Clients that ask ahead of demand leave room for verifies that wait.
        room = WAITING_MAX if any(want.needed for want in wants) else WAITING_MAX // 2
        if self._waiting_tokens + len(wants) > room:
            raise Overloaded("Too many verifies wait for calls of their tokens; try again.")
        waiter = _Waiter(wants, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._waiting_tokens += len(wants)
        if self._worker is None:
            # A separate task, which survives a cancelled caller, and takes all draws of this tick.
            self._worker = asyncio.create_task(self._run(), name="rate draws")
        try:
            async with asyncio.timeout(deadline - self._clock()):
                return await waiter.future
        except TimeoutError:
            raise Unavailable(TOO_LATE) from None

    def reconnect(self) -> None:
        """Close the connection, which leads to the wrong server."""
        self._connection.drop()

    def rest(self) -> None:
        """Close the connection if nobody has used it for a while."""
        if self._worker is None:
            self._connection.rest(self._clock())

    async def close(self) -> None:
        """Stop. Waiting callers get StoreUnavailable."""
        self._closed = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        _fail((*self._under_way, *self._waiting), StoreUnavailable("The server is stopping."))
        self._connection.drop()

    async def _run(self) -> None:
        """Draw until nobody waits."""
        tracing.leave()
        try:
            while self._waiting:
                self._under_way = self._next_batch()
                try:
                    await self._draw_for(self._under_way)
                except Exception as failure:  # noqa: BLE001 - every waiter raises it
                    error: Exception = failure
                    connection = self._connection.current
                    if not isinstance(failure, LatchkeyError) and (
                        connection is None or connection.is_closed()
                    ):
                        # Terminated meanwhile, perhaps by `reconnect`.
                        error = StoreUnavailable(NO_ANSWER)
                        error.__cause__ = failure
                    # The state of the statement is unknown, and so is the connection.
                    self._connection.drop()
                    _fail(self._under_way, error)
                self._under_way = []
        finally:
            # No await since the last check of the queue, so nobody is left in it.
            self._worker = None

    async def _draw_for(self, batch: Sequence[_Waiter]) -> None:
        # Nothing is drawn for callers that have left.
        wants = _sums(want for waiter in batch if not waiter.future.done() for want in waiter.wants)
        if not wants:
            return
        limit = self._clock() + SECONDS_MAX
        try:
            async with asyncio.timeout(SECONDS_MAX):
                began = await self._reads.begin(limit)
                connection = await self._connection.get()
                # The calls end this long after the statement was sent, and so at most this long
                # after they were issued.
                sent = self._clock()
                self.statements += 1
                spans = [waiter.span for waiter in batch if waiter.span is not None]
                with tracing.joined(spans) if spans else contextlib.nullcontext():
                    issued, snapshot = await draw_all(connection, wants)
                await self._reads.accept(snapshot, began, limit)
                # Without this, a deposed primary could issue calls for a second after the lease.
                self._reads.require_lease()
        except TimeoutError:
            raise Unavailable(TOO_LATE) from None
        ends = share_end(sent)
        if self._clock() >= ends:
            raise Unavailable(TOO_LATE)
        _deliver(batch, issued, ends)

    def _next_batch(self) -> list[_Waiter]:
        tokens = count = 0
        for waiter in self._waiting:
            tokens += len(waiter.wants)
            if tokens > BATCH_MAX and count:
                break
            count += 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        self._waiting_tokens -= sum(len(waiter.wants) for waiter in taken)
        return taken


def _sums(wants: Iterable[Want]) -> list[Want]:
    """Return one want for each token."""
    sums: dict[str, tuple[int, int]] = {}
    for token_id, needed, ahead in wants:
        before = sums.get(token_id, (0, 0))
        sums[token_id] = (before[0] + needed, before[1] + ahead)
    return [Want(token_id, *sums[token_id]) for token_id in sums]


def _deliver(batch: Sequence[_Waiter], issued: dict[str, Issued], ends: float) -> None:
    """Divide what was issued among the waiters: first to waiting verifies, in their order."""
    left = {token_id: one.calls for token_id, one in issued.items()}

    def take(token_id: str, wanted: int) -> int:
        taken = min(wanted, left[token_id])
        left[token_id] -= taken
        return taken

    # Those who have left get nothing, and their calls are lost.
    present = [waiter for waiter in batch if not waiter.future.done()]
    needed = [[take(want.token_id, want.needed) for want in waiter.wants] for waiter in present]
    for waiter, calls in zip(present, needed, strict=True):
        found = []
        for want, accepted in zip(waiter.wants, calls, strict=True):
            one = issued[want.token_id]
            if one.live and one.limit is None:
                # An Update has removed the limit, and the cache does not know that yet.
                found.append(Drawn(one.live, None, want.needed, 0, 0.0, ends))
            else:
                ahead = take(want.token_id, want.ahead)
                found.append(Drawn(one.live, one.limit, accepted, ahead, one.retry_seconds, ends))
        waiter.future.set_result(found)


def _fail(waiters: Iterable[_Waiter], error: Exception) -> None:
    for waiter in waiters:
        if not waiter.future.done():
            waiter.future.set_exception(error)

"""Verify's way to Postgres: look-ups that happen together share one query.

The first look-up of a loop tick starts a query; those of the same tick join it, and those that
come while it is under way wait for the next one. So one look-up waits for one round trip, and a
thousand at once cost one query. A look-up never joins a query that was sent before it began
(coherence rule 4).

It holds one connection of its own: a pool would add a round trip and a wait, and asyncpg does not
pipeline, so that more connections would only make the batches smaller.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latchkey_service.errors import LatchkeyError, Overloaded, StoreUnavailable
from latchkey_service.store import FIND_BY_DIGEST, record_of, translated
from latchkey_service.verdict import TokenRecord

if TYPE_CHECKING:
    import asyncpg

__all__ = ["Found", "Lookup"]

# Digests to a query: BatchVerify's limit, so that a full batch is one query.
BATCH_MAX = 1_000
# Digests waiting: some 100 ms of work. More would only make everyone late.
WAITING_MAX = 20_000
# Between attempts to connect. Look-ups in between fail at once instead of piling up, and service
# resumes this soon after Postgres does.
RECONNECT_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Found:
    """A token's record, or None, and the revision of the snapshot that it was read in."""

    record: TokenRecord | None
    revision: int


@dataclass(frozen=True, slots=True)
class _Waiter:
    """One call's digests and the future that gets their records, in order."""

    digests: Sequence[bytes]
    future: "asyncio.Future[list[Found]]"


class Lookup:
    """Finds records by digest. Belongs to the event loop that it is used on."""

    def __init__(
        self,
        connect: "Callable[[], Awaitable[asyncpg.Connection[asyncpg.Record]]]",
        monotonic: Callable[[], float],
    ) -> None:
        self._connect = connect
        self._monotonic = monotonic
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._connect_after = 0.0
        self._waiting: list[_Waiter] = []
        self._waiting_digests = 0
        self._worker: asyncio.Task[None] | None = None

    async def find(self, digest: bytes) -> Found:
        """Return what is stored under a digest. Raises StoreUnavailable or Overloaded."""
        return (await self.find_all((digest,)))[0]

    async def find_all(self, digests: Sequence[bytes]) -> list[Found]:
        """Return what is stored under each of up to 1,000 digests, in order, from one snapshot."""
        if self._waiting_digests + len(digests) > WAITING_MAX:
            raise Overloaded("Too many verifies are waiting for the database; try again shortly.")
        # A future for each caller: one that is cancelled leaves the others' answers alone.
        future: asyncio.Future[list[Found]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiter(digests, future))
        self._waiting_digests += len(digests)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work(), name="lookup")
        return await future

    async def close(self) -> None:
        """Stop and give up the connection. Callers still waiting get StoreUnavailable."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
        for waiter in self._take(len(self._waiting)):
            _fail(waiter, StoreUnavailable("The server is stopping."))
        self._drop_connection()

    async def _work(self) -> None:
        """Query until nobody waits. Runs as a task of its own, so that no caller's end stops it."""
        batch: list[_Waiter] = []
        try:
            while self._waiting:
                batch = self._next_batch()
                await self._answer(batch)
        except asyncio.CancelledError:
            for waiter in batch:
                _fail(waiter, StoreUnavailable("The server is stopping."))
            raise
        finally:
            # No await between the last look at the list and this: nobody is left waiting unseen.
            self._worker = None

    def _next_batch(self) -> list[_Waiter]:
        """Take waiters, in order, up to a full query."""
        size = count = 0
        for waiter in self._waiting:
            size += len(waiter.digests)
            if size > BATCH_MAX and count:
                break
            count += 1
        return self._take(count)

    def _take(self, count: int) -> list[_Waiter]:
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        self._waiting_digests -= sum(len(waiter.digests) for waiter in taken)
        return taken

    async def _answer(self, batch: list[_Waiter]) -> None:
        """Query for a batch and give each waiter its part, or the reason why there is none."""
        wanted = [d for w in batch if not w.future.done() for d in w.digests]
        if not wanted:
            return
        try:
            connection = await self._connected()
            with translated():
                rows = await connection.fetch(FIND_BY_DIGEST, wanted)
        except Exception as error:  # noqa: BLE001 - handed to every waiter, who raises it
            # Also after a time-out: what became of the query is unknown, so is the connection.
            self._drop_connection()
            for waiter in batch:
                _fail(waiter, error)
            return
        revision = rows[0]["revision"]
        by_digest = {
            row["digest"]: Found(record_of(row), revision)
            for row in rows
            if row["digest"] is not None
        }
        nothing = Found(None, revision)
        for waiter in batch:
            if not waiter.future.done():
                waiter.future.set_result([by_digest.get(d, nothing) for d in waiter.digests])

    async def _connected(self) -> "asyncpg.Connection[asyncpg.Record]":
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        if self._monotonic() < self._connect_after:
            raise StoreUnavailable("The database does not answer; try again shortly.")
        try:
            self._connection = connection = await self._connect()
            # The plan is the same for every array; making it anew each time would double the cost.
            with translated():
                await connection.execute("SET plan_cache_mode = force_generic_plan")
        except LatchkeyError:
            self._connect_after = self._monotonic() + RECONNECT_SECONDS
            raise
        return connection

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            connection.terminate()


def _fail(waiter: _Waiter, error: Exception) -> None:
    if not waiter.future.done():
        waiter.future.set_exception(error)

"""Look-ups on a real Postgres: how many queries they cost, and how they end."""

import asyncio
import os
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from latchkey_service.errors import Overloaded, StoreUnavailable, Unavailable
from latchkey_service.postgres.connections import Connector
from latchkey_service.queue_limit import CALM_SECONDS, STANDING_SECONDS, QueueLimit
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens import batched_lookup
from latchkey_service.tokens.batched_lookup import Lookup
from latchkey_service.tokens.management import NewToken, Tokens

from tests.helpers.domain import BelievedReads, audit_context, find

KEYRING = Keyring([Pepper(b"p" * 32)])


class Counted:
    """A connection that counts its queries and can hold them back."""

    def __init__(self, connection):
        self._connection = connection
        self.queries = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()

    async def fetch(self, statement, digests):
        self.queries.append(len(digests))
        self.asked.set()
        await self.gate.wait()
        return await self._connection.fetch(statement, digests)

    def __getattr__(self, name):
        return getattr(self._connection, name)


@pytest.fixture
async def counted(database_url):
    """The connection that the look-up uses."""
    connection = Counted(await Connector(database_url).connect())
    yield connection
    connection.terminate()


@pytest.fixture
async def lookup(counted):
    """A look-up on that connection."""

    async def give():
        return counted

    lookup = Lookup(give, time.monotonic, KEYRING)
    yield lookup
    await lookup.close()


@pytest.fixture
async def digests(store):
    """Digests of ten tokens."""
    for pepper in KEYRING.peppers:
        await store.register_pepper(pepper.id)
    tokens = Tokens(
        store,
        KEYRING,
        None,  # type: ignore[arg-type]  # nothing is deleted through it
        BelievedReads(),
        "lk",
        lambda: datetime.now(UTC),
        os.urandom,
    )
    made = [
        await tokens.create(
            NewToken("acme", f"token {number}", 1, None, None, {}), audit_context(), soon()
        )
        for number in range(10)
    ]
    return [KEYRING.digest_of(created.secret.reveal()) for created in made]


def new(number):
    return NewToken("acme", f"token {number}", 1, None, None, {})


def soon(seconds=5.0):
    return time.monotonic() + seconds


async def test_lookups_of_one_tick_share_a_query(lookup, counted, digests):
    """A hundred simultaneous look-ups cost one query, and each gets its own answer."""
    wanted = [digests[n % 10] for n in range(100)]
    found = await asyncio.gather(*(find(lookup, digest, soon()) for digest in wanted))
    assert counted.queries == [100]
    assert [f.record and f.record.name for f in found] == [f"token {n % 10}" for n in range(100)]
    # Each row is converted, and its seal checked, once for the ten look-ups that asked for it.
    assert all(f.proven for f in found)
    assert len({id(f) for f in found}) == 10


async def test_a_thousand_cost_one_query(lookup, counted, digests):
    """A full batch is one query, even with digests that no token has."""
    wanted = [digests[n % 10] if n % 2 else bytes([n % 256]) * 32 for n in range(1000)]
    found = await lookup.find_all(wanted, soon())
    assert counted.queries == [1000]
    assert [f.record is not None for f in found] == [bool(n % 2) for n in range(1000)]
    assert len({f.snapshot for f in found}) == 1
    assert found[0].snapshot.position.mark


async def test_a_lookup_during_a_query_waits_for_the_next(lookup, counted, digests):
    """A look-up never joins a query that was sent before it began (coherence rule 4)."""
    counted.gate.clear()
    first = asyncio.create_task(find(lookup, digests[0], soon()))
    await counted.asked.wait()
    others = [asyncio.create_task(find(lookup, digest, soon())) for digest in digests]
    await asyncio.sleep(0)
    assert counted.queries == [1]
    counted.gate.set()
    await asyncio.gather(first, *others)
    assert counted.queries == [1, 10]


async def test_a_cancelled_caller_does_not_affect_others(lookup, counted, digests):
    """If one of the look-ups that share a query is cancelled, the others are answered."""
    counted.gate.clear()
    tasks = [asyncio.create_task(find(lookup, digest, soon())) for digest in digests]
    await counted.asked.wait()
    tasks[0].cancel()
    counted.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    names = [r.record and r.record.name for r in results[1:] if not isinstance(r, BaseException)]
    assert names == [f"token {n}" for n in range(1, 10)]


async def test_a_deadline_ends_one_wait_and_not_the_others(lookup, counted, digests, monkeypatch):
    """At its deadline a look-up fails with UNAVAILABLE, in a query or in the queue; the others
    continue."""
    now = 1_000.0
    monkeypatch.setattr(lookup, "_monotonic", lambda: now)
    counted.gate.clear()
    asked = asyncio.create_task(find(lookup, digests[0], now + 1.0))
    await counted.asked.wait()
    queued = asyncio.create_task(find(lookup, digests[1], now + 1.0))
    patient = asyncio.create_task(find(lookup, digests[2], now + 5.0))
    # Let both enter the queue.
    await asyncio.sleep(0)
    now += 1.0
    for late in (asked, queued):
        with pytest.raises(Unavailable):
            await late
    assert not patient.done()
    counted.gate.set()
    record = (await patient).record
    assert record is not None
    assert record.name == "token 2"
    assert counted.queries == [1, 1], "expired look-ups are not queried"


async def test_a_closed_lookup_fails_all_callers(lookup, counted, digests):
    """When a look-up closes, waiting and later callers get StoreUnavailable, and nothing
    reconnects."""
    counted.gate.clear()
    waiting = [asyncio.create_task(find(lookup, digest, soon())) for digest in digests]
    await counted.asked.wait()
    await lookup.close()
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, StoreUnavailable)
    with pytest.raises(StoreUnavailable):
        await find(lookup, digests[0], soon())
    assert counted.is_closed()
    assert counted.queries == [10]


async def test_the_queue_is_bounded(lookup, counted, digests, monkeypatch):
    """A look-up beyond the bound is rejected at once."""
    monkeypatch.setattr(batched_lookup, "WAITING_MAX", 5)
    counted.gate.clear()
    waiting = [asyncio.create_task(find(lookup, d, soon())) for d in digests[:5]]
    await counted.asked.wait()
    more = [asyncio.create_task(find(lookup, d, soon())) for d in digests[:5]]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await find(lookup, digests[0], soon())
    counted.gate.set()
    await asyncio.gather(*waiting, *more)


async def test_an_unexpected_error_reaches_every_waiter(lookup, counted, digests, monkeypatch):
    """Whatever a query raises, no caller is left waiting."""

    async def fail(statement, digests):
        raise ZeroDivisionError

    monkeypatch.setattr(counted, "fetch", fail)
    results = await asyncio.gather(
        *(find(lookup, digest, soon()) for digest in digests), return_exceptions=True
    )
    assert {type(result) for result in results} == {ZeroDivisionError}


async def test_a_standing_queue_is_limited(lookup, counted, digests, monkeypatch):
    """A burst is accepted. While queries stay full, calls beyond the limit are rejected. They are
    accepted again after the queries have been small for a while."""
    monkeypatch.setattr(batched_lookup, "BUSY", 2)
    monkeypatch.setattr(batched_lookup, "STANDING", 1)
    now = 1_000.0
    monkeypatch.setattr(lookup, "_monotonic", lambda: now)
    monkeypatch.setattr(lookup, "_queue_limit", QueueLimit(batched_lookup.STANDING, 100))

    async def come(count: int) -> tuple[list[asyncio.Task[Any]], int]:
        tasks = [asyncio.create_task(find(lookup, digests[0], now + 60.0)) for _ in range(count)]
        await asyncio.sleep(0)
        refused = [task for task in tasks if task.done()]
        for task in refused:
            with pytest.raises((Overloaded, StoreUnavailable)):
                task.result()
        return [task for task in tasks if not task.done()], len(refused)

    counted.gate.clear()
    first, refused = await come(20)
    assert refused == 0
    await counted.asked.wait()
    now += STANDING_SECONDS + 0.01
    _, refused = await come(5)
    assert refused == 5
    counted.gate.set()
    await asyncio.gather(*first)
    now += CALM_SECONDS + 0.01
    last, refused = await come(20)
    assert refused == 0
    await asyncio.gather(*last)


async def test_a_connection_that_ends_during_a_query_is_an_outage() -> None:
    """Callers get UNAVAILABLE, whatever asyncpg raises when the connection is terminated."""

    class Terminated:
        closed = False

        def is_closed(self) -> bool:
            return self.closed

        def terminate(self) -> None:
            self.closed = True

        async def fetch(self, *_: object) -> None:
            finder.reconnect()
            raise RuntimeError("builtins.AttributeError")

    async def connect() -> Any:
        return Terminated()

    finder = Lookup(connect, time.monotonic, KEYRING)
    with pytest.raises(StoreUnavailable):
        await find(finder, bytes(32), time.monotonic() + 5)
    await finder.close()

"""The SQL of rate limits, on a real Postgres."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from latchkey_coherence.rate import RateLimit, draw
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.secret_format import Digest
from latchkey_service.tokens.rate_table import RateTable, Want, draw_all
from latchkey_service.tokens.verdict import Scope, TokenRecord

from tests.helpers.databases import session
from tests.helpers.domain import audit_context

if TYPE_CHECKING:
    from latchkey_service.tokens.token_store import TokenStore

CREATED = datetime(2026, 11, 1, 12, tzinfo=UTC)
# A draw may run this long before or after the clock that a test reads.
LATE_MICROSECONDS = 500_000
HOURLY = RateLimit(10, 3_600, 30)


async def insert(store: TokenStore, token_id: str, limit: RateLimit | None) -> None:
    record = TokenRecord(
        token_id, "acme", token_id, Scope.READ, CREATED, None, "lk_…abcd", rate_limit=limit
    )
    digest = Digest(token_id.encode().ljust(32, b"0"), "pepper")
    await store.register_pepper("pepper")
    await store.insert_token(record, token_id, digest, audit_context())


@pytest.mark.parametrize("seed", range(8))
async def test_statement_issues_what_the_reference_issues(
    store: TokenStore, database_url: str, seed: int
) -> None:
    """For random limits, states and wants, the statement agrees with `latchkey_coherence.rate`."""
    randomness = random.Random(seed)  # noqa: S311 - a seed to repeat
    # Slow enough that the time that a statement takes adds no call.
    limit = RateLimit(
        randomness.choice((1, 3, 7, 100)),
        3_600,
        randomness.choice((1, 2, 50, 1_000_000)),
    )
    await insert(store, "t1", limit)
    async with session(database_url) as connection:
        full_at = 0
        for _ in range(12):
            needed, ahead = randomness.randint(0, 20), randomness.randint(0, 20)
            now = await connection.fetchval(
                "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
            )
            if randomness.random() < 0.3:
                # Some time has passed, or the clock was set.
                full_at += randomness.choice((-3_600, -60, 10**9)) * 1_000_000
                await connection.execute("UPDATE rate_use SET full_at = $1", full_at)
            issued, _ = await draw_all(connection, [Want("t1", needed, ahead)])
            expected = draw(limit, full_at, now, needed, ahead)
            one = issued["t1"]
            assert (one.limit, one.live, one.calls) == (limit, True, expected.calls)
            assert one.retry_seconds == pytest.approx(expected.retry_seconds, abs=0.5)
            full_at = await connection.fetchval("SELECT full_at FROM rate_use")
            assert abs(full_at - expected.full_at) < LATE_MICROSECONDS


async def test_simultaneous_draws_share_one_bucket(store: TokenStore, database_url: str) -> None:
    """Several connections that draw from the same tokens at once, in any order, get no more than
    the buckets have, and none fails."""
    for number in range(5):
        await insert(store, f"t{number}", HOURLY)

    async def some(seed: int) -> int:
        randomness = random.Random(seed)  # noqa: S311 - a seed to repeat
        total = 0
        async with session(database_url) as connection:
            for _ in range(15):
                wants = [Want(f"t{number}", 1, 0) for number in range(5)]
                randomness.shuffle(wants)
                issued, _ = await draw_all(connection, wants)
                total += sum(one.calls for one in issued.values())
        return total

    totals = await asyncio.gather(*(some(seed) for seed in range(4)))
    assert sum(totals) == 5 * HOURLY.burst


async def test_deleted_and_unlimited_tokens_issue_nothing(
    store: TokenStore, database_url: str
) -> None:
    """A draw says which tokens are live, and which have no limit. Unknown ones are not live."""
    await insert(store, "limited", HOURLY)
    await insert(store, "unlimited", None)
    await insert(store, "deleted", HOURLY)
    await store.delete_token("acme", "deleted", audit_context())
    wants = [Want(name, 1, 0) for name in ("deleted", "limited", "unknown", "unlimited")]
    async with session(database_url) as connection:
        issued, snapshot = await draw_all(connection, wants)
        assert await connection.fetchval("SELECT count(*) FROM rate_use") == 1
    found = {name: (one.live, one.limit, one.calls) for name, one in issued.items()}
    assert found == {
        "deleted": (False, None, 0),
        "limited": (True, HOURLY, 1),
        "unknown": (False, None, 0),
        "unlimited": (True, None, 0),
    }
    assert snapshot.position.mark


async def test_draws_do_not_wait_for_the_disk(store: TokenStore, database_url: str) -> None:
    """Only the draw's own transaction is relaxed: the next one on the connection is durable."""
    await insert(store, "t1", HOURLY)
    async with session(database_url) as connection:
        before = await connection.fetchval("SHOW synchronous_commit")
        await draw_all(connection, [Want("t1", 1, 0)])
        assert await connection.fetchval("SHOW synchronous_commit") == before


async def test_purge_removes_full_buckets_only(store: TokenStore, database_url: str) -> None:
    """A row that says "full" can go, because no row says the same."""
    await insert(store, "empty", HOURLY)
    await insert(store, "full", RateLimit(1_000_000, 1, 1))
    pool = await Pool.open(Connector(database_url))
    try:
        async with session(database_url) as connection:
            await draw_all(connection, [Want("empty", 1, 0), Want("full", 1, 0)])
            await connection.execute("SELECT pg_sleep(0.001)")
            assert await RateTable(pool).purge(10) == 1
            assert await connection.fetchval("SELECT token_id FROM rate_use") == "empty"
            assert await RateTable(pool).purge(10) == 0
    finally:
        await pool.close()

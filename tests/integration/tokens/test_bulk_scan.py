"""DeleteAll among many tokens: it finds those that match in steps of bounded size."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.tokens import bulk_store
from latchkey_service.tokens.bulk_store import BulkStore
from latchkey_service.tokens.filter_table import Start
from latchkey_service.tokens.filters import Filter

from tests.helpers.databases import session

NOW = datetime(2026, 11, 29, tzinfo=UTC)
TOKENS = 25


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[BulkStore]:
    """A store, and an account whose tokens pairwise share a time of creation."""
    async with session(database_url) as connection:
        await connection.execute(
            f"""
            INSERT INTO token (id, account_id, name, name_key, scope, create_time, hint)
            SELECT 'tok_' || lpad(n::text, 4, '0'), 'acme', 'n' || n, 'n' || n, 1 + n % 2,
                   timestamptz '2026-01-01' + n / 2 * interval '1 day', ''
              FROM generate_series(1, {TOKENS}) n
            """  # noqa: S608 - a constant
        )
    pool = await Pool.open(Connector(database_url))
    yield BulkStore(pool)
    await pool.close()


async def steps(store: BulkStore, selected: Filter, limit: int) -> list[bulk_store.Scan]:
    """Scan the account to its end."""
    found: list[bulk_store.Scan] = []
    after: Start | None = None
    while not found or after is not None:
        scan, _ = await store.scan("acme", selected, NOW, after, limit)
        found.append(scan)
        after = scan.next
    return found


@pytest.mark.parametrize("size", [1, 2, 7, 24, 25, 26])
async def test_steps_cover_the_account_once(
    store: BulkStore, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Whatever the size of a step, each token that matches is found once, the oldest first, and no
    statement reads more than that many."""
    monkeypatch.setattr(bulk_store, "SCANNED", size)
    everything = await steps(store, Filter(), 100)
    ids = [f"tok_{n:04}" for n in range(1, TOKENS + 1)]
    assert [token_id for scan in everything for token_id in scan.ids] == ids
    assert all(scan.matching <= size for scan in everything)
    writers = await steps(store, Filter(scope=2), 100)
    assert [token_id for scan in writers for token_id in scan.ids] == ids[::2]


async def test_ids_are_limited_and_matches_are_counted(store: BulkStore) -> None:
    """A scan returns the ids of the oldest matches up to the limit, and counts all of them."""
    before = NOW - timedelta(days=90)
    (scan,) = await steps(store, Filter(unused_since=before), 3)
    assert (scan.matching, scan.ids) == (TOKENS, ["tok_0001", "tok_0002", "tok_0003"])

"""List counts tokens from an index alone, so that a count of ten thousand takes a few ms."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, cast

import asyncpg
import pytest
from latchkey_service.postgres.connections import Pool
from latchkey_service.tokens.filters import Filter, Order, State
from latchkey_service.tokens.list_store import ListStore

NOW = datetime(2026, 6, 1, tzinfo=UTC)
TOKENS = 3_000
FILL = f"""
INSERT INTO token (id, account_id, name, name_key, scope, create_time, expire_time,
                   disable_time, hint)
SELECT 'tok_' || lpad(n::text, 26, '0'), 'a', 'token ' || n, 'token ' || n, 1 + n % 2, $1,
       CASE WHEN n % 3 = 0 THEN $1::timestamptz + interval '1 day' END,
       CASE WHEN n % 5 = 0 THEN $1::timestamptz END, ''
  FROM generate_series(1, {TOKENS}) n
"""  # noqa: S608 - a constant


class Explained(Exception):
    """Carries the plan of a statement."""


class Explainer:
    """Takes the place of a pool, and explains what a store sends."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self._connection = connection

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Explainer]:
        yield self

    async def fetch(self, query: str, *arguments: object) -> Any:
        rows = await self._connection.fetch(f"EXPLAIN (ANALYZE) {query}", *arguments)
        raise Explained("\n".join(row[0] for row in rows))


@pytest.mark.parametrize(
    "selected",
    [
        Filter(),
        Filter(never_expires=True, state=State.ACTIVE),
        Filter(expires_before=NOW, can_write=True),
    ],
    ids=["all", "never expires", "expires and can write"],
)
async def test_count_reads_an_index_alone(database_url: str, selected: Filter) -> None:
    """Postgres counts by expiry and state, or everything, without a row of the table."""
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(FILL, NOW)
        await connection.execute("VACUUM (ANALYZE) token")
        # Where rows lie in the order of an index, Postgres finds reading them as cheap.
        await connection.execute("SET enable_seqscan = off")
        store = ListStore(cast("Pool", Explainer(connection)))
        with pytest.raises(Explained) as explained:
            await store.list_tokens(
                "a",
                selected,
                Order.NEWEST,
                reverse=False,
                now=NOW,
                start=None,
                size=10,
                examined=100,
                counted=10_000,
            )
    finally:
        await connection.close()
    plan = str(explained.value)
    count = plan[plan.index("Aggregate") : plan.index("Heap Fetches")]
    assert "Index Only Scan using token_" in count, plan
    assert "Heap Fetches: 0" in plan, plan

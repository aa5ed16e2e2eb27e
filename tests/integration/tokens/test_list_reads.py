"""What a statement reads for each token of a list: its secrets and its uses, once each."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, cast

import asyncpg
import pytest
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.tokens.bulk_store import BulkStore
from latchkey_service.tokens.filter_table import Start
from latchkey_service.tokens.filters import Filter, Order, State
from latchkey_service.tokens.find_store import FindStore
from latchkey_service.tokens.lifecycle_store import LifecycleStore
from latchkey_service.tokens.list_store import ListStore
from latchkey_service.tokens.token_store import TokenStore
from latchkey_service.tokens.verdict import TokenRecord

from tests.helpers.databases import session
from tests.integration.tokens.test_list_counts import Explained, Explainer

NOW = datetime(2026, 11, 29, tzinfo=UTC)
TOKENS = 40
HOUR = timedelta(hours=1)


class Known(NamedTuple):
    """A token's working secrets, newest first, each with its last use, and the token's last use."""

    secrets: list[tuple[str, datetime | None]]
    last_used_time: datetime | None
    last_used_by: str


async def known_tokens(connection: asyncpg.Connection[asyncpg.Record]) -> dict[str, Known]:
    """Create tokens with up to three secrets that several callers used, and other uses."""
    chosen = random.Random(11)  # noqa: S311 - for times, not for secrets
    await connection.execute("INSERT INTO pepper (id) VALUES ('p')")
    found = {}
    for number in range(TOKENS):
        token_id, created = f"tok_{number:026}", NOW - 100 * HOUR
        hints = [f"lk_…{number:02}{ordinal:02}" for ordinal in range(chosen.randrange(1, 4))]
        await connection.execute(
            """
            INSERT INTO token (id, account_id, name, name_key, scope, create_time, hint)
            VALUES ($1, 'acme', $1, $1, 1, $2, $3)
            """,
            *(token_id, created, hints[-1]),
        )
        # All at different times, because nothing decides which of two equal ones is the last.
        hours = iter(chosen.sample(range(90), 90))
        uses: list[tuple[datetime, str, str]] = []
        for ordinal, hint in enumerate(hints):
            await connection.execute(
                """
                INSERT INTO secret (digest, pepper_id, token_id, hint, create_time, ordinal)
                VALUES ($1, 'p', $2, $3, $4, $5)
                """,
                *(bytes([number, ordinal, *bytes(30)]), token_id, hint, created, ordinal),
            )
        # Empty: the secret is not known. The other is of a secret that was removed.
        for hint in (*hints, "", "lk_…gone"):
            callers = chosen.sample(["", "shop", "mail", "jobs"], chosen.randrange(4))
            uses += [(NOW - next(hours) * HOUR, caller, hint) for caller in callers]
        await connection.executemany(
            "INSERT INTO token_usage VALUES ($1, $2, $3, $4, $4)",
            [(token_id, hint, caller, time) for time, caller, hint in uses],
        )
        last = max(uses, default=None)
        found[token_id] = Known(
            [
                (hint, max((time for time, _, used in uses if used == hint), default=None))
                for hint in reversed(hints)
            ],
            None if last is None else last[0],
            "" if last is None else last[1],
        )
    return found


async def listed(
    store: ListStore, selected: Filter, counted: int = 0, start: Start | None = None
) -> Sequence[TokenRecord]:
    """List the account's tokens, or up to a hundred of those after `start`."""
    found, _ = await store.list_tokens(
        "acme",
        selected,
        Order.NEWEST,
        reverse=False,
        now=NOW,
        start=start,
        size=100,
        examined=1_000 if start is None else 9_000,
        counted=counted,
    )
    return found.records


def seen(record: TokenRecord) -> Known:
    """Return what a store says of a token's uses."""
    secrets = [(secret.hint, secret.last_used_time) for secret in record.secrets]
    return Known(secrets, record.last_used_time, record.last_used_by)


async def test_every_reader_sees_the_last_uses(database_url: str) -> None:
    """List, Get, Find, DeleteAll and the changes to a token see the last use of each secret, by any
    caller, and that of the token, by any secret and caller."""
    async with session(database_url) as connection:
        known = await known_tokens(connection)
    pool = await Pool.open(Connector(database_url))
    try:
        records = await listed(ListStore(pool), Filter())
        assert {record.id: seen(record) for record in records} == known
        bulk, _ = await BulkStore(pool).get_tokens("acme", list(known))
        assert {record.id: seen(record) for record in bulk} == known
        for token_id, expected in known.items():
            record, _ = await TokenStore(pool).get_token("acme", token_id)
            assert record is not None
            assert seen(record) == expected
            (one,), _ = await FindStore(pool).by_id(token_id)
            assert seen(one.record) == expected
            state, _ = await LifecycleStore(pool).read_state("acme", token_id)
            assert state is not None
            assert seen(state.record) == expected
            stored = [(each.shown.hint, each.shown.last_used_time) for each in state.secrets]
            assert stored == expected.secrets
    finally:
        await pool.close()


@pytest.fixture
async def explainer(database_url: str) -> AsyncIterator[ListStore]:
    """A store that raises the plan of its statement, on a database with tokens."""
    async with session(database_url) as connection:
        await known_tokens(connection)
        await connection.execute("VACUUM (ANALYZE) token, secret, token_usage")
        # On so few pages, Postgres would read all of them.
        await connection.execute("SET enable_seqscan = off")
        await connection.execute("SET enable_bitmapscan = off")
        yield ListStore(cast("Pool", Explainer(connection)))


async def plan_of(
    store: ListStore, selected: Filter, counted: int = 0, start: Start | None = None
) -> str:
    """Return the plan of a list."""
    with pytest.raises(Explained) as explained:
        await listed(store, selected, counted, start)
    return str(explained.value)


async def test_a_list_reads_each_table_once_for_a_token(explainer: ListStore) -> None:
    """A list searches a token's uses and its secrets once each."""
    plan = await plan_of(explainer, Filter())
    searches = {
        table: len(re.findall(rf"Scan .*\bon {table} ", plan))
        for table in ("token_usage", "secret")
    }
    assert searches == {"token_usage": 1, "secret": 1}, plan


async def test_old_secrets_are_found_in_a_small_index(explainer: ListStore) -> None:
    """A list of tokens with old secrets, and its count, search for younger ones in an index of
    secrets that replaced others, and read no row of the table for it."""
    plan = await plan_of(explainer, Filter(secret_created_before=NOW), 1_000)
    searches = re.findall(r"(Scan.*) on secret .*?Heap Fetches: (\d+)", plan, re.DOTALL)
    assert plan.count("Index Only Scan Backward using secret_rotated on secret") == 2, plan
    assert {fetches for _, fetches in searches} == {"0"}, plan


# Half of the table is one account's. The others have a token each.
MIXED = """
INSERT INTO token (id, account_id, name, name_key, scope, create_time, disable_time, hint)
SELECT 'tok_' || lpad(n::text, 26, '0'), CASE WHEN n % 2 = 0 THEN 'acme' ELSE 'other-' || n END,
       'token ' || n, 'token ' || n, 1, $1::timestamptz - n * interval '1 second',
       CASE WHEN n % 50 = 0 THEN $1::timestamptz END, ''
  FROM generate_series(1, 6000) n
"""


class Single:
    """Takes the place of a pool, and lends one connection."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self._connection = connection

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Any]:
        yield self._connection


@pytest.fixture
async def mixed(database_url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection to a database with accounts of very different sizes."""
    async with session(database_url) as connection:
        await connection.execute(MIXED, NOW)
        await connection.execute("VACUUM (ANALYZE) token")
        yield connection


async def test_lists_share_a_plan(mixed: asyncpg.Connection[asyncpg.Record]) -> None:
    """After the five plans that Postgres makes for the values of a statement, it keeps one for all
    accounts, even if most calls ask for an account that is far larger than the others."""
    store = ListStore(cast("Pool", Single(mixed)))
    for _ in range(8):
        await listed(store, Filter(state=State.DISABLED))
    plans = await mixed.fetchrow(
        """
        SELECT generic_plans, custom_plans FROM pg_prepared_statements
         WHERE position($1 IN statement) > 0
        """,
        # As an argument, so that this statement does not find itself.
        "array_position",
    )
    assert plans is not None
    assert tuple(plans) == (3, 5)


@pytest.mark.parametrize("alone", [False, True], ids=["with others", "alone"])
async def test_a_list_does_not_sort_an_account(
    mixed: asyncpg.Connection[asyncpg.Record], *, alone: bool
) -> None:
    """A list walks along an index, whatever Postgres believes about the size of the account: it
    never reads all tokens of the account and sorts them."""
    if alone:
        await mixed.execute("DELETE FROM token WHERE account_id <> 'acme'")
        await mixed.execute("VACUUM (FULL, ANALYZE) token")
    start = Start(NOW, "~")
    plan = await plan_of(
        ListStore(cast("Pool", Explainer(mixed))), Filter(state=State.DISABLED), start=start
    )
    assert "Index Scan using token_newest" in plan, plan
    assert "Scan on token t" not in plan, plan

"""The SQL of uses, on a real Postgres."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.secret_format import Digest
from latchkey_service.tokens import usage_writer
from latchkey_service.tokens.upkeep_store import UpkeepStore
from latchkey_service.tokens.usage import DAYS_MAX, Use
from latchkey_service.tokens.usage_table import CallerUsage, UsageTable
from latchkey_service.tokens.verdict import Scope, TokenRecord

from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.databases import session
from tests.helpers.domain import audit_context
from tests.helpers.servers import make_settings, serving
from tests.helpers.waiting import WAIT_SECONDS, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from latchkey_service.tokens.token_store import TokenStore

CREATED = datetime(2026, 11, 1, 12, tzinfo=UTC)
BEGAN = CREATED.timestamp()
DAY = 86_400.0
TODAY = CREATED.date() + timedelta(days=5)
HINT = "lk_…abcd"


@pytest.fixture
async def table(database_url: str) -> AsyncIterator[UsageTable]:
    """The tables of a fresh database."""
    pool = await Pool.open(Connector(database_url))
    yield UsageTable(pool)
    await pool.close()


async def callers(table: UsageTable, token_id: str, today: date) -> list[CallerUsage]:
    found, _ = await table.by_caller("acme", token_id, today)
    return found or []


async def insert(store: TokenStore, token_id: str, hint: str = HINT) -> None:
    record = TokenRecord(token_id, "acme", token_id, Scope.READ, CREATED, None, hint)
    digest = Digest(token_id.encode().ljust(32, b"0"), "pepper")
    await store.insert_token(record, token_id, digest, audit_context())


@pytest.fixture
async def tokens(store: TokenStore) -> TokenStore:
    """Two live tokens."""
    await store.register_pepper("pepper")
    for token_id in ("t1", "t2"):
        await insert(store, token_id)
    return store


def used(at: float, uses: int = 1, token_id: str = "t1", caller: str = "shop") -> Use:  # noqa: S107 - no password
    return Use(token_id, HINT, caller, BEGAN + at, BEGAN + at, uses)


@pytest.mark.usefixtures("tokens")
async def test_uses_add_up_by_caller_and_day(table: UsageTable) -> None:
    """Batches of several servers add up. Days are those of UTC."""
    first = [used(10.0, 3), used(20.0, 1, caller="web"), used(5.0, 2, "t2")]
    await table.record("a", 1, first)
    await table.record("b", 1, [used(2.0, 4)])
    await table.record("b", 2, [used(DAY, 5), used(12 * 3600.0, 7, caller="web")])
    shop, web = await callers(table, "t1", TODAY)
    day = CREATED.date()
    next_day = day + timedelta(days=1)
    assert (shop.caller, shop.first_time, shop.last_time, shop.days) == (
        "shop",
        CREATED + timedelta(seconds=2),
        CREATED + timedelta(days=1),
        [(next_day, 5), (day, 7)],
    )
    assert (web.caller, web.days) == ("web", [(next_day, 7), (day, 1)])
    assert [usage.days for usage in await callers(table, "t2", TODAY)] == [[(day, 2)]]


@pytest.mark.usefixtures("tokens")
async def test_a_repeated_batch_counts_once(table: UsageTable) -> None:
    """A batch that is written again under its number, or late, changes nothing."""
    await table.record("a", 1, [used(10.0)])
    await table.record("a", 1, [used(10.0)])
    await table.record("a", 2, [used(20.0)])
    await table.record("a", 1, [used(10.0)])
    await table.record("b", 1, [used(15.0)])
    (shop,) = await callers(table, "t1", TODAY)
    assert shop.days == [(CREATED.date(), 3)]


@pytest.mark.parametrize(
    ("stored", "used_with", "known"),
    [
        ("acme_live_…abcd", "acme_…abcd", True),
        ("…abcd", "sk_…abcd", True),
        ("the key that ends with abcd"[-16:], "…abcd", True),
        ("acme_live_…abcd", "acme_…abce", False),
        ("acme_live_abc…", "acme_…abcd", False),
    ],
)
async def test_a_hint_of_another_form_is_recognised_by_its_end(
    table: UsageTable,
    store: TokenStore,
    database_url: str,
    stored: str,
    used_with: str,
    known: bool,
) -> None:
    """The hint of an imported secret may have any form. Its uses are those of the secret whose last
    four characters it ends with."""
    await store.register_pepper("pepper")
    await insert(store, "t1", stored)
    await table.record("a", 1, [used(10.0)._replace(hint=used_with)])
    async with session(database_url) as connection:
        hints = [row[0] for row in await connection.fetch("SELECT hint FROM token_usage")]
    assert hints == [stored if known else ""]


async def test_only_uses_that_can_be_true_are_stored(
    table: UsageTable, tokens: TokenStore, database_url: str
) -> None:
    """Times are not before the token. Tokens that do not exist, or that were deleted before the
    use, are ignored. Unknown hints share one row. A count of 0 updates the times alone."""
    await tokens.delete_token("acme", "t2", audit_context("Delete"))
    future = datetime.now(UTC).timestamp() - BEGAN + DAY
    await table.record(
        "a",
        1,
        [
            used(-DAY, 2),
            Use("t1", "x1", "shop", BEGAN + 5, BEGAN + 6, 1),
            Use("t1", "x2", "shop", BEGAN + 7, BEGAN + 8, 1),
            used(9.0, 0, caller="web"),
            used(10.0, 1, "t2"),
            used(future, 1, "t2", "late"),
            used(10.0, 1, "t3"),
        ],
    )
    shop, web = sorted(await callers(table, "t1", TODAY))
    assert (shop.first_time, shop.last_time) == (CREATED, CREATED + timedelta(seconds=8))
    assert shop.days == [(CREATED.date(), 4)]
    assert (web.last_time, web.days) == (CREATED + timedelta(seconds=9), [])
    # A deleted token's uses are no longer shown, but kept with it.
    assert (await table.by_caller("acme", "t2", TODAY))[0] is None
    assert (await table.by_caller("other", "t1", TODAY))[0] is None
    async with session(database_url) as connection:
        kept = await connection.fetch("SELECT caller FROM token_usage WHERE token_id = 't2'")
        assert [row["caller"] for row in kept] == ["shop"]
        rows = await connection.fetch(
            "SELECT token_id, hint FROM token_usage ORDER BY token_id, hint, caller"
        )
    assert [tuple(row) for row in rows] == [
        ("t1", ""),
        ("t1", HINT),
        ("t1", HINT),
        ("t2", HINT),
    ]


@pytest.mark.usefixtures("tokens")
async def test_old_days_are_removed_and_times_stay(table: UsageTable) -> None:
    """Daily counts are kept for 90 days. The first and the last use are kept with the token."""
    await table.record("a", 1, [used(0.0), used(3 * DAY, caller="web")])
    last_day = CREATED.date() + timedelta(days=DAYS_MAX - 1)
    assert await table.purge(last_day, 10) == 0
    assert [usage.days for usage in await callers(table, "t1", last_day)] != [[], []]
    next_day = last_day + timedelta(days=1)
    # Not shown, even before it is removed.
    assert sorted(len(usage.days) for usage in await callers(table, "t1", next_day)) == [0, 1]
    assert (await table.purge(next_day, 10), await table.purge(next_day, 10)) == (1, 0)
    assert {usage.caller for usage in await callers(table, "t1", date(2030, 1, 1))} == {
        "shop",
        "web",
    }


async def test_uses_are_removed_with_the_tombstone(
    table: UsageTable, tokens: TokenStore, database_url: str
) -> None:
    """When a tombstone is removed, no row of the token's uses is left."""
    await table.record("a", 1, [used(1.0), used(1.0, token_id="t2")])
    await tokens.delete_token("acme", "t1", audit_context("Delete"))
    later = datetime.now(UTC) + timedelta(days=1)
    pool = await Pool.open(Connector(database_url))
    assert await UpkeepStore(pool).purge_tombstones(later, 10) == 1
    await pool.close()
    async with session(database_url) as connection:
        for name in ("token_usage", "token_usage_day"):
            rows = await connection.fetch(f"SELECT token_id FROM {name}")  # noqa: S608 - constants
            assert [row["token_id"] for row in rows] == ["t2"]


async def test_concurrent_servers_neither_deadlock_nor_lose_counts(
    table: UsageTable, tokens: TokenStore
) -> None:
    """Servers that write the same tokens at the same time all succeed, and the counts add up."""
    names = [f"u{number:02}" for number in range(20)]
    for name in names:
        await insert(tokens, name)

    async def write(writer: str) -> None:
        for number in range(1, 6):
            await table.record(writer, number, [used(1.0, 1, name) for name in names])

    async with asyncio.timeout(WAIT_SECONDS):
        await asyncio.gather(*(write(f"w{number}") for number in range(6)))
    for name in names:
        (usage,) = await callers(table, name, TODAY)
        assert usage.days == [(CREATED.date(), 30)]


@pytest.mark.usefixtures("tokens")
async def test_writing_uses_takes_no_lock_on_the_token(
    table: UsageTable, database_url: str
) -> None:
    """Uses are written while another transaction has locked the token's row, as a Delete does. A
    foreign key, or a read that locks, would wait here, and a Delete would wait for it."""
    async with session(database_url) as other, other.transaction():
        await other.execute("SELECT FROM token FOR UPDATE")
        async with asyncio.timeout(WAIT_SECONDS / 2):
            await table.record("a", 1, [used(1.0)])
        assert len(await callers(table, "t1", TODAY)) == 1


async def test_a_delete_never_waits_for_uses(
    database_url: str, pepper_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another transaction locks the rows of a token's uses, and servers wait for those locks,
    a Delete of the token, a Verify and a Get answer at once. Afterwards the uses are written."""
    monkeypatch.setattr(usage_writer, "WRITE_SECONDS", 0.05)
    settings = make_settings(database_url, pepper_file, "native")
    async with (
        serving(settings) as address,
        grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel,
        session(database_url) as other,
        session(database_url) as observer,
    ):
        stub = pb_grpc.TokenServiceStub(channel)
        created, kept = [
            await stub.Create(
                pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ), timeout=5
            )
            for name in ("deleted", "kept")
        ]

        async def verify() -> None:
            for one in (created, kept):
                await stub.Verify(pb.VerifyRequest(secret=one.secret), timeout=5)

        async def rows() -> bool:
            return bool(await observer.fetchval("SELECT count(*) = 2 FROM token_usage"))

        async def blocked() -> bool:
            return bool(
                await observer.fetchval(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE wait_event_type = 'Lock' AND query LIKE '%token_usage%'"
                )
            )

        await verify()
        await eventually(rows, "the first uses to be written")
        async with other.transaction():
            await other.execute("SELECT FROM token_usage FOR UPDATE")
            await other.execute("SELECT FROM token_usage_day FOR UPDATE")
            await other.execute("SELECT FROM token_last_use FOR UPDATE")
            await verify()
            await eventually(blocked, "the writer to wait for the locks")
            await verify()
            get = pb.GetRequest(account_id="acme", id=created.token.id)
            assert (await stub.Get(get, timeout=5)).token.HasField("last_used_time")
            delete = pb.DeleteRequest(account_id="acme", id=created.token.id)
            receipt = (await stub.Delete(delete, timeout=5)).receipt
            assert (receipt.verifiers_acknowledged, receipt.verifiers_outwaited) == (1, 0)
            assert await blocked()

        async def counted() -> bool:
            counts = await observer.fetch("SELECT count FROM token_usage_day")
            return [row["count"] for row in counts] == [3, 3]

        await eventually(counted, "the uses to be written")

"""Confirmed changes survive a crash of Postgres, whatever the setting of synchronous_commit."""

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from latchkey_service.coherence.ack_rules import Acknowledgements
from latchkey_service.coherence.verifier_table import Identity, OwnRow
from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres.connections import DURABLE, Connector
from latchkey_service.postgres.migrate import bundled, migrate
from latchkey_service.secret_format import Digest
from latchkey_service.tokens.receipt_table import Deletion
from latchkey_service.tokens.token_store import TokenStore
from latchkey_service.tokens.verdict import Scope, TokenRecord
from structlog.testing import capture_logs

from tests.faults.test_replication import cut_short, standby_missing
from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.database_history import NO_CLIENTS, head_of
from tests.helpers.databases import session
from tests.helpers.domain import audit_context
from tests.helpers.pgbouncer import PgBouncer
from tests.helpers.programs import INSTALLS
from tests.helpers.waiting import eventually

pytestmark = pytest.mark.xdist_group("faults")

# Far longer than a test, so that nothing flushes the WAL in the background.
LAZY = "synchronous_commit = off\nwal_writer_delay = 10s"


@pytest.fixture
async def lazy(postgres: BreakablePostgres, postgres_url: str) -> AsyncIterator[None]:
    """Make commits return before they are on disk."""
    postgres.configure(LAZY)
    async with session(postgres_url) as connection:

        async def configured() -> bool:
            return await connection.fetchval("SHOW wal_writer_delay") == "10s"

        await eventually(configured, "the settings are in force")
    yield
    postgres.configure("")


def record(number: int = 1) -> TokenRecord:
    moment = datetime(2026, 11, 29, tzinfo=UTC)
    return TokenRecord(f"tok_{number}", "acme", f"a{number}", Scope.READ, moment, None, "lk_…abcd")


async def insert(store: TokenStore, number: int = 1) -> None:
    digest = Digest(number.to_bytes(32, "big"), "p")
    await store.insert_token(record(number), f"a{number}", digest, audit_context())


async def is_flushed(url: str, work: Awaitable[Any]) -> bool:
    """Return whether the commit of `work` is on disk when `work` returns."""
    async with session(url) as connection:
        # This flushes everything committed before.
        await connection.execute("SET synchronous_commit = on")
        await connection.execute("INSERT INTO pepper (id) VALUES (gen_random_uuid()::text)")
        before = await connection.fetchval("SELECT pg_current_wal_insert_lsn()::text")
        await work
        query = "SELECT pg_current_wal_flush_lsn() > $1::text::pg_lsn"
        return bool(await connection.fetchval(query, before))


@pytest.mark.usefixtures("lazy")
async def test_important_commits_are_on_disk(database_url: str, store: TokenStore) -> None:
    """With synchronous_commit off, the transactions that create, delete, confirm, register, renew
    and invalidate are all on disk when they return. Others are not, which shows that the
    measurement works."""
    await store.register_pepper("p")
    connection = await Connector(database_url).connect()
    row = OwnRow(connection, Identity("ver_a", "x", 1, "0", 3.0))

    async def renew() -> None:
        renewed, _ = await row.renew(1, await head_of(database_url), 0, NO_CLIENTS)
        assert renewed

    steps: list[Callable[[], Awaitable[Any]]] = [
        lambda: insert(store),
        lambda: store.delete_token("acme", "tok_1", audit_context("Delete")),
        lambda: confirm(store),
        lambda: row.register(1, acknowledge=True),
        renew,
        lambda: store.invalidate_all(audit_context("InvalidateAll")),
    ]
    for number, step in enumerate(steps):
        assert not await is_flushed(database_url, store.register_pepper(f"other {number}"))
        assert await is_flushed(database_url, step()), number
    connection.terminate()


@pytest.mark.usefixtures("lazy")
async def test_a_crash_undoes_no_deletion(
    postgres: BreakablePostgres, database_url: str, store: TokenStore
) -> None:
    """With synchronous_commit off, a token whose Delete returned a receipt is still deleted after
    all processes of Postgres were killed at once, and the receipt is the same."""
    await store.register_pepper("p")
    await insert(store)
    await store.delete_token("acme", "tok_1", audit_context("Delete"))
    receipt = await confirm(store)
    await postgres.crash()
    postgres.bring_back()
    assert await eventually(lambda: find(store), "Postgres is back") == [receipt]
    assert (await store.get_token("acme", "tok_1"))[0] is None


async def confirm(store: TokenStore) -> Deletion:
    """Confirm the deletion, as if one verifier had acknowledged it."""
    deletion, _ = await store.get_deletion("acme", "tok_1")
    assert deletion is not None
    return await store.confirm_deletion("tok_1", deletion.position, Acknowledgements(1, 0))


@INSTALLS
async def test_a_pooler_does_not_hide_a_cancelled_wait(
    postgres: BreakablePostgres, scratch: Path, database_url: str
) -> None:
    """Through transaction pooling too, a commit whose wait for the standby was cancelled confirms
    nothing, and a later one does."""
    pooler = PgBouncer(scratch / "pgbouncer", database_url, pool_mode="transaction")
    await pooler.start()
    store = await TokenStore.open(pooler.url(), "transaction")
    try:
        await store.register_pepper("p")
        await insert(store)
        await store.delete_token("acme", "tok_1", audit_context("Delete"))
        async with standby_missing(postgres, database_url):
            with pytest.raises(StoreUnavailable):
                await cut_short(database_url, confirm(store))
        assert (await confirm(store)).effective_time is not None
    finally:
        await store.close()
        pooler.stop()


async def find(store: TokenStore) -> list[Any] | None:
    """Return the receipt in a list, or None while Postgres does not respond."""
    try:
        return [(await store.get_deletion("acme", "tok_1"))[0]]
    except StoreUnavailable:
        return None


@pytest.mark.parametrize("given", ["off", "local", "remote_write", "on", "remote_apply"])
async def test_durable_never_weakens(database_url: str, given: str) -> None:
    """The condition raises synchronous_commit to `on` for its transaction, and keeps a stronger
    value."""
    async with session(database_url) as connection:
        await connection.execute(f"SET synchronous_commit = {given}")
        async with connection.transaction():
            statement = f"UPDATE head SET revision = revision WHERE {DURABLE}"  # noqa: S608 - a constant
            await connection.execute(statement)
            inside = await connection.fetchval("SHOW synchronous_commit")
        assert inside == ("remote_apply" if given == "remote_apply" else "on")
        assert await connection.fetchval("SHOW synchronous_commit") == given


@pytest.mark.parametrize("name", ["fsync", "full_page_writes"])
async def test_settings_that_lose_data_are_reported(
    postgres: BreakablePostgres, database_url: str, name: str
) -> None:
    """A start logs one warning for each setting with which a crash of the machine can destroy data,
    and none for the default settings."""

    async def warnings() -> list[Any]:
        with capture_logs() as lines:
            await migrate(database_url, bundled())
        return [line for line in lines if "a crash of the database's machine" in line["event"]]

    assert await warnings() == []
    postgres.configure(f"{name} = off")
    try:

        async def warned() -> bool:
            return any(line["event"].startswith(f"{name} is off") for line in await warnings())

        await eventually(warned, "the warning is logged")
    finally:
        postgres.configure("")

"""Calls that want the same names: which locks they hold while they wait for each other."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.audit.audit_table import NO_DETAILS
from latchkey_service.errors import StoreLocked
from latchkey_service.postgres import sessions
from latchkey_service.settings.settings import Settings
from latchkey_service.tokens import import_store
from latchkey_service.tokens.lifecycle_store import NAME_FREED

from tests.helpers.databases import session
from tests.helpers.rich_status import refusal
from tests.helpers.servers import make_settings, serving
from tests.helpers.waiting import eventually

ACCOUNT = "acme"
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def settings(database_url: str, pepper_file: Any) -> Settings:
    return make_settings(database_url, pepper_file, "native")


async def create(stub: Any, name: str) -> str:
    request = pb.CreateRequest(account_id=ACCOUNT, name=name, scope=pb.SCOPE_READ)
    return str((await stub.Create(request, timeout=9)).token.id)


async def _waits_for_a_lock(url: str, statement: str) -> None:
    """Wait until another session's statement that begins in this way waits for a lock."""

    async def waits() -> bool:
        # Not in the test's transaction, which would see the same activity each time.
        async with session(url) as connection:
            return bool(
                await connection.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND wait_event_type = 'Lock' AND ltrim(query, E' \\n') LIKE $1 || '%'",
                    statement,
                )
            )

    await eventually(waits, "the statement waits for a lock")


async def test_update_that_waits_for_a_name_holds_up_no_other_change(
    settings: Settings, database_url: str
) -> None:
    """While an Update waits for a transaction that has taken its new name, other changes complete.
    An Import holds names until it has the lock of `head`, so this is also what keeps the two from a
    deadlock."""
    async with (
        serving(settings) as address,
        grpc.aio.insecure_channel(address) as channel,
        session(database_url) as other,
    ):
        stub: Any = pb_grpc.TokenServiceStub(channel)
        renamed, deleted, holder = [await create(stub, name) for name in ("a", "b", "c")]
        async with other.transaction():
            await other.execute("UPDATE token SET name_key = 'new' WHERE id = $1", holder)
            update = pb.UpdateRequest(
                account_id=ACCOUNT,
                id=renamed,
                token=pb.Token(name="new"),
                update_mask=field_mask_pb2.FieldMask(paths=["name"]),
            )
            waiting = asyncio.ensure_future(stub.Update(update, timeout=30))
            await _waits_for_a_lock(database_url, "WITH asked")
            await stub.Delete(pb.DeleteRequest(account_id=ACCOUNT, id=deleted), timeout=9)
            assert not waiting.done()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await waiting
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_long_wait_for_a_lock_is_not_an_outage(
    settings: Settings, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that waits too long for another transaction fails, and its error does not say that the
    database does not respond."""
    monkeypatch.setitem(sessions.SETTINGS, "lock_timeout", "100ms")
    async with (
        serving(settings) as address,
        grpc.aio.insecure_channel(address) as channel,
        session(database_url) as other,
    ):
        stub: Any = pb_grpc.TokenServiceStub(channel)
        named = pb.DeleteRequest(account_id=ACCOUNT, id=await create(stub, "a"))
        async with other.transaction():
            await other.execute("SELECT FROM token FOR UPDATE")
            error = await refusal(stub.Delete(named, timeout=30))
        assert (error.code, error.reason) == (UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert error.message == str(StoreLocked())
        await stub.Delete(named, timeout=30)


async def test_imports_free_expired_names_in_order(settings: Settings, database_url: str) -> None:
    """An Import locks the expired tokens whose names it takes by the order of their names, whatever
    that of its rows. So two of them do not deadlock."""
    # The table, too, has them in another order.
    names = ["c", "a", "b"]
    async with (
        serving(settings) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        for name in names:
            await create(pb_grpc.TokenServiceStub(channel), name)
    # The service has stopped: its upkeep locks tokens as well.
    async with session(database_url) as importing, session(database_url) as other:
        await other.execute("UPDATE token SET expire_time = now() - interval '1 day'")
        # Such a plan takes the rows in the order in which it finds them.
        await importing.execute("SET enable_mergejoin = off; SET enable_indexscan = off")
        async with other.transaction():
            await other.execute("SELECT FROM token WHERE name_key = 'b' FOR UPDATE")
            arguments = (
                [ACCOUNT] * 3,
                names,
                datetime.now(UTC),
                "",
                "",
                "",
                "",
                NAME_FREED,
                NO_DETAILS,
            )
            freeing = asyncio.create_task(importing.execute(import_store._FREE_NAMES, *arguments))
            await _waits_for_a_lock(database_url, "WITH")
            free = "SELECT name_key FROM token ORDER BY name_key FOR UPDATE SKIP LOCKED"
            assert [row[0] for row in await other.fetch(free)] == ["b", "c"]
        await freeing
        freed = "SELECT count(*) FROM audit WHERE reason = $1"
        assert await other.fetchval(freed, NAME_FREED) == len(names)

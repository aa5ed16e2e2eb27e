"""Servers whose database switches to another history, here by hand, otherwise by a failover or
restore."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from latchkey_coherence.verdict_cache import Position
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from structlog.testing import capture_logs

from tests.helpers.calls import CHANNEL_OPTIONS, outcome
from tests.helpers.database_history import head_of
from tests.helpers.databases import session
from tests.helpers.servers import serving
from tests.helpers.waiting import eventually
from tests.helpers.watch_client import WatchClient

if TYPE_CHECKING:
    from latchkey_service.settings.settings import Settings

# A server notices at its next renewal, which comes after a third of the lease.
LEASE_SECONDS = 1.5
DEAD = pb.VERDICT_DELETED


@pytest.fixture
def settings(settings: "Settings") -> "Settings":
    return settings.model_copy(update={"lease_seconds": LEASE_SECONDS})


@pytest.fixture
async def channel(settings: "Settings") -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a dedicated server on a dedicated database."""
    async with (
        serving(settings) as address,
        grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel,
    ):
        yield channel


@pytest.fixture
async def client(channel: grpc.aio.Channel) -> AsyncIterator[WatchClient]:
    """A client of Watch that holds a lease."""
    client = WatchClient(pb_grpc.TokenServiceStub(channel))
    await client.granted()
    await client.say()
    yield client
    client.call.cancel()


@pytest.fixture
def audit(channel: grpc.aio.Channel) -> Any:
    return audit_grpc.AuditServiceStub(channel)


async def delete(stub: Any, token: pb.Token) -> pb.Receipt:
    request = pb.DeleteRequest(account_id=token.account_id, id=token.id)
    receipt: pb.Receipt = (await stub.Delete(request, timeout=8)).receipt
    return receipt


async def verdict(stub: Any, secret: str) -> int:
    """Return the verdict; retry while the server answers, correctly, that it is starting over."""
    while True:
        end = await outcome(stub.Verify(pb.VerifyRequest(secret=secret), timeout=5))
        if end.ok:
            answer: int = end.response.verdict
            return answer
        assert end.code is grpc.StatusCode.UNAVAILABLE


async def undo(database_url: str, token_id: str, head: Position, mark: int) -> None:
    """Undo the newest deletion, as if it had never reached this primary."""
    async with session(database_url) as connection, connection.transaction():
        await connection.execute("DELETE FROM invalidation WHERE revision > $1", head.revision)
        await connection.execute("DELETE FROM deletion WHERE token_id = $1", token_id)
        await connection.execute("UPDATE token SET delete_time = NULL WHERE id = $1", token_id)
        await connection.execute("UPDATE head SET revision = $1, mark = $2", head.revision, mark)


@pytest.mark.parametrize("how", ["deleted rows", "rewritten marks", "lower head"])
async def test_a_rewritten_log_makes_a_server_start_over(
    database_url: str, stub: Any, create: Any, client: WatchClient, how: str
) -> None:
    """A server whose position is no longer in the log empties its cache and resets its clients. It
    grants them leases again only on positions that they have confirmed since."""
    created = await create()
    deleting = asyncio.create_task(delete(stub, (await create()).token))
    await client.hear()
    await client.say()
    await deleting
    assert await verdict(stub, created.secret) == pb.VERDICT_VALID
    before = client.applied
    statements = {
        "deleted rows": "DELETE FROM invalidation; UPDATE head SET revision = 9, mark = DEFAULT",
        "rewritten marks": "UPDATE invalidation SET mark = 5; UPDATE head SET mark = 5",
        "lower head": "DELETE FROM invalidation; UPDATE head SET revision = 0, mark = DEFAULT",
    }
    with capture_logs() as lines:
        async with session(database_url) as connection:
            # Directly in the database: the log does not name the token.
            await connection.execute(
                "UPDATE token SET delete_time = now() WHERE id = $1", created.token.id
            )
            await connection.execute(statements[how])
        head = await head_of(database_url)
        reset = await client.hear()
        assert isinstance(reset, pb.Reset)
        assert client.applied == head
        await eventually(
            lambda: any(line["event"] == "registered" for line in lines), "it registers again"
        )
    assert await verdict(stub, created.secret) == DEAD
    # A confirmation that the client sent before it received the reset confirms nothing, and its
    # request for a grant is ignored.
    client.number += 1
    await client.say(applied=before, number=client.number)
    grant = await client.granted()
    assert Position(grant.revision, grant.mark) == head


@pytest.mark.usefixtures("own_lock_timeout")
async def test_without_a_lease_nothing_is_denied(
    database_url: str, stub: Any, create: Any, audit: Any
) -> None:
    """A server that cannot renew its lease may be connected to a deposed primary. It does not claim
    that a token does not exist; it does not list, show, create or delete tokens, and does not show
    the audit log."""
    created = await create()
    by_id = {"account_id": "acme", "id": created.token.id}
    nobody = {"account_id": "acme", "id": "tok_" + "0" * 26}
    new = pb.CreateRequest(account_id="acme", name="new", scope=pb.SCOPE_READ)
    calls = [
        lambda: stub.Get(pb.GetRequest(**by_id), timeout=5),
        lambda: stub.Get(pb.GetRequest(**nobody), timeout=5),
        lambda: stub.List(pb.ListRequest(account_id="acme"), timeout=5),
        lambda: stub.GetUsage(pb.GetUsageRequest(**by_id), timeout=5),
        lambda: stub.Delete(pb.DeleteRequest(account_id="acme", id=nobody["id"]), timeout=5),
        lambda: stub.Delete(pb.DeleteRequest(account_id="acme", id=by_id["id"]), timeout=5),
        lambda: stub.Create(new, timeout=5),
        lambda: audit.List(audit_pb.AuditServiceListRequest(), timeout=5),
    ]
    async with session(database_url) as connection, connection.transaction():
        await connection.execute("SELECT FROM verifier FOR UPDATE")

        async def silent() -> bool:
            return not (await outcome(calls[0]())).ok

        await eventually(silent, "the lease has run out")
        for number, call in enumerate(calls):
            assert (await outcome(call())).code is grpc.StatusCode.UNAVAILABLE, number

    async def back() -> bool:
        return (await outcome(calls[0]())).ok

    await eventually(back, "the lease is renewed")
    # None of these calls had an effect.
    listed = await stub.List(pb.ListRequest(account_id="acme"), timeout=5)
    assert [token.id for token in listed.tokens] == [created.token.id]
    assert (await outcome(calls[1]())).code is grpc.StatusCode.NOT_FOUND
    assert (await outcome(calls[4]())).code is grpc.StatusCode.NOT_FOUND


async def test_another_history_s_audit_log_is_not_shown(
    database_url: str, stub: Any, create: Any, audit: Any
) -> None:
    """A server whose reads reach another history, and which has not noticed yet, does not show that
    history's audit log as the current one."""
    await delete(stub, (await create()).token)
    request = audit_pb.AuditServiceListRequest()
    assert len((await audit.List(request, timeout=5)).entries) == 2
    async with session(database_url) as connection, connection.transaction():
        # The server keeps its lease, and cannot find out at a renewal.
        await connection.execute("SELECT FROM verifier FOR UPDATE")
        async with session(database_url) as other:
            await other.execute("UPDATE invalidation SET mark = 5; UPDATE head SET mark = 5")
        assert (await outcome(audit.List(request, timeout=5))).code is grpc.StatusCode.UNAVAILABLE

    async def back() -> bool:
        return (await outcome(audit.List(request, timeout=5))).ok

    await eventually(back, "the server has started over")


async def test_uses_of_another_history_are_not_shown(
    database_url: str, stub: Any, create: Any
) -> None:
    """GetUsage answers from one read of the server's own history. If the history changes while that
    read waits for the database, it shows no uses of the other history.
    """
    created = await create()
    request = pb.GetUsageRequest(account_id="acme", id=created.token.id)
    assert not (await stub.GetUsage(request, timeout=5)).callers
    async with (
        session(database_url) as other,
        session(database_url) as connection,
        connection.transaction(),
    ):
        # The server keeps its lease, and cannot find out at a renewal.
        await connection.execute("SELECT FROM verifier FOR UPDATE")
        async with other.transaction():
            await other.execute("LOCK TABLE token_usage_day IN ACCESS EXCLUSIVE MODE")
            call = asyncio.ensure_future(outcome(stub.GetUsage(request, timeout=5)))

            async def waiting() -> bool:
                return bool(
                    await connection.fetchval(
                        "SELECT count(*) FROM pg_locks"
                        " WHERE NOT granted AND relation = 'token_usage_day'::regclass"
                    )
                )

            await eventually(waiting, "the read waits for the lock")
            await other.execute("UPDATE invalidation SET mark = 5; UPDATE head SET mark = 5")
            await other.execute(
                "INSERT INTO token_usage (token_id, hint, caller, first_time, last_time)"
                " VALUES ($1, '', 'elsewhere', now(), now())",
                created.token.id,
            )
        end = await call
        assert end.code is grpc.StatusCode.UNAVAILABLE, end


async def test_an_old_deletion_gets_its_receipt_after_its_log_entry_is_gone(
    database_url: str, stub: Any, create: Any
) -> None:
    """A later Delete confirms one that was made with `no_wait`, even if its log entry has been
    pruned and other deletions have followed."""
    token = (await create()).token
    request = pb.DeleteRequest(account_id="acme", id=token.id, no_wait=True)
    early = (await stub.Delete(request, timeout=8)).receipt
    for _ in range(2):
        await delete(stub, (await create()).token)
    async with session(database_url) as connection:
        await connection.execute(
            "DELETE FROM invalidation;"
            "UPDATE head SET pruned_revision = revision, pruned_mark = mark"
        )
    await delete(stub, (await create()).token)
    receipt = await delete(stub, token)
    assert receipt.HasField("effective_time")
    assert Position(receipt.revision, receipt.mark) == Position(early.revision, early.mark)
    assert receipt.verifiers_acknowledged == 1

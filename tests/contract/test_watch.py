"""Watch, as any client sees it, over each transport: what comes, in which order, who is dropped."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.conftest import serving
from tests.support import CHANNEL_OPTIONS, WAIT_SECONDS, eventually
from tests.watching import WatchClient, watching

if TYPE_CHECKING:
    from latchkey_service.config import Settings

# Longer than a busy machine keeps anybody waiting: none ends in the middle of a test.
LEASE_SECONDS = 5.0
# Short enough to wait for.
SHORT_LEASE_SECONDS = 0.6
waits_for_the_lease = pytest.mark.parametrize("lease_seconds", [SHORT_LEASE_SECONDS], ids=["short"])
# The contract allows a Delete with a client that hangs a lease and half a second; a busy machine
# adds the rest.
DELETE_SECONDS_MAX = 5.0


@pytest.fixture
def lease_seconds() -> float:
    """How long leases are."""
    return LEASE_SECONDS


@pytest.fixture
def settings(settings: "Settings", lease_seconds: float) -> "Settings":
    return settings.model_copy(update={"lease_seconds": lease_seconds})


@pytest.fixture
async def address(shared_servers: Any, transport: str, lease_seconds: float) -> str:
    """A server that these tests share, one after the other."""
    address, _ = await shared_servers(transport, lease_seconds)
    return str(address)


@pytest.fixture
async def client(address: str) -> AsyncIterator[WatchClient]:
    async with watching(address) as client:
        yield client


async def delete(stub, token, **fields):
    request = pb.DeleteRequest(account_id=token.account_id, id=token.id, **fields)
    return (await stub.Delete(request, timeout=WAIT_SECONDS)).receipt


def seconds_of(grant: pb.Grant) -> float:
    return grant.lease_duration.ToTimedelta().total_seconds()


async def test_a_grant_comes_after_all_that_it_covers(client, stub, create):
    """A new client is told where it begins, and granted no more than the server's own lease."""
    revision = (await delete(stub, (await create()).token)).revision
    await client.ask()
    reset = await client.hear()
    assert isinstance(reset, pb.Reset)
    assert reset.revision == revision
    grant = await client.hear()
    assert isinstance(grant, pb.Grant)
    assert (grant.revision, grant.number) == (revision, 1)
    assert 0 < seconds_of(grant) <= LEASE_SECONDS
    again = await client.granted()
    assert (again.revision, again.number) == (revision, 2)


async def test_a_delete_waits_for_the_clients_confirmation(client, stub, create):
    """A client under a lease is told of a deletion, and the Delete answers once it has confirmed;
    it counts as acknowledged."""
    await client.granted()
    token = (await create()).token
    deleting = asyncio.create_task(delete(stub, token))
    news = await client.hear()
    assert list(news.token_ids) == [token.id]
    assert not deleting.done()
    await client.say(applied=news.revision - 1)
    # As good as any other proof that it still waits: what comes back is not the Delete's answer.
    await client.ask()
    assert isinstance(await client.hear(), pb.Grant)
    assert not deleting.done()
    await client.say()
    receipt = await deleting
    assert receipt.revision == news.revision
    assert (receipt.verifiers_acknowledged, receipt.verifiers_outwaited) == (1, 0)
    assert receipt.effective_time.ToDatetime() >= receipt.commit_time.ToDatetime()


@waits_for_the_lease
async def test_a_silent_client_costs_a_delete_its_lease_at_most(client, stub, create):
    """One that confirms nothing is waited out, however often it asks for more."""
    # As the client counts: from before it asked.
    asked = time.monotonic()
    lease = seconds_of(await client.granted())
    token = (await create()).token
    start = time.monotonic()
    deleting = asyncio.create_task(delete(stub, token))
    while not deleting.done():
        client.number += 1
        await client.say(applied=0, number=client.number)
        await client.hear()
    receipt = await deleting
    assert time.monotonic() - asked >= lease
    assert time.monotonic() - start < DELETE_SECONDS_MAX
    assert receipt.verifiers_acknowledged + receipt.verifiers_outwaited == 1


@waits_for_the_lease
async def test_a_client_that_is_cut_off_is_waited_out_too(address, client, stub, create):
    """The end of its stream is not the end of its lease: it answers on under its last grant."""
    asked = time.monotonic()
    lease = seconds_of(await client.granted())
    client.call.cancel()
    await eventually(lambda: client.call.done(), "the stream has ended")
    token = (await create()).token
    start = time.monotonic()
    await delete(stub, token)
    assert time.monotonic() - asked >= lease
    assert time.monotonic() - start < DELETE_SECONDS_MAX


async def test_a_client_that_lets_go_is_not_waited_for(client, stub, create):
    """Released, it counts no more; its stream ends in good order."""
    asked = time.monotonic()
    lease = seconds_of(await client.granted())
    await client.say(released=True)
    await client.call.done_writing()
    assert await client.refusal() is grpc.StatusCode.OK
    receipt = await delete(stub, (await create()).token)
    assert time.monotonic() - asked < lease
    assert receipt.verifiers_outwaited == 0


async def test_a_client_without_a_grant_is_not_waited_for(client, stub, create):
    """One that only listens answers nothing from memory, and holds up nobody."""
    await client.say()
    receipt = await delete(stub, (await create()).token)
    assert receipt.verifiers_outwaited == 0


async def test_one_that_comes_back_is_told_what_it_missed(address, stub, create):
    """On a new stream it says what it has applied, and hears the rest before its first grant."""
    async with watching(address) as client:
        await client.granted()
        await client.say(released=True)
        before = client.applied
    tokens = [(await create()).token for _ in range(3)]
    for token in tokens:
        await delete(stub, token)
    async with watching(address) as client:
        await client.say(applied=before + 1, number=1)
        news = await client.hear()
        assert set(news.token_ids) == {token.id for token in tokens[1:]}
        assert (await client.hear()).revision == before + 3


async def test_one_that_is_ahead_is_granted_what_the_server_has(client, stub, create):
    """A client that has heard more from another server is told again, and confirms anew."""
    await client.say(applied=10_000, number=1)
    first = await client.hear()
    assert isinstance(first, pb.Grant)
    token = (await create()).token
    deleting = asyncio.create_task(delete(stub, token))
    news = await client.hear()
    assert list(news.token_ids) == [token.id]
    await client.say(applied=10_000)
    assert (await deleting).revision > 0


async def test_with_the_memory_off_no_leases_are_granted(settings):
    """LATCHKEY_CACHE=off holds for client libraries too: Watch is refused, verifies go on."""
    async with (
        serving(settings.model_copy(update={"cache": "off"})) as address,
        watching(address) as client,
        grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel,
    ):
        # Nothing is said before: to write to a stream that has ended may be an error of its own.
        assert await client.refusal() is grpc.StatusCode.FAILED_PRECONDITION
        stub = pb_grpc.TokenServiceStub(channel)
        request = pb.CreateRequest(account_id="acme", name="a", scope=pb.SCOPE_READ)
        created = await stub.Create(request, timeout=5)
        for _ in range(2):
            answer = await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)
            assert answer.verdict == pb.VERDICT_VALID


@waits_for_the_lease
async def test_a_client_that_falls_silent_is_dropped(client):
    """It is told so, after a few leases."""
    await client.granted()
    assert await client.refusal() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_what_is_no_request_ends_the_stream(address, channel):
    """Bytes that are no WatchRequest are INVALID_ARGUMENT."""
    call = channel.stream_stream("/latchkey.v1.TokenService/Watch")()
    await call.write(b"\xff\xff")
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


@waits_for_the_lease
@pytest.mark.parametrize("applied", [-1, -(2**63), 2**63 - 1])
async def test_strange_numbers_do_no_harm(client, stub, create, applied):
    """A client that makes things up is served as well as can be, and holds up a Delete no longer
    than any other."""
    await client.say(applied=applied, number=-5)
    await client.say(applied=applied, number=2**63 - 1)
    deleting = asyncio.create_task(delete(stub, (await create()).token))
    async with asyncio.timeout(DELETE_SECONDS_MAX):
        assert (await deleting).revision > 0


@waits_for_the_lease
async def test_a_strange_number_is_not_told_as_the_servers_own(client, channel, stub, create):
    """What one client makes up does not keep operators from the status, nor spoil it."""
    await client.granted()
    await client.say(applied=-(2**63))
    status_stub = status_pb_grpc.StatusServiceStub(channel)
    # It takes until the client's lease has ended, and the server renews its own meanwhile.
    deleting = asyncio.create_task(delete(stub, (await create()).token))
    while not deleting.done():
        status = await status_stub.GetStatus(status_pb.GetStatusRequest(), timeout=5)
        for verifier in status.verifiers:
            assert 0 <= verifier.acknowledged_revision <= status.head_revision
            assert 0 <= verifier.lag <= status.head_revision
        await asyncio.sleep(0.02)
    assert (await deleting).revision > 0


async def test_a_stopping_server_hands_its_clients_over(settings):
    """It says that it is closing, answers until they have let go, and then leaves no row behind,
    well before their leases have run out."""
    async with serving(settings) as other:
        # Long enough that to wait for its end would fail the test.
        long = settings.model_copy(update={"grace_seconds": LEASE_SECONDS})
        running = serving(long)
        address = await running.__aenter__()
        async with watching(address) as client, watching(other) as second:
            await client.granted()
            start = time.monotonic()
            stopping = asyncio.create_task(running.__aexit__(None, None, None))
            assert isinstance(await client.hear(), pb.Closing)
            async with watching(address) as late:
                assert await late.refusal() is grpc.StatusCode.UNAVAILABLE
            assert not stopping.done()
            await second.granted()
            await client.say(released=True)
            await stopping
            assert time.monotonic() - start < 3.0
            async with grpc.aio.insecure_channel(other, options=CHANNEL_OPTIONS) as channel:
                stub = pb_grpc.TokenServiceStub(channel)
                request = pb.CreateRequest(account_id="acme", name="a", scope=pb.SCOPE_READ)
                token = (await stub.Create(request, timeout=5)).token
                await second.say(released=True)
                receipt = await delete(stub, token)
                assert (receipt.verifiers_acknowledged, receipt.verifiers_outwaited) == (1, 0)

"""Watch on the wire, over each transport: the fields, their order, statuses, and what a Delete's
caller sees. `tests/unit/coherence` decides the same for every position that a client may claim."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from latchkey_coherence.verdict_cache import NOWHERE, Position
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres.schema import bundled, newest
from structlog.testing import capture_logs

from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.servers import serving
from tests.helpers.waiting import WAIT_SECONDS, eventually
from tests.helpers.watch_client import WatchClient, watching

if TYPE_CHECKING:
    from latchkey_service.settings.settings import Settings

# One worker starts the servers.
pytestmark = pytest.mark.xdist_group("watch")
# Longer than any delay on a busy machine: no lease expires in the middle of a test.
LEASE_SECONDS = 5.0
# Short enough to wait for.
SHORT_LEASE_SECONDS = 0.6
waits_for_the_lease = pytest.mark.parametrize("lease_seconds", [SHORT_LEASE_SECONDS], ids=["short"])
# Long enough that a busy machine starts a Delete well before the lease ends for which it then
# waits.
DEBT_LEASE_SECONDS = 2.0
# Interval between the messages of a client that evades its confirmation: about as long as a Delete
# takes.
DODGE_SECONDS = 0.01
# Number of unary calls after which the server has certainly read the stream messages sent before
# them.
ROUND_TRIPS = 10
# The contract allows a Delete one lease and half a second if a client hangs; a busy machine adds
# the rest.
DELETE_SECONDS_MAX = 5.0


@pytest.fixture
def lease_seconds() -> float:
    """The lease length, in seconds."""
    return LEASE_SECONDS


@pytest.fixture
def settings(settings: "Settings", lease_seconds: float) -> "Settings":
    return settings.model_copy(update={"lease_seconds": lease_seconds})


@pytest.fixture
async def address(module_servers: Any, transport: str, lease_seconds: float) -> str:
    """The address of a server that these tests share, one after another."""
    address, _ = await module_servers(transport, lease_seconds)
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


def position_of(message) -> Position:
    """Return the position that an event, a receipt or an answer carries."""
    return Position(message.revision, message.mark)


async def test_a_grant_comes_after_all_that_it_covers(client, stub, create):
    """A new client receives its starting position. No grant lasts longer than the server's own
    lease."""
    position = position_of(await delete(stub, (await create()).token))
    assert position.mark
    await client.ask()
    reset = await client.hear()
    assert isinstance(reset, pb.Reset)
    assert position_of(reset) == position
    # The client has nothing to drop, so the server need not wait for its confirmation.
    grant = await client.hear()
    assert isinstance(grant, pb.Grant)
    assert (position_of(grant), grant.number) == (position, 1)
    assert 0 < seconds_of(grant) <= LEASE_SECONDS
    await client.say()
    again = await client.granted()
    assert (position_of(again), again.number) == (position, 2)


async def test_answers_carry_the_position_that_grants_do(client, stub, create):
    """A client can compare an answer with the position that it has applied: reads, cached answers,
    batches, receipts and the stream carry the same mark. An answer that needs no read carries no
    position."""
    created = await create()
    receipt = await delete(stub, (await create()).token)
    head = position_of(await client.granted())
    assert head == position_of(receipt)
    question = pb.VerifyRequest(secret=created.secret)
    for _ in range(2):
        assert position_of(await stub.Verify(question, timeout=5)) == head
    batch = pb.BatchVerifyRequest(requests=[question, pb.VerifyRequest(secret="hunter2")])
    known, malformed = (await stub.BatchVerify(batch, timeout=5)).responses
    assert position_of(known) == head
    assert position_of(malformed) == NOWHERE
    deleting = asyncio.create_task(delete(stub, created.token))
    news = await client.hear()
    await client.say()
    assert position_of(news) == position_of(await deleting)
    assert position_of(await stub.Verify(question, timeout=5)) == position_of(news)
    assert news.mark not in (0, head.mark)


async def test_a_delete_waits_for_the_clients_confirmation(client, stub, create):
    """A client under a lease receives a deletion, and the Delete returns once the client has
    confirmed it, mark included. Until then the client receives no grant. The receipt counts the
    client."""
    before = position_of(await client.granted())
    created = await create()
    deleting = asyncio.create_task(delete(stub, created.token))
    news = await client.hear()
    assert list(news.token_ids) == [created.token.id]
    await client.say(applied=before)
    client.number += 1
    await client.say(applied=before, number=client.number)
    hearing = asyncio.create_task(client.hear())
    # The server has read both messages above well before it has answered these calls.
    for _ in range(ROUND_TRIPS):
        await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)
    assert not hearing.done()
    assert not deleting.done()
    await client.say()
    receipt = await deleting
    grant = await hearing
    assert isinstance(grant, pb.Grant)
    assert (position_of(grant), grant.number) == (position_of(news), client.number)
    assert position_of(receipt) == position_of(news)
    assert (receipt.verifiers_acknowledged, receipt.verifiers_outwaited) == (1, 0)
    assert (receipt.clients_acknowledged, receipt.clients_outwaited) == (1, 0)
    assert receipt.effective_time.ToDatetime() >= receipt.commit_time.ToDatetime()


async def test_a_client_that_lies_deceives_only_itself(address, client, stub, create):
    """A client that renews its lease and confirms deletions that it does not apply makes no server
    and no other client accept the token, and a Delete still waits for the others. It cannot
    confirm revisions in advance either."""
    async with watching(address) as liar:
        await liar.granted()
        await client.granted()
        created = await create()
        ahead = Position(liar.applied.revision + 1, liar.applied.mark)
        deleting = asyncio.create_task(delete(stub, created.token))
        # Before it receives the deletion, the liar confirms the next revision.
        await liar.say(applied=ahead)
        assert created.token.id in (await client.hear()).token_ids
        # It confirms whatever it receives, and asks for more time. Its cache keeps the token.
        for _ in range(ROUND_TRIPS):
            await liar.say()
        await liar.granted()
        question = pb.VerifyRequest(secret=created.secret)
        for _ in range(ROUND_TRIPS):
            answer = await stub.Verify(question, timeout=WAIT_SECONDS)
            assert answer.verdict == pb.VERDICT_DELETED
        assert not deleting.done()
        await client.say()
        receipt = await deleting
        assert (receipt.clients_acknowledged, receipt.clients_outwaited) == (2, 0)
        assert (await stub.Verify(question, timeout=5)).verdict == pb.VERDICT_DELETED


async def keep_hearing(client: WatchClient, events: list[Any]) -> None:
    """Collect the events that a client receives."""
    while (response := await client.call.read()) is not grpc.aio.EOF:
        events.append(getattr(response, response.WhichOneof("event")))


@pytest.mark.parametrize("lease_seconds", [DEBT_LEASE_SECONDS], ids=["debt"])
async def test_a_client_that_never_confirms_delays_one_delete_by_its_lease(
    address, client, stub, create
):
    """The Delete waits once for the end of an unconfirming client's lease, however often the
    client requests grants. The client receives no grant, and the next Delete does not wait for
    it. The receipt counts it. `tests/unit/coherence` tests the other ways to dodge.
    """
    await client.granted()
    known = client.applied
    # Measured by the client: from before its request.
    asked = time.monotonic()
    lease = seconds_of(await client.granted())
    tokens = [(await create()).token for _ in range(2)]
    start = time.monotonic()
    events: list[Any] = []
    hearing = asyncio.create_task(keep_hearing(client, events))
    deleting = asyncio.create_task(delete(stub, tokens[0]))
    await eventually(lambda: events, "the client receives the deletion")
    while not deleting.done():
        client.number += 1
        await client.say(applied=known, number=client.number)
        await asyncio.sleep(DODGE_SECONDS)
    receipt = await deleting
    assert time.monotonic() - asked >= lease
    assert time.monotonic() - start < DELETE_SECONDS_MAX
    assert receipt.verifiers_acknowledged + receipt.verifiers_outwaited == 1
    assert (receipt.clients_acknowledged, receipt.clients_outwaited) == (0, 1)
    assert not any(isinstance(event, pb.Grant) for event in events)
    client.number += 1
    await client.say(applied=known, number=client.number)
    receipt = await delete(stub, tokens[1])
    assert (receipt.clients_acknowledged, receipt.clients_outwaited) == (0, 0)
    assert not any(isinstance(event, pb.Grant) for event in events)
    hearing.cancel()


@pytest.mark.parametrize("lease_seconds", [DEBT_LEASE_SECONDS], ids=["debt"])
async def test_status_and_log_name_the_client_a_delete_waits_for(
    client, transport, channel, stub, create
):
    """While a Delete waits for a client, the log and the status name that client; afterwards they
    do not."""
    status_stub = status_pb_grpc.StatusServiceStub(channel)

    async def waited_for() -> list[str]:
        status = await status_stub.GetStatus(status_pb.GetStatusRequest(), timeout=5)
        assert status.schema_version == newest(bundled())
        return list(status.verifiers[0].waiting_for)

    await client.granted()
    with capture_logs() as lines:
        deleting = asyncio.create_task(delete(stub, (await create()).token))
        await client.hear()
        names = await eventually(waited_for, "the status names the client")
        assert not deleting.done()
        await client.say()
        await deleting

        async def nobody() -> bool:
            return not await waited_for()

        await eventually(nobody, "the status names no client")
    (name,) = names
    # Without a policy callers have no names. `native` forwards streams over its UNIX socket, so
    # their addresses are unknown there; the description that the client sends is known.
    address = r"unix:" if transport == "native" else r"ipv4:127\.0\.0\.1:\d+"
    assert re.fullmatch(address + r" \(web-1 pid 77\)", name)
    (line,) = [line for line in lines if line["event"] == "deletions wait for clients"]
    assert line["clients"] == [name]
    assert line["log_level"] == "warning"


@waits_for_the_lease
async def test_a_disconnected_client_is_waited_out(address, client, stub, create):
    """A client whose stream has ended may still answer under its last grant, so a Delete waits
    until its lease has expired."""
    asked = time.monotonic()
    lease = seconds_of(await client.granted())
    client.call.cancel()
    await eventually(client.call.done, "the stream has ended")
    token = (await create()).token
    start = time.monotonic()
    await delete(stub, token)
    assert time.monotonic() - asked >= lease
    assert time.monotonic() - start < DELETE_SECONDS_MAX


async def test_a_client_that_releases_its_lease_is_not_waited_for(client, stub, create):
    """Once a client has released its lease, deletions do not wait for it, and its stream ends
    without an error."""
    asked = time.monotonic()
    lease = seconds_of(await client.granted())
    await client.say(released=True)
    await client.call.done_writing()
    assert await client.refusal() is grpc.StatusCode.OK
    receipt = await delete(stub, (await create()).token)
    assert time.monotonic() - asked < lease
    assert receipt.verifiers_outwaited == 0


async def test_a_client_without_a_grant_is_not_waited_for(client, stub, create):
    """A client that only listens answers nothing from its cache, so no Delete waits for it."""
    await client.say()
    receipt = await delete(stub, (await create()).token)
    assert receipt.verifiers_outwaited == 0


async def test_a_returning_client_receives_what_it_missed(address, stub, create):
    """On a new stream the client sends the position that it has applied, and receives all later
    deletions before its first grant."""
    tokens = [(await create()).token for _ in range(3)]
    receipts = [await delete(stub, token) for token in tokens]
    async with watching(address) as client:
        await client.say(applied=position_of(receipts[0]), number=1)
        news = await client.hear()
        assert isinstance(news, pb.Invalidation)
        assert set(news.token_ids) == {token.id for token in tokens[1:]}
        assert position_of(news) == position_of(receipts[2])
        await client.say()
        grant = await client.hear()
        assert isinstance(grant, pb.Grant)
        assert position_of(grant) == position_of(receipts[2])


async def test_an_unknown_position_is_reset(client, stub, create):
    """A client on another history, or without one, starts over at the server's position. It
    receives a lease only after it has confirmed that position, mark included."""
    head = position_of(await delete(stub, (await create()).token))
    claim = Position(head.revision, head.mark ^ 1)
    await client.say(applied=claim, number=1)
    reset = await client.hear()
    assert isinstance(reset, pb.Reset)
    assert position_of(reset) == head
    # Messages before the confirmation do not count, even with the right revision.
    for wrong in (claim, Position(head.revision, 0)):
        await client.say(applied=wrong, number=2)
    hearing = asyncio.create_task(client.hear())
    for _ in range(ROUND_TRIPS):
        await stub.Verify(pb.VerifyRequest(secret=(await create()).secret), timeout=5)
    assert not hearing.done()
    await client.say(number=3)
    grant = await hearing
    assert isinstance(grant, pb.Grant)
    assert (position_of(grant), grant.number) == (head, 3)


async def test_with_the_cache_off_no_leases_are_granted(settings):
    """LATCHKEY_CACHE=off applies to client libraries too: Watch is rejected, and verifies still
    work."""
    async with (
        serving(settings.model_copy(update={"cache": "off"})) as address,
        watching(address) as client,
        grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel,
    ):
        # Nothing is written first, because a write to a stream that has ended may fail with a
        # different error.
        assert await client.refusal() is grpc.StatusCode.FAILED_PRECONDITION
        stub = pb_grpc.TokenServiceStub(channel)
        request = pb.CreateRequest(account_id="acme", name="a", scope=pb.SCOPE_READ)
        created = await stub.Create(request, timeout=5)
        for _ in range(2):
            answer = await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)
            assert answer.verdict == pb.VERDICT_VALID


@waits_for_the_lease
async def test_a_silent_client_is_dropped(client):
    """The stream of a silent client ends with DEADLINE_EXCEEDED after a few leases."""
    await client.granted()
    assert await client.refusal() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_undecodable_request_ends_the_stream(address, channel):
    """Bytes that do not decode as a WatchRequest are INVALID_ARGUMENT."""
    call = channel.stream_stream("/latchkey.v1.TokenService/Watch")()
    await call.write(b"\xff\xff")
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


@waits_for_the_lease
@pytest.mark.parametrize("applied", [-1, -(2**63), 2**63 - 1])
async def test_invented_revisions_do_no_harm(client, stub, create, applied):
    """A client that sends invented revisions is still served, and delays a Delete no longer than
    any other client."""
    await client.say(applied=Position(applied, 1), number=-5)
    await client.say(applied=Position(applied, 2**64 - 1), number=2**63 - 1)
    deleting = asyncio.create_task(delete(stub, (await create()).token))
    async with asyncio.timeout(DELETE_SECONDS_MAX):
        assert (await deleting).revision > 0


@waits_for_the_lease
async def test_invented_revisions_do_not_corrupt_the_status(client, channel, stub, create):
    """A revision that a client invents does not break GetStatus, and does not appear there as the
    server's own."""
    await client.granted()
    await client.say(applied=Position(-(2**63), 0))
    status_stub = status_pb_grpc.StatusServiceStub(channel)
    # The check lasts until the client's lease has ended, and the server renews its own lease
    # meanwhile.
    deleting = asyncio.create_task(delete(stub, (await create()).token))
    while not deleting.done():
        status = await status_stub.GetStatus(status_pb.GetStatusRequest(), timeout=5)
        for verifier in status.verifiers:
            assert 0 <= verifier.acknowledged_revision <= status.head_revision
            assert 0 <= verifier.lag <= status.head_revision
        await asyncio.sleep(0.02)
    assert (await deleting).revision > 0


async def test_a_stopping_server_hands_its_clients_over(settings):
    """A stopping server announces that it is closing and answers until its clients have released
    their leases. It leaves no row behind, and stops well before the leases would have expired."""
    async with serving(settings) as other:
        # Long enough that a wait for its end would fail the test.
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

"""DeleteAll as any client sees it, over each transport."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.test_changes import becomes, check_receipt, timestamp, verdict
from tests.helpers.rich_status import refusal


def delete_all(dry_run=False, no_wait=False, **selected):
    return pb.DeleteAllRequest(
        account_id="acme",
        filter=pb.TokenFilter(**selected) if selected else None,
        dry_run=dry_run,
        no_wait=no_wait,
    )


async def test_delete_all(stub, create):
    """DeleteAll deletes all tokens of one account under one revision, and nothing else."""
    created = [await create() for _ in range(5)]
    other = await create(account_id="other")
    for token in created:
        assert await verdict(stub, token.secret) == "VALID"
    dry = await stub.DeleteAll(delete_all(dry_run=True))
    assert (dry.count, dry.more, dry.HasField("receipt")) == (5, False, False)
    assert [token.id for token in dry.tokens] == [token.token.id for token in created]
    assert await verdict(stub, created[0].secret) == "VALID"
    answer = await stub.DeleteAll(delete_all())
    assert {await verdict(stub, token.secret) for token in created} == {"DELETED"}
    assert (answer.count, len(answer.tokens), answer.more) == (5, 0, False)
    check_receipt(answer.receipt)
    assert await verdict(stub, other.secret) == "VALID"
    # The receipt of each token is that of the call.
    receipts = [
        (await stub.Delete(pb.DeleteRequest(account_id="acme", id=token.token.id))).receipt
        for token in created
    ]
    assert {r.SerializeToString(deterministic=True) for r in receipts} == {
        answer.receipt.SerializeToString(deterministic=True)
    }
    again = await stub.DeleteAll(delete_all())
    assert again.count == 0
    check_receipt(again.receipt)
    assert again.receipt.revision >= answer.receipt.revision


async def test_filters(stub, create):
    """Each part of the filter selects the right tokens, and parts combine."""
    soon = duration_pb2.Duration(seconds=3600)
    tokens = {
        "reader": await create(name="Reader", labels={"team": "a"}),
        "writer": await create(name="Writer", scope=pb.SCOPE_WRITE, labels={"team": "a", "x": ""}),
        "soon": await create(name="soon", ttl=soon, labels={"team": "b"}),
        "off": await create(name="off", scope=pb.SCOPE_WRITE),
        "over": await create(name="over", ttl=duration_pb2.Duration(nanos=100_000_000)),
    }
    await stub.Disable(pb.DisableRequest(account_id="acme", id=tokens["off"].token.id))
    await becomes("EXPIRED", stub, tokens["over"].secret)
    names = {token.token.id: name for name, token in tokens.items()}

    async def matching(**selected: Any) -> set[str]:
        answer = await stub.DeleteAll(delete_all(dry_run=True, **selected))
        assert answer.count == len(answer.tokens)
        return {names[token.id] for token in answer.tokens}

    now = datetime.now(UTC)
    everything = set(tokens)
    assert await matching() == everything
    assert await matching(scope=pb.SCOPE_WRITE) == {"writer", "off"}
    assert await matching(name_contains="READ") == {"reader"}
    assert await matching(name_contains="e") == {"reader", "writer", "over"}
    assert await matching(label={"team": "a"}) == {"reader", "writer"}
    assert await matching(label={"team": "a", "x": ""}) == {"writer"}
    assert await matching(state=pb.TOKEN_STATE_ACTIVE) == {"reader", "writer", "soon"}
    assert await matching(state=pb.TOKEN_STATE_DISABLED) == {"off"}
    assert await matching(state=pb.TOKEN_STATE_EXPIRED) == {"over"}
    assert await matching(expires_before=timestamp(now + timedelta(hours=2))) == {"soon", "over"}
    assert await matching(expires_before=timestamp(now)) == {"over"}
    assert await matching(unused_since=timestamp(now - timedelta(hours=1))) == set()
    assert await matching(unused_since=timestamp(now + timedelta(hours=1))) == everything
    assert await matching(can_write=True) == {"writer"}
    assert await matching(can_write=False) == everything - {"writer"}
    assert await matching(can_write=True, label={"team": "b"}) == set()
    answer = await stub.DeleteAll(delete_all(label={"team": "a"}, scope=pb.SCOPE_READ))
    assert answer.count == 1
    assert await matching() == everything - {"reader"}


@pytest.mark.parametrize(
    ("selected", "wrong"),
    [
        ({"scope": 9}, ["filter.scope"]),
        ({"state": 9}, ["filter.state"]),
        ({"name_contains": "x" * 65}, ["filter.name_contains"]),
        ({"name_contains": "a\x00"}, ["filter.name_contains"]),
        # Every name contains these once invisible characters are ignored.
        ({"name_contains": " "}, ["filter.name_contains"]),
        ({"name_contains": "\u200b"}, ["filter.name_contains"]),
        ({"label": {str(n): "" for n in range(17)}}, ["filter.label"]),
        ({"label": {"a\x00": ""}}, ["filter.label"]),
    ],
)
async def test_bad_filter(stub, create, selected, wrong):
    """An invalid filter is refused by name and deletes nothing."""
    created = await create()
    error = await refusal(stub.DeleteAll(delete_all(**selected)))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, wrong)
    assert await verdict(stub, created.secret) == "VALID"


async def test_filter_by_the_name_of_an_expired_token(stub, create):
    """A token whose name was taken over is still found by its name, and by nothing else."""
    ttl = duration_pb2.Duration(nanos=100_000_000)
    expired = await create(name="deploy", ttl=ttl)
    await becomes("EXPIRED", stub, expired.secret)
    live = await create(name="deploy")

    async def matching(name_contains: str) -> set[str]:
        answer = await stub.DeleteAll(delete_all(dry_run=True, name_contains=name_contains))
        return {token.id for token in answer.tokens}

    assert await matching("PLOY") == {expired.token.id, live.token.id}
    assert await matching("tok_") == await matching(expired.token.id[4:]) == set()


async def test_delete_all_against_create_and_delete(stub, create):
    """Concurrent calls neither deadlock nor leave a token that lived before the call."""
    created = [await create() for _ in range(10)]
    await asyncio.gather(
        stub.DeleteAll(delete_all()),
        *(
            stub.Delete(pb.DeleteRequest(account_id="acme", id=token.token.id))
            for token in reversed(created)
        ),
        stub.DeleteAll(delete_all()),
        *(create() for _ in range(4)),
    )
    assert {await verdict(stub, token.secret) for token in created} == {"DELETED"}


async def test_no_wait(stub, create):
    """With no_wait, the receipt has no effective_time, and a Delete of one token confirms it."""
    created = await create()
    receipt = (await stub.DeleteAll(delete_all(no_wait=True))).receipt
    assert receipt.revision
    assert not receipt.HasField("effective_time")
    request = pb.DeleteRequest(account_id="acme", id=created.token.id)
    check_receipt((await stub.Delete(request)).receipt)


async def test_an_unknown_condition_deletes_nothing(stub, channel, create):
    """A condition of a newer client is refused, because without it more tokens would match."""
    await create()
    number = pb.DeleteAllRequest.DESCRIPTOR.fields_by_name["filter"].number
    # filter { 100: "x" }
    raw = pb.DeleteAllRequest(account_id="acme").SerializeToString()
    raw += bytes([number << 3 | 2, 4, 0xA2, 0x06, 1, ord("x")])
    call = channel.unary_unary(
        "/latchkey.v1.TokenService/DeleteAll",
        request_serializer=lambda data: data,
        response_deserializer=pb.DeleteAllResponse.FromString,
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(raw, timeout=5)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len((await stub.List(pb.ListRequest(account_id="acme"))).tokens) == 1

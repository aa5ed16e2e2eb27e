"""The life of a token as any client sees it, over each transport."""

import asyncio
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import latchkey
import pytest
from google.protobuf import duration_pb2
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.rich_status import refusal


async def verify(stub, secret, scope=pb.SCOPE_READ):
    request = pb.VerifyRequest(secret=secret, required_scope=scope)
    return await stub.Verify(request, timeout=5)


async def test_create_returns_the_requested_token(stub):
    """The token has the requested fields, a creation time and a hint, and does not contain the
    secret."""
    before = datetime.now(UTC)
    created = await stub.Create(
        pb.CreateRequest(
            account_id="acme",
            name="  CI deploy ",
            scope=pb.SCOPE_WRITE,
            ttl=duration_pb2.Duration(seconds=3600),
            labels={"team": "build"},
        )
    )
    token = created.token
    assert re.fullmatch(r"[\w-]{1,64}", token.id)
    assert (token.account_id, token.name, token.scope) == ("acme", "CI deploy", pb.SCOPE_WRITE)
    create_time = token.create_time.ToDatetime(UTC)
    assert before - timedelta(milliseconds=1) <= create_time <= datetime.now(UTC)
    assert token.expire_time.ToDatetime(UTC) == create_time + timedelta(hours=1)
    assert not token.HasField("last_used_time")
    assert token.hint == f"lk_…{created.secret[-4:]}"
    assert dict(token.labels) == {"team": "build"}
    assert re.fullmatch(r"lk_[0-9A-Za-z]{57}", created.secret)
    assert created.secret[:50] not in str(token)


async def test_get_and_list_show_the_token_as_created(stub, create):
    """Create's answer, Get, List and Verify all show the same token."""
    created = await create(labels={"a": "b"})
    got = await stub.Get(pb.GetRequest(account_id="acme", id=created.token.id))
    listed = await stub.List(pb.ListRequest(account_id="acme"))
    assert got.token == created.token
    assert list(listed.tokens) == [created.token]
    verified = pb.Token()
    verified.CopyFrom(created.token)
    # Verify does not need it.
    verified.ClearField("secrets")
    assert (await verify(stub, created.secret)).token == verified


async def test_scopes(stub, create):
    """WRITE includes READ, READ does not include WRITE, and an unspecified scope requires
    nothing."""
    read = await create(scope=pb.SCOPE_READ)
    write = await create(scope=pb.SCOPE_WRITE)
    verdicts = {
        (token.token.scope, scope): (await verify(stub, token.secret, scope)).verdict
        for token in (read, write)
        for scope in pb.Scope.values()
    }
    assert verdicts == {
        (pb.SCOPE_READ, pb.SCOPE_UNSPECIFIED): pb.VERDICT_VALID,
        (pb.SCOPE_READ, pb.SCOPE_READ): pb.VERDICT_VALID,
        (pb.SCOPE_READ, pb.SCOPE_WRITE): pb.VERDICT_INSUFFICIENT_SCOPE,
        (pb.SCOPE_WRITE, pb.SCOPE_UNSPECIFIED): pb.VERDICT_VALID,
        (pb.SCOPE_WRITE, pb.SCOPE_READ): pb.VERDICT_VALID,
        (pb.SCOPE_WRITE, pb.SCOPE_WRITE): pb.VERDICT_VALID,
    }


async def test_deleted_token_is_refused(stub, create):
    """A verify that starts after Delete has returned is not VALID, and Get and List no longer show
    the token."""
    created = await create(scope=pb.SCOPE_WRITE)
    assert (await verify(stub, created.secret)).verdict == pb.VERDICT_VALID
    receipt = (await stub.Delete(pb.DeleteRequest(account_id="acme", id=created.token.id))).receipt
    answer = await verify(stub, created.secret)
    assert answer.verdict == pb.VERDICT_DELETED
    assert answer.token.id == created.token.id
    assert answer.revision >= receipt.revision
    assert not (await stub.List(pb.ListRequest(account_id="acme"))).tokens
    error = await refusal(stub.Get(pb.GetRequest(account_id="acme", id=created.token.id)))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "TOKEN_NOT_FOUND")


async def test_delete_again_returns_the_same_receipt(stub, create):
    """A retry of Delete is safe, and so are many concurrent ones: one deletion, one receipt."""
    created = await create()
    request = pb.DeleteRequest(account_id="acme", id=created.token.id)
    receipts = await asyncio.gather(*(stub.Delete(request) for _ in range(8)))
    receipts.append(await stub.Delete(request))
    assert len({r.SerializeToString(deterministic=True) for r in receipts}) == 1
    receipt = receipts[0].receipt
    assert receipt.revision >= 1
    assert receipt.effective_time.ToNanoseconds() >= receipt.commit_time.ToNanoseconds()


async def test_revisions_follow_the_deletions(stub, create):
    """Concurrent deletions get one revision each, without gaps, in the order of their commits."""
    created = [await create() for _ in range(6)]
    answers = await asyncio.gather(
        *(stub.Delete(pb.DeleteRequest(account_id="acme", id=c.token.id)) for c in created)
    )
    receipts = sorted((a.receipt for a in answers), key=lambda r: r.revision)
    first = receipts[0].revision
    assert [r.revision for r in receipts] == list(range(first, first + 6))
    times = [r.commit_time.ToNanoseconds() for r in receipts]
    assert times == sorted(times)


async def test_expiry_is_judged_at_each_answer(stub, create):
    """A token is VALID until its expiry time and EXPIRED from then on, and List still shows it."""
    created = await create(ttl=duration_pb2.Duration(nanos=400_000_000))
    soon = created.token.expire_time
    verdicts: list[int] = []
    while not verdicts or verdicts[-1] == pb.VERDICT_VALID:
        asked = datetime.now(UTC)
        verdicts.append((await verify(stub, created.secret)).verdict)
        if verdicts[-1] == pb.VERDICT_VALID:
            assert asked <= soon.ToDatetime(UTC)
    assert verdicts[-1] == pb.VERDICT_EXPIRED
    assert datetime.now(UTC) >= soon.ToDatetime(UTC)
    assert (await stub.List(pb.ListRequest(account_id="acme"))).tokens
    answer = await verify(stub, created.secret, pb.SCOPE_WRITE)
    assert answer.verdict == pb.VERDICT_EXPIRED, "EXPIRED comes before INSUFFICIENT_SCOPE"


async def test_name_is_unique_among_live_tokens(stub, create):
    """A name in use is rejected in any case (upper or lower), with characters that leave no mark,
    and in compatible forms. A deleted token's name and another account's name are free."""
    created = await create(name="Deploy")
    for name in (
        "Deploy",
        "dEPLOY",
        " deploy ",
        "de\u200bploy",
        "deploy\U000e0041",
        "ｄｅｐｌｏｙ",
    ):
        request = pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ)
        error = await refusal(stub.Create(request))
        assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, "TOKEN_NAME_TAKEN")
    await create(account_id="other", name="deploy")
    await stub.Delete(pb.DeleteRequest(account_id="acme", id=created.token.id))
    await create(name="deploy")


@pytest.mark.parametrize(
    "name", ["\u200b", "\U000e0041\U000e0042", "\u3164", "\u2800", "\ufe0f \u00ad", "\u0301"]
)
async def test_a_name_is_visible(stub, name):
    """A name without a character that leaves a mark is rejected."""
    request = pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ)
    error = await refusal(stub.Create(request))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["name"])


async def test_racing_creates_of_one_name_make_one_token(stub):
    """Of concurrent creates with one name, one succeeds and the others fail because the name is
    taken."""
    request = pb.CreateRequest(account_id="acme", name="race", scope=pb.SCOPE_READ)
    results = await asyncio.gather(
        *(stub.Create(request) for _ in range(8)), return_exceptions=True
    )
    won = [r for r in results if isinstance(r, pb.CreateResponse)]
    lost = [r for r in results if isinstance(r, grpc.aio.AioRpcError)]
    assert (len(won), len(lost)) == (1, 7)
    assert {r.code() for r in lost} == {grpc.StatusCode.ALREADY_EXISTS}
    assert len((await stub.List(pb.ListRequest(account_id="acme"))).tokens) == 1


async def test_list_pages_through_everything_newest_first(stub, create):
    """The pages contain each token once, newest first, whatever is created or deleted between
    them."""
    created = [(await create()).token for _ in range(7)]
    seen, page_token = [], ""
    while True:
        page = await stub.List(
            pb.ListRequest(account_id="acme", page_size=3, page_token=page_token)
        )
        seen += page.tokens
        if len(seen) == 3:
            # A newer token, and the deletion of the token after which the next page starts.
            await create()
            await stub.Delete(pb.DeleteRequest(account_id="acme", id=seen[-1].id))
        page_token = page.next_page_token
        if not page_token:
            break
    assert [t.id for t in seen] == [t.id for t in reversed(created)]


async def test_page_size(stub, create):
    """0 means 50, and anything above 500 means 500."""

    async def create_some(number: int) -> None:
        for _ in range(number):
            await create()

    # No more at once than the admission limit allows.
    await asyncio.gather(*map(create_some, [63] * 7 + [60]))
    for asked, given in {0: 50, 1: 1, 60: 60, 500: 500, 501: 500, 2**31 - 1: 500}.items():
        page = await stub.List(pb.ListRequest(account_id="acme", page_size=asked))
        assert len(page.tokens) == given
        assert page.next_page_token


async def test_the_last_page_has_no_next_page(stub, create):
    """A page that ends with the last token has no next page, even when it is full."""
    for _ in range(3):
        await create()
    page = await stub.List(pb.ListRequest(account_id="acme", page_size=3))
    assert len(page.tokens) == 3
    assert page.next_page_token == ""


async def test_another_accounts_token_is_out_of_reach(stub, create):
    """An account cannot get, list or delete another account's token, or learn that it exists."""
    created = await create(account_id="owner")
    other: dict[str, Any] = {"account_id": "other", "id": created.token.id}
    never: dict[str, Any] = {"account_id": "other", "id": "tok_never"}
    for call, theirs, nothing in (
        (stub.Get, pb.GetRequest(**other), pb.GetRequest(**never)),
        (stub.Delete, pb.DeleteRequest(**other), pb.DeleteRequest(**never)),
    ):
        first, second = await refusal(call(theirs)), await refusal(call(nothing))
        assert first.code == grpc.StatusCode.NOT_FOUND
        assert (first.code, first.message) == (second.code, second.message)
    assert not (await stub.List(pb.ListRequest(account_id="other"))).tokens
    assert (await verify(stub, created.secret)).verdict == pb.VERDICT_VALID


async def test_page_token_of_another_account_is_refused(stub, create):
    """A page token is valid only for its own account."""
    for _ in range(2):
        await create(account_id="owner")
        await create(account_id="other")
    page = await stub.List(pb.ListRequest(account_id="owner", page_size=1))
    error = await refusal(
        stub.List(pb.ListRequest(account_id="other", page_token=page.next_page_token))
    )
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert error.fields == ["page_token"]


async def test_batch_answers_in_order(stub, create):
    """A batch of 1,000 with every verdict, duplicates included, answers each request in its
    place."""
    read, write, dead = await create(), await create(scope=pb.SCOPE_WRITE), await create()
    await stub.Delete(pb.DeleteRequest(account_id="acme", id=dead.token.id))
    kinds = [
        (read.secret, pb.SCOPE_READ, pb.VERDICT_VALID),
        (read.secret, pb.SCOPE_WRITE, pb.VERDICT_INSUFFICIENT_SCOPE),
        (write.secret, pb.SCOPE_WRITE, pb.VERDICT_VALID),
        (dead.secret, pb.SCOPE_READ, pb.VERDICT_DELETED),
        ("nonsense", pb.SCOPE_READ, pb.VERDICT_MALFORMED),
        ("", pb.SCOPE_READ, pb.VERDICT_MALFORMED),
    ]
    wanted = [kinds[n % len(kinds)] for n in range(1000)]
    answer = await stub.BatchVerify(
        pb.BatchVerifyRequest(
            requests=[pb.VerifyRequest(secret=s, required_scope=r) for s, r, _ in wanted]
        )
    )
    assert [r.verdict for r in answer.responses] == [verdict for _, _, verdict in wanted]
    assert answer.responses[2].token.id == write.token.id
    assert not answer.responses[4].HasField("token")


@pytest.mark.parametrize("size", [0, 1001])
async def test_batch_of_the_wrong_size_is_refused(stub, size):
    """A batch must have 1 to 1,000 requests."""
    error = await refusal(
        stub.BatchVerify(pb.BatchVerifyRequest(requests=[pb.VerifyRequest()] * size))
    )
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert error.fields == ["requests"]


async def test_several_addresses_as_one_target(address, create):
    """The client library accepts several servers as one target, on either transport."""
    created = await create()
    async with latchkey.Client(f"ipv4:{address},127.0.0.1:9") as client:
        answer = await client.verify(created.secret, timeout_seconds=5)
        assert answer.allowed

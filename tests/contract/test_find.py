"""Find: tokens of all accounts by id and by hint, over both transports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import latchkey
import pytest
from google.protobuf.duration_pb2 import Duration
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.databases import session
from tests.helpers.rich_status import refusal
from tests.helpers.servers import serving_as
from tests.helpers.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub
    from latchkey_service.settings.settings import Settings

    Create = Callable[..., Awaitable[pb.CreateResponse]]

FIND = "/latchkey.v1.TokenService/Find"


async def found(stub: TokenServiceAsyncStub, **fields: Any) -> list[str]:
    """Return the ids of the tokens that Find finds."""
    answer = await stub.Find(pb.FindRequest(**fields), timeout=5)
    return [each.token.id for each in answer.tokens]


async def test_a_token_by_its_id(stub: TokenServiceAsyncStub, create: Create) -> None:
    """Find returns a token of any account as Get does, with the callers that used it."""
    created = await create(account_id="globex", description="for the nightly export")
    await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)

    async def used() -> Any:
        answer = await stub.Find(pb.FindRequest(id=created.token.id), timeout=5)
        # The two are read one after the other.
        (token,) = answer.tokens
        return answer if answer.callers and token.token.HasField("last_used_time") else None

    answer = await eventually(used, "a recorded use")
    got = await stub.Get(pb.GetRequest(account_id="globex", id=created.token.id), timeout=5)
    (one,) = answer.tokens
    assert (one.token, one.HasField("delete_time")) == (got.token, False)
    usage = await stub.GetUsage(
        pb.GetUsageRequest(account_id="globex", id=created.token.id), timeout=5
    )
    assert list(answer.callers) == list(usage.callers)
    assert answer.next_page_token == ""
    assert await found(stub, id="tok_" + "0" * 26) == []


async def test_tokens_by_a_hint(stub: TokenServiceAsyncStub, create: Create) -> None:
    """A whole hint, and its last four characters in any letter case, find the token."""
    created = await create()
    hint = created.token.hint
    end = hint[-4:]
    for text in (hint, hint.upper(), hint.replace("…", "..."), end, end.swapcase(), "…" + end):
        assert created.token.id in await found(stub, hint=text), text
    # The rest of a hint counts too.
    assert created.token.id not in await found(stub, hint="xy_…" + end)
    answer = await stub.Find(pb.FindRequest(hint=end), timeout=5)
    assert not answer.callers


async def test_old_secrets_and_deleted_tokens_are_found(
    stub: TokenServiceAsyncStub, create: Create
) -> None:
    """The hint of a replaced secret finds the token, and a deleted token has its time of deletion,
    so that an operator can say whether a leaked secret is dead."""
    created = await create()
    named: dict[str, Any] = {"account_id": "acme", "id": created.token.id}
    rotated = await stub.Rotate(pb.RotateRequest(**named, grace=Duration()), timeout=8)
    assert rotated.token.hint != created.token.hint
    for hint in (created.token.hint, rotated.token.hint):
        assert await found(stub, hint=hint) == [created.token.id]
    deleted = await stub.Delete(pb.DeleteRequest(**named), timeout=8)
    for request in (
        pb.FindRequest(id=created.token.id),
        pb.FindRequest(hint=created.token.hint),
    ):
        (one,) = (await stub.Find(request, timeout=5)).tokens
        assert one.delete_time == deleted.receipt.commit_time
        assert one.token.name == created.token.name


async def test_pages_cover_all_accounts_once(own_address: str, database_url: str) -> None:
    """Pages list each token once, newest first, even one that has two secrets with the hint."""
    async with (
        grpc.aio.insecure_channel(own_address) as channel,
        session(database_url) as connection,
    ):
        call: Any = channel.unary_unary(
            FIND,
            request_serializer=pb.FindRequest.SerializeToString,
            response_deserializer=pb.FindResponse.FromString,
        )
        await connection.execute(
            """
            INSERT INTO token (id, account_id, name, name_key, scope, create_time, hint)
            SELECT 'tok_' || lpad(n::text, 26, '0'), 'account-' || n, 'n', 'n', 1,
                   timestamptz '2026-01-01' + n * interval '1 day', 'lk_…Same'
              FROM generate_series(1, 7) n
            """
        )
        await connection.execute("INSERT INTO pepper (id) VALUES ('p') ON CONFLICT DO NOTHING")
        await connection.execute(
            """
            INSERT INTO secret (digest, pepper_id, token_id, hint, ordinal)
            SELECT sha256((t.id || n)::bytea), 'p', t.id, t.hint, n
              FROM token t, generate_series(1, 2) n
            """
        )
        listed: list[str] = []
        position, pages = "", 0
        while pages == 0 or position:
            request = pb.FindRequest(hint="same", page_size=3, page_token=position)
            answer = await call(request, timeout=5)
            listed += [each.token.id for each in answer.tokens]
            position, pages = answer.next_page_token, pages + 1
        assert (pages, listed) == (3, [f"tok_{n:026}" for n in range(7, 0, -1)])
        # A page token belongs to its hint.
        first = await call(pb.FindRequest(hint="same", page_size=3), timeout=5)
        wrong = pb.FindRequest(hint="other", page_token=first.next_page_token)
        error = await refusal(call(wrong, timeout=5))
        assert error.fields == ["page_token"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "hint"),
        ({"id": "tok_" + "0" * 26, "hint": "abcd"}, "id"),
        ({"id": "tok_" + "0" * 26, "page_token": "x"}, "page_token"),
        ({"hint": "abc"}, "hint"),
        ({"hint": "…abc"}, "hint"),
        ({"hint": "lk_" + "0" * 57}, "hint"),
        ({"hint": "abcd", "page_size": -1}, "page_size"),
    ],
)
async def test_bad_requests(
    stub: TokenServiceAsyncStub, fields: dict[str, Any], named: str
) -> None:
    """A search without exactly one condition, or with too short or too long a hint, is refused."""
    error = await refusal(stub.Find(pb.FindRequest(**fields), timeout=5))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [named])
    assert "0" * 20 not in error.text


async def test_each_search_is_audited(settings: Settings) -> None:
    """The audit log records each Find, with the token if the search was for an id."""
    # A server for this test alone: of many searches in a minute, only some have their own entries.
    async with (
        serving_as(settings) as server,
        grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel,
    ):
        stub: Any = pb_grpc.TokenServiceStub(channel)
        request = pb.CreateRequest(account_id="acme", name="audited", scope=pb.SCOPE_READ)
        token = (await stub.Create(request, timeout=5)).token
        searches = {"by-id": {"id": token.id}, "by-hint": {"hint": token.hint}}
        for name, fields in searches.items():
            metadata = (("x-request-id", name),)
            await stub.Find(pb.FindRequest(**fields), metadata=metadata, timeout=5)
        audit: Any = audit_pb_grpc.AuditServiceStub(channel)

        async def entries() -> bool:
            request = audit_pb.AuditServiceListRequest(method="Find", page_size=20)
            answer = await audit.List(request, timeout=5)
            found = {entry.request_id: entry.token_id for entry in answer.entries}
            return found.get("by-id") == token.id and found.get("by-hint") == ""

        assert await eventually(entries, "two entries")


async def test_the_client_library_finds(address: str, create: Create) -> None:
    """`Client.find` returns tokens, their deletion, and who used them."""
    created = await create()
    async with latchkey.Client(address) as client:
        page = await client.find(hint=created.token.hint)
        assert [each.token.id for each in page.tokens] == [created.token.id]
        assert page.next_page_token == ""
        await client.delete("acme", created.token.id)
        (deleted,) = (await client.find(token_id=created.token.id)).tokens
        assert deleted.delete_time is not None

"""Changes to a token as any client sees them, over each transport: Update, Disable, Enable."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_grpc
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.rich_status import refusal
from tests.helpers.waiting import eventually


async def verdict(stub, secret, scope=pb.SCOPE_READ, address="", permissions=()):
    request = pb.VerifyRequest(
        secret=secret,
        required_scope=scope,
        client_address=address,
        required_permissions=permissions,
    )
    return pb.Verdict.Name((await stub.Verify(request, timeout=5)).verdict).removeprefix("VERDICT_")


async def becomes(expected, stub, *question, **more):
    """Wait until the verdict is `expected`: for widening changes, and for clocks."""

    async def reached() -> bool:
        return bool(await verdict(stub, *question, **more) == expected)

    await eventually(reached, f"the verdict {expected}")


def update(token_id, paths, no_wait=False, account_id="acme", **fields):
    return pb.UpdateRequest(
        account_id=account_id,
        id=token_id,
        token=pb.Token(**fields),
        update_mask=field_mask_pb2.FieldMask(paths=paths),
        no_wait=no_wait,
    )


def timestamp(moment):
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(moment)
    return message


async def get(stub, token_id):
    """Return the token without its last use, which the server may write at any moment."""
    return unused((await stub.Get(pb.GetRequest(account_id="acme", id=token_id))).token)


def unused(token):
    """Return a copy of the token without its last use."""
    copy = pb.Token()
    copy.CopyFrom(token)
    for each in (copy, *copy.secrets):
        each.ClearField("last_used_time")
    copy.ClearField("last_used_by")
    return copy


def check_receipt(receipt):
    """A confirmed receipt names a position, and a time after the commit."""
    assert receipt.revision >= 1
    assert receipt.mark
    assert receipt.effective_time.ToNanoseconds() >= receipt.commit_time.ToNanoseconds() > 0
    assert receipt.verifiers_acknowledged >= 1


async def test_create_with_limits(stub, create):
    """Create stores description, networks and permissions; Verify shows what verifiers need."""
    created = await create(
        description="first line\nsecond line",
        allowed_networks=["10.0.0.0/8", "2001:DB8::/32", "192.0.2.1", "::ffff:198.51.100.0/120"],
        permissions=["orders:read", "users:*", "orders:read"],
    )
    token = created.token
    assert token.description == "first line\nsecond line"
    assert list(token.allowed_networks) == [
        *("10.0.0.0/8", "2001:db8::/32", "192.0.2.1/32", "198.51.100.0/24"),
    ]
    assert list(token.permissions) == ["orders:read", "users:*"]
    assert [secret.hint for secret in token.secrets] == [token.hint]
    assert await get(stub, token.id) == token
    request = pb.VerifyRequest(secret=created.secret, client_address="10.9.9.9")
    answer = await stub.Verify(request)
    assert answer.verdict == pb.VERDICT_VALID
    assert (list(answer.token.secrets), answer.token.description) == ([], "")
    assert answer.token.allowed_networks == token.allowed_networks


async def test_allowed_networks(stub, create):
    """A token with networks is refused from anywhere else, and without an address; from a cache as
    well as from the database."""
    created = await create(allowed_networks=["10.0.0.0/8"])
    for _ in range(2):
        for address, expected in {
            "10.1.2.3": "VALID",
            "::ffff:10.1.2.3": "VALID",
            "11.0.0.1": "ADDRESS_NOT_ALLOWED",
            "": "ADDRESS_NOT_ALLOWED",
            "nonsense": "ADDRESS_NOT_ALLOWED",
            "2001:db8::1": "ADDRESS_NOT_ALLOWED",
        }.items():
            assert await verdict(stub, created.secret, address=address) == expected, address
    other = await create()
    assert await verdict(stub, other.secret, address="nonsense") == "VALID"


async def test_permissions(stub, create):
    """A verify that requires permissions accepts only tokens that have all of them."""
    some = await create(permissions=["orders:read", "users:*"])
    none = await create(scope=pb.SCOPE_WRITE)
    lacking = "INSUFFICIENT_PERMISSIONS"
    for _ in range(2):
        for required, expected in [
            ([], "VALID"),
            (["orders:read"], "VALID"),
            (["orders:read", "users:delete"], "VALID"),
            (["orders:write"], lacking),
            (["orders:read", "orders:write"], lacking),
            (["orders:*"], lacking),
            (["users:"], lacking),
        ]:
            assert await verdict(stub, some.secret, permissions=required) == expected, required
        assert await verdict(stub, none.secret, permissions=["orders:read"]) == lacking
    assert await verdict(stub, some.secret, pb.SCOPE_WRITE, permissions=["a:b"]) == (
        "INSUFFICIENT_SCOPE"
    )


async def test_too_many_required_permissions(stub, create):
    """A verify may require at most 64 permissions, in a batch too."""
    secret = (await create()).secret
    request = pb.VerifyRequest(secret=secret, required_permissions=["a:b"] * 65)
    error = await refusal(stub.Verify(request))
    assert error.fields == ["required_permissions"]
    batch = pb.BatchVerifyRequest(requests=[pb.VerifyRequest(secret=secret), request])
    error = await refusal(stub.BatchVerify(batch))
    assert error.fields == ["requests[1].required_permissions"]


async def test_a_batch_decides_each_question(stub, create):
    """The questions of a batch keep their own addresses and permissions."""
    token = await create(allowed_networks=["10.0.0.0/8"], permissions=["orders:read"])
    questions = [
        ("10.0.0.1", ["orders:read"], pb.VERDICT_VALID),
        ("10.0.0.1", ["orders:write"], pb.VERDICT_INSUFFICIENT_PERMISSIONS),
        ("192.0.2.1", ["orders:read"], pb.VERDICT_ADDRESS_NOT_ALLOWED),
    ] * 2
    answer = await stub.BatchVerify(
        pb.BatchVerifyRequest(
            requests=[
                pb.VerifyRequest(
                    secret=token.secret, client_address=address, required_permissions=required
                )
                for address, required, _ in questions
            ]
        )
    )
    assert [r.verdict for r in answer.responses] == [verdict for *_, verdict in questions]


@pytest.mark.parametrize(
    ("fields", "narrower", "question"),
    [
        ({"scope": pb.SCOPE_WRITE}, {"scope": pb.SCOPE_READ}, {"scope": pb.SCOPE_WRITE}),
        (
            {"permissions": ["orders:*"]},
            {"permissions": ["orders:read"]},
            {"permissions": ["orders:write"]},
        ),
        ({"permissions": ["orders:read"]}, {"permissions": []}, {"permissions": ["orders:read"]}),
        ({}, {"allowed_networks": ["10.0.0.0/8"]}, {"address": "192.0.2.1"}),
        (
            {"allowed_networks": ["10.0.0.0/8", "192.0.2.0/24"]},
            {"allowed_networks": ["10.0.0.0/8"]},
            {"address": "192.0.2.1"},
        ),
    ],
)
async def test_narrowing_and_widening(stub, create, fields, narrower, question):
    """A narrowing Update returns a receipt, and no verify that starts afterwards accepts what it
    took away. The opposite Update needs no receipt and takes effect soon."""
    created = await create(**fields)
    assert await verdict(stub, created.secret, **question) == "VALID"
    (path,) = narrower
    answer = await stub.Update(update(created.token.id, [path], **narrower))
    assert await verdict(stub, created.secret, **question) != "VALID"
    check_receipt(answer.receipt)
    assert await get(stub, created.token.id) == unused(answer.token)
    wider = await stub.Update(update(created.token.id, [path], **fields))
    assert not wider.HasField("receipt")
    await becomes("VALID", stub, created.secret, **question)


async def test_expiry_can_move_both_ways(stub, create):
    """An earlier expiry narrows; a later one revives even an expired token."""
    created = await create()
    assert await verdict(stub, created.secret) == "VALID"
    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    answer = await stub.Update(
        update(created.token.id, ["expire_time"], expire_time=timestamp(soon))
    )
    check_receipt(answer.receipt)
    await becomes("EXPIRED", stub, created.secret)
    assert datetime.now(UTC) >= soon
    answer = await stub.Update(update(created.token.id, ["expire_time"]))
    assert not answer.HasField("receipt")
    assert not answer.token.HasField("expire_time")
    await becomes("VALID", stub, created.secret)


async def test_update_sets_exactly_the_listed_fields(stub, create):
    """Fields outside the mask are ignored, and listed fields that are absent are cleared."""
    created = await create(
        name="old", labels={"a": "1"}, description="old", permissions=["a:b"], scope=pb.SCOPE_WRITE
    )
    answer = await stub.Update(
        update(created.token.id, ["name", "labels"], name=" new ", scope=pb.SCOPE_READ)
    )
    expected = pb.Token()
    expected.CopyFrom(created.token)
    expected.name = "new"
    expected.labels.clear()
    assert answer.token == expected
    assert not answer.HasField("receipt")
    assert await get(stub, created.token.id) == expected
    answer = await stub.Update(update(created.token.id, ["description", "permissions"]))
    expected.description = ""
    expected.ClearField("permissions")
    assert answer.token == expected


async def test_a_repeated_update_has_a_receipt(stub, create):
    """An Update whose response was lost can be repeated: that confirms that it is in effect."""
    created = await create(scope=pb.SCOPE_WRITE)
    request = update(created.token.id, ["scope"], scope=pb.SCOPE_READ)
    first = await stub.Update(request)
    again = await stub.Update(request)
    check_receipt(again.receipt)
    assert again.token == first.token
    assert again.receipt.revision >= first.receipt.revision


@pytest.mark.parametrize(
    ("paths", "fields", "wrong"),
    [
        ([], {}, ["update_mask"]),
        (["id"], {}, ["update_mask"]),
        (["name", "secrets"], {"name": "x"}, ["update_mask"]),
        (["*"], {}, ["update_mask"]),
        (["name"], {}, ["token.name"]),
        (["name"], {"name": "x" * 65}, ["token.name"]),
        (["scope"], {}, ["token.scope"]),
        (["scope"], {"scope": 7}, ["token.scope"]),
        (["expire_time"], {"expire_time": timestamp_pb2.Timestamp(seconds=1)},
         ["token.expire_time"]),
        (["expire_time"], {"expire_time": timestamp_pb2.Timestamp(seconds=1 << 60)},
         ["token.expire_time"]),
        (["labels"], {"labels": {str(n): "" for n in range(17)}}, ["token.labels"]),
        (["description"], {"description": "x" * 257}, ["token.description"]),
        (["description"], {"description": "a\x00"}, ["token.description"]),
        (["allowed_networks"], {"allowed_networks": ["10.0.0.1/8"]}, ["token.allowed_networks[0]"]),
        (["allowed_networks"], {"allowed_networks": ["10.0.0.0/8", "x"]},
         ["token.allowed_networks[1]"]),
        (["allowed_networks"], {"allowed_networks": ["10.0.0.0/255.0.0.0"]},
         ["token.allowed_networks[0]"]),
        (["allowed_networks"], {"allowed_networks": ["10.0.0.0/8"] * 33},
         ["token.allowed_networks"]),
        (["permissions"], {"permissions": ["a:b", "orders"]}, ["token.permissions[1]"]),
        (["permissions"], {"permissions": ["a:" + "b" * 32]}, ["token.permissions[0]"]),
        (["permissions"], {"permissions": ["a:b"] * 65}, ["token.permissions"]),
    ],
)  # fmt: skip
async def test_update_names_the_wrong_field(stub, create, paths, fields, wrong):
    """Invalid masks and values are refused by name, and change nothing."""
    created = await create()
    error = await refusal(stub.Update(update(created.token.id, paths, **fields)))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, wrong)
    assert await get(stub, created.token.id) == created.token


async def test_update_refuses_secrets(stub, create):
    """A secret cannot be stored in a field that everybody sees."""
    created = await create()
    for field in ("name", "description"):
        text = created.secret if field == "description" else created.secret[:64]
        error = await refusal(stub.Update(update(created.token.id, [field], **{field: text})))
        assert error.fields == [f"token.{field}"]
        assert created.secret not in error.text


async def test_disable_and_enable(stub, create):
    """A disabled token is refused at once, repeatedly, and works again after Enable."""
    created = await create()
    named: dict[str, Any] = {"account_id": "acme", "id": created.token.id}
    assert await verdict(stub, created.secret) == "VALID"
    disabled = await stub.Disable(pb.DisableRequest(**named))
    assert await verdict(stub, created.secret) == "DISABLED"
    check_receipt(disabled.receipt)
    assert disabled.token.HasField("disable_time")
    again = await stub.Disable(pb.DisableRequest(**named))
    check_receipt(again.receipt)
    assert unused(again.token) == unused(disabled.token) == await get(stub, created.token.id)
    assert await verdict(stub, created.secret, pb.SCOPE_WRITE) == "DISABLED"
    for _ in range(2):
        enabled = await stub.Enable(pb.EnableRequest(**named))
        assert unused(enabled.token) == created.token
        assert not enabled.HasField("receipt")
    await becomes("VALID", stub, created.secret)


async def test_no_wait(stub, create):
    """With no_wait, a receipt has no effective_time; repeating the call confirms the change."""
    created = await create()
    named: dict[str, Any] = {"account_id": "acme", "id": created.token.id}
    receipt = (await stub.Disable(pb.DisableRequest(**named, no_wait=True))).receipt
    assert receipt.revision
    assert not receipt.HasField("effective_time")
    check_receipt((await stub.Disable(pb.DisableRequest(**named))).receipt)


async def test_changes_of_unknown_tokens(stub, create):
    """A token of another account, or one that was deleted, cannot be changed."""
    other = await create(account_id="other")
    gone = await create()
    await stub.Delete(pb.DeleteRequest(account_id="acme", id=gone.token.id))
    for token_id in (other.token.id, gone.token.id, "tok_never"):
        named: dict[str, Any] = {"account_id": "acme", "id": token_id}
        for call in (
            stub.Update(update(token_id, ["name"], name="x")),
            stub.Disable(pb.DisableRequest(**named)),
            stub.Enable(pb.EnableRequest(**named)),
            stub.Rotate(pb.RotateRequest(**named)),
            stub.RetireSecrets(pb.RetireSecretsRequest(**named)),
        ):
            error = await refusal(call)
            assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "TOKEN_NOT_FOUND")
    assert await verdict(stub, other.secret) == "VALID"


async def test_names(stub, create):
    """Update cannot take the name of another live token, but that of an expired one."""
    first = await create(name="first")
    second = await create(name="second")
    request = update(first.token.id, ["name"], name="SECOND")
    error = await refusal(stub.Update(request))
    assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, "TOKEN_NAME_TAKEN")
    assert (await stub.Update(update(first.token.id, ["name"], name="First"))).token.name == "First"
    soon = timestamp(datetime.now(UTC) + timedelta(seconds=1))
    await stub.Update(update(second.token.id, ["expire_time"], expire_time=soon))
    await becomes("EXPIRED", stub, second.secret)
    assert (await stub.Update(request)).token.name == "SECOND"
    # The expired token has lost its name, and cannot come back under it.
    error = await refusal(stub.Update(update(second.token.id, ["expire_time"])))
    assert error.reason == "TOKEN_NAME_TAKEN"
    answer = await stub.Update(update(second.token.id, ["expire_time", "name"], name="third"))
    assert answer.token.name == "third"


async def test_an_expired_token_does_not_hold_its_name(stub, create):
    """Create may reuse the name of an expired token, which stays in the list."""
    old = await create(name="ci", ttl=duration_pb2.Duration(nanos=200_000_000))
    await becomes("EXPIRED", stub, old.secret)
    new = await create(name="CI")
    assert await verdict(stub, new.secret) == "VALID"
    listed = (await stub.List(pb.ListRequest(account_id="acme"))).tokens
    assert [token.id for token in listed] == [new.token.id, old.token.id]
    # It can still be changed in other ways.
    await stub.Disable(pb.DisableRequest(account_id="acme", id=old.token.id))


async def test_taking_a_name_is_audited(address, stub, create):
    """The expired token has an entry of the call that took its name, by Create or by Update."""
    async with grpc.aio.insecure_channel(address) as channel:
        audit = audit_grpc.AuditServiceStub(channel)
        for method in ("Create", "Update"):
            old = await create(name="ci", ttl=duration_pb2.Duration(nanos=100_000_000))
            await becomes("EXPIRED", stub, old.secret)
            if method == "Create":
                new = await create(name="CI")
            else:
                new = await create(name="other")
                await stub.Update(update(new.token.id, ["name"], name="CI"))
            request = audit_pb.AuditServiceListRequest(
                token_id=old.token.id, outcome=audit_pb.OUTCOME_OK
            )
            (taken, made) = (await audit.List(request)).entries
            assert (taken.method.rpartition("/")[2], taken.reason) == (method, "NAME_FREED")
            assert taken.account_id == "acme"
            assert made.reason == ""
            await stub.Delete(pb.DeleteRequest(account_id="acme", id=new.token.id))


async def test_concurrent_changes_all_count(stub, create):
    """Concurrent Updates of different fields do not undo each other."""
    created = await create()
    token_id = created.token.id
    await asyncio.gather(
        stub.Update(update(token_id, ["name"], name="renamed")),
        stub.Update(update(token_id, ["labels"], labels={"a": "b"})),
        stub.Update(update(token_id, ["description"], description="text")),
        stub.Update(update(token_id, ["permissions"], permissions=["a:b"])),
        stub.Disable(pb.DisableRequest(account_id="acme", id=token_id)),
    )
    token = await get(stub, token_id)
    assert (token.name, dict(token.labels), token.description) == ("renamed", {"a": "b"}, "text")
    assert list(token.permissions) == ["a:b"]
    assert token.HasField("disable_time")


async def test_update_against_delete(stub, create):
    """Of a widening Update and a Delete at the same time, the Delete lasts."""
    for _ in range(5):
        created = await create()
        widen = update(created.token.id, ["scope"], scope=pb.SCOPE_WRITE)
        results = await asyncio.gather(
            stub.Update(widen),
            stub.Delete(pb.DeleteRequest(account_id="acme", id=created.token.id)),
            stub.Update(widen),
            return_exceptions=True,
        )
        assert isinstance(results[1], pb.DeleteResponse)
        assert await verdict(stub, created.secret) == "DELETED"

"""The Client's methods that change tokens, over real gRPC: their requests and results."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import latchkey
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from latchkey import Scope, Secret, SecretOutcome, TokenFilter, TokenOrder, TokenState
from latchkey_proto.v1 import token_service_pb2 as pb

if TYPE_CHECKING:
    from tests.contract.client.conftest import FakeLatchkey

TIME = datetime(2030, 1, 2, tzinfo=UTC)
STAMP = Timestamp(seconds=int(TIME.timestamp()))
RECEIPT = pb.Receipt(commit_time=STAMP, effective_time=STAMP, revision=9, mark=3)


async def test_tokens_have_all_fields_of_the_contract(
    client: latchkey.Client, fake: FakeLatchkey
) -> None:
    """Each field of a token and of its secrets is converted."""
    secrets = [
        pb.TokenSecret(hint="lk_…new1", create_time=STAMP, retire_on_first_use=True),
        pb.TokenSecret(hint="lk_…old1", create_time=STAMP, expire_time=STAMP, last_used_time=STAMP),
    ]
    message = fake.token(
        secrets=secrets,
        last_used_by="shop",
        description="For the nightly export.\nAsk Ann.",
        disable_time=STAMP,
        allowed_networks=["192.0.2.0/24", "2001:db8::/32"],
        permissions=["orders:*", "users:read"],
    )
    fake.on("Get", fake.says(pb.GetResponse(token=message)))
    token = await client.get("acme", "t1")
    assert token.secrets == (
        latchkey.TokenSecret(hint="lk_…new1", create_time=TIME, retire_on_first_use=True),
        latchkey.TokenSecret(
            hint="lk_…old1", create_time=TIME, expire_time=TIME, last_used_time=TIME
        ),
    )
    assert token.last_used_by == "shop"
    assert token.description == "For the nightly export.\nAsk Ann."
    assert token.disable_time == TIME
    assert token.allowed_networks == ("192.0.2.0/24", "2001:db8::/32")
    assert token.permissions == ("orders:*", "users:read")


async def test_create_with_restrictions(
    client: latchkey.Client, fake: FakeLatchkey, secret: str
) -> None:
    """Create sends description, networks and permissions. A repeated one has a receipt."""
    answer = pb.CreateResponse(token=fake.token(), secret=secret, receipt=RECEIPT)
    fake.on("Create", fake.says(answer))
    created = await client.create(
        "acme",
        "ci",
        Scope.READ,
        description="why",
        allowed_networks=["192.0.2.1"],
        permissions={"orders:read"},
    )
    assert created.receipt is not None
    assert created.receipt.revision == 9
    (call,) = fake.calls
    assert call.request == pb.CreateRequest(
        account_id="acme",
        name="ci",
        scope=pb.SCOPE_READ,
        description="why",
        allowed_networks=["192.0.2.1"],
        permissions=["orders:read"],
        request_id=call.request.request_id,
    )


@pytest.mark.parametrize(
    ("arguments", "token", "path"),
    [
        ({"name": "x"}, pb.Token(name="x"), "name"),
        ({"scope": Scope.WRITE}, pb.Token(scope=pb.SCOPE_WRITE), "scope"),
        ({"expire_time": TIME}, pb.Token(expire_time=STAMP), "expire_time"),
        ({"expire_time": None}, pb.Token(), "expire_time"),
        ({"labels": {"a": "b"}}, pb.Token(labels={"a": "b"}), "labels"),
        ({"labels": {}}, pb.Token(), "labels"),
        ({"description": ""}, pb.Token(), "description"),
        (
            {"allowed_networks": ["192.0.2.0/24"]},
            pb.Token(allowed_networks=["192.0.2.0/24"]),
            "allowed_networks",
        ),
        ({"allowed_networks": ()}, pb.Token(), "allowed_networks"),
        ({"permissions": ["a:b"]}, pb.Token(permissions=["a:b"]), "permissions"),
    ],
)
async def test_update_sends_only_what_was_given(
    client: latchkey.Client,
    fake: FakeLatchkey,
    arguments: dict[str, Any],
    token: pb.Token,
    path: str,
) -> None:
    """Exactly the given fields are in the mask, including those that are cleared."""
    fake.on("Update", fake.says(pb.UpdateResponse(token=fake.token())))
    change = await client.update("acme", "t1", **arguments)
    assert change == latchkey.Change(token=change.token, receipt=None)
    assert fake.calls[0].request == pb.UpdateRequest(
        account_id="acme", id="t1", token=token, update_mask=FieldMask(paths=[path])
    )


async def test_update_of_all_fields(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """An Update may change every field that the mask can list, and returns its receipt."""
    fake.on("Update", fake.says(pb.UpdateResponse(token=fake.token(), receipt=RECEIPT)))
    change = await client.update(
        "acme",
        "t1",
        name="n",
        scope=Scope.READ,
        expire_time=TIME,
        labels={},
        description="d",
        allowed_networks=[],
        permissions=[],
        no_wait=True,
    )
    assert change.receipt is not None
    assert (change.receipt.revision, change.receipt.effective_time) == (9, TIME)
    request = fake.calls[0].request
    assert request.no_wait
    assert set(request.update_mask.paths) == {
        *("name", "scope", "expire_time", "labels", "description"),
        *("allowed_networks", "permissions"),
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"expire_time": TIME.replace(tzinfo=None)},
        {"name": "\ud800"},
        {"labels": {"a": "\udcff"}},
        {"scope": Scope.UNSPECIFIED},
        {"permissions": "orders:read"},
        {"allowed_networks": "192.0.2.0/24"},
    ],
)
async def test_an_update_that_makes_no_sense_is_not_sent(
    client: latchkey.Client, fake: FakeLatchkey, arguments: dict[str, Any]
) -> None:
    """Without a field, or with a value that no request can carry, InvalidArgument is raised."""
    with pytest.raises(latchkey.InvalidArgument):
        await client.update("acme", "t1", **arguments)
    assert fake.calls == []


@pytest.mark.parametrize("scope", [None, "read"])
async def test_update_requires_a_scope_or_none_given(client: latchkey.Client, scope: Any) -> None:
    """A scope cannot be cleared."""
    with pytest.raises(TypeError):
        await client.update("acme", "t1", scope=scope)


async def test_disable_enable_and_retire(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """Each returns the token, and its receipt if it has one."""
    token = fake.token(disable_time=STAMP)
    fake.on("Disable", fake.says(pb.DisableResponse(token=token, receipt=RECEIPT)))
    fake.on("Enable", fake.says(pb.EnableResponse(token=fake.token())))
    fake.on("RetireSecrets", fake.says(pb.RetireSecretsResponse(token=token, receipt=RECEIPT)))
    disabled = await client.disable("acme", "t1", no_wait=True)
    assert disabled.token.disable_time == TIME
    assert disabled.receipt is not None
    enabled = await client.enable("acme", "t1")
    assert (enabled.token.disable_time, enabled.receipt) == (None, None)
    assert (await client.retire_secrets("acme", "t1")).receipt == disabled.receipt
    assert [call.request for call in fake.calls] == [
        pb.DisableRequest(account_id="acme", id="t1", no_wait=True),
        pb.EnableRequest(account_id="acme", id="t1"),
        pb.RetireSecretsRequest(account_id="acme", id="t1"),
    ]


async def test_rotate_returns_a_redacted_secret(
    client: latchkey.Client, fake: FakeLatchkey, secret: str
) -> None:
    """Rotate returns the new secret, which cannot be printed. No grace differs from a grace of 0
    only by the first use."""
    answer = pb.RotateResponse(token=fake.token(), secret=secret, receipt=RECEIPT)
    fake.on("Rotate", fake.says(answer))
    rotated = await client.rotate("acme", "t1", grace=timedelta(days=7), retire_on_first_use=True)
    assert rotated.secret == Secret(secret)
    assert secret not in repr(rotated)
    assert rotated.receipt is not None
    await client.rotate("acme", "t1")
    await client.rotate("acme", "t1", grace=timedelta(0))
    first, second, third = [call.request for call in fake.calls]
    assert first.grace.ToTimedelta() == timedelta(days=7)
    assert first.retire_on_first_use
    assert not second.HasField("grace")
    assert third.HasField("grace")


async def test_too_many_secrets(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """A rotation that the token's state does not allow raises FailedPrecondition at once."""
    info = error_details_pb2.ErrorInfo(reason="TOO_MANY_SECRETS", domain="latchkey")
    fake.on("Rotate", fake.fails(grpc.StatusCode.FAILED_PRECONDITION, "6 secrets", info))
    with pytest.raises(latchkey.FailedPrecondition, match=r"retire_secrets\(\)") as caught:
        await client.rotate("acme", "t1")
    assert caught.value.reason == "TOO_MANY_SECRETS"
    assert fake.count("Rotate") == 1


async def test_revoke_reports_each_secret(
    client: latchkey.Client, fake: FakeLatchkey, secret: str
) -> None:
    """The outcomes come in the order of the secrets. One that is not known becomes UNSPECIFIED."""
    results = [pb.RevokeSecretResult() for _ in range(5)]
    for number, result in enumerate(results, start=1):
        result.outcome = number if number < 5 else 77  # type: ignore[assignment]  # a newer server
    fake.on("RevokeSecret", fake.says(pb.RevokeSecretResponse(results=results, receipt=RECEIPT)))
    revocation = await client.revoke_secrets([Secret(secret), "x", "\ud800", "", "y"], no_wait=True)
    assert revocation.outcomes == (
        *(SecretOutcome.ENDED, SecretOutcome.ENDED_BEFORE),
        *(SecretOutcome.UNKNOWN, SecretOutcome.MALFORMED, SecretOutcome.UNSPECIFIED),
    )
    assert revocation.receipt is not None
    assert fake.calls[0].request == pb.RevokeSecretRequest(
        secrets=[secret, "x", "", "", "y"], no_wait=True
    )


async def test_revoke_without_a_known_secret(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """If no secret belongs to a token, there is nothing to prove."""
    result = pb.RevokeSecretResult(outcome=pb.SECRET_OUTCOME_UNKNOWN)
    fake.on("RevokeSecret", fake.says(pb.RevokeSecretResponse(results=[result])))
    revocation = await client.revoke_secrets(["x"])
    assert revocation == latchkey.Revocation(outcomes=(SecretOutcome.UNKNOWN,), receipt=None)
    with pytest.raises(latchkey.InternalError):
        await client.revoke_secrets(["x", "y"])
    with pytest.raises(latchkey.InvalidArgument):
        await client.revoke_secrets("x")


async def test_delete_all_sends_its_filter(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """Each field of the filter is sent, and each field of the answer is converted."""
    answer = pb.DeleteAllResponse(count=1000, receipt=RECEIPT, more=True)
    fake.on("DeleteAll", fake.says(answer))
    deletions = await client.delete_all(
        "acme",
        TokenFilter(
            scope=Scope.WRITE,
            name_contains="ci",
            labels={"team": "core"},
            state=TokenState.DISABLED,
            expires_before=TIME,
            unused_since=TIME,
            can_write=False,
            ids=("t1", "t2"),
            search="abcd",
            never_used=True,
            never_expires=False,
            secret_created_before=TIME,
            leaked=True,
        ),
        no_wait=True,
    )
    assert (deletions.count, deletions.tokens, deletions.more) == (1000, (), True)
    assert deletions.receipt is not None
    assert fake.calls[0].request == pb.DeleteAllRequest(
        account_id="acme",
        filter=pb.TokenFilter(
            scope=pb.SCOPE_WRITE,
            name_contains="ci",
            label={"team": "core"},
            state=pb.TOKEN_STATE_DISABLED,
            expires_before=STAMP,
            unused_since=STAMP,
            can_write=False,
            ids=["t1", "t2"],
            search="abcd",
            never_used=True,
            never_expires=False,
            secret_created_before=STAMP,
            leaked=True,
        ),
        no_wait=True,
    )
    # No field of the contract is left out.
    assert len(fake.calls[0].request.filter.ListFields()) == len(pb.TokenFilter.DESCRIPTOR.fields)


async def test_delete_all_dry_run(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """A dry run lists tokens and has no receipt. The empty filter sends no field."""
    fake.on("DeleteAll", fake.says(pb.DeleteAllResponse(count=700, tokens=[fake.token("t3")])))
    deletions = await client.delete_all("acme", dry_run=True)
    assert deletions.count == 700
    assert [token.id for token in deletions.tokens] == ["t3"]
    assert (deletions.receipt, deletions.more) == (None, False)
    request = fake.calls[0].request
    assert request.dry_run
    assert request.filter == pb.TokenFilter()
    for wrong in (
        TokenFilter(expires_before=TIME.replace(tzinfo=None)),
        TokenFilter(name_contains="\ud800"),
        TokenFilter(scope=Scope.UNSPECIFIED),
        # Every token would match.
        TokenFilter(ids=()),
    ):
        with pytest.raises(latchkey.InvalidArgument):
            await client.delete_all("acme", wrong)


def test_enums_cover_the_contract() -> None:
    """The library has a member for every outcome, state and order of the contract."""
    orders = {f"TOKEN_ORDER_{order.name}" for order in TokenOrder}
    assert orders | {"TOKEN_ORDER_UNSPECIFIED"} == set(pb.TokenOrder.keys())
    outcomes = {f"SECRET_OUTCOME_{outcome.name}" for outcome in SecretOutcome}
    assert outcomes == set(pb.SecretOutcome.keys())
    states = {f"TOKEN_STATE_{state.name}" for state in TokenState}
    assert states == set(pb.TokenState.keys()) - {"TOKEN_STATE_UNSPECIFIED"}

"""The longest lifetime of tokens, by setting and policy, in a running service."""

import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2
from google.rpc import error_details_pb2, status_pb2
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.settings.settings import Settings

from tests.helpers.callers import credential, policy_text
from tests.helpers.rich_status import refusal
from tests.helpers.servers import make_settings, serving

DAY = 86_400


@pytest.fixture(params=["native", "grpcio"])
def settings(
    request: pytest.FixtureRequest, database_url: str, pepper_file: Path, tmp_path: Path
) -> Settings:
    """At most 90 days for all, 30 for one account, and a manager with at most 60 days."""
    policy = tmp_path / "policy.toml"
    text = policy_text(["manager", "acmes-manager", "importer"])
    policy.write_text(
        text.replace("[callers.acmes-manager]", '[callers.acmes-manager]\nmax_ttl = "60d"')
        + '[accounts."globex*"]\nmax_ttl = "30d"\n'
    )
    made = make_settings(database_url, pepper_file, request.param)
    return made.model_copy(update={"policy": policy, "max_ttl": "90d"})


@pytest.fixture
async def stub(settings: Settings) -> AsyncIterator[Any]:
    async with serving(settings) as address, grpc.aio.insecure_channel(address) as channel:
        yield pb_grpc.TokenServiceStub(channel)


def as_(caller: str) -> Any:
    return {"metadata": (("authorization", f"Bearer {credential(caller)}"),), "timeout": 9}


def days(number: float) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=int(number * DAY))


def moment(number: float) -> timestamp_pb2.Timestamp:
    made = timestamp_pb2.Timestamp()
    made.FromDatetime(datetime.now(UTC) + timedelta(days=number))
    return made


def create(account: str = "acme", **fields: Any) -> pb.CreateRequest:
    return pb.CreateRequest(account_id=account, name="n", scope=pb.SCOPE_READ, **fields)


async def refused(call: Any) -> tuple[str, list[str], str]:
    """Return the reason, the fields and the limit of a refused call."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    metadata: Any = dict(tuple(caught.value.trailing_metadata() or ()))
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    fields = [violation.field for violation in bad.field_violations]
    return info.reason, fields, info.metadata.get("max_ttl_seconds", "")


async def test_create_within_the_strictest_limit(stub: Any) -> None:
    """The setting, the caller's limit and the account's limit all apply to Create, for a duration
    as for a time. GetLimits returns what applies."""
    for caller, account, limit in (
        ("manager", "acme", 90),
        ("acmes-manager", "acme", 60),
        ("manager", "globex-eu", 30),
    ):
        found = await stub.GetLimits(pb.GetLimitsRequest(account_id=account), **as_(caller))
        assert (found.max_ttl.seconds, found.require_expiry) == (limit * DAY, True)
        seconds = str(limit * DAY)
        for fields, answer in (
            ({}, ("EXPIRY_REQUIRED", ["expire_time"], seconds)),
            ({"ttl": days(limit + 1)}, ("EXPIRY_TOO_LATE", ["ttl"], seconds)),
            ({"expire_time": moment(limit + 1)}, ("EXPIRY_TOO_LATE", ["expire_time"], seconds)),
        ):
            assert await refused(stub.Create(create(account, **fields), **as_(caller))) == answer
        for fields in ({"ttl": days(limit)}, {"expire_time": moment(limit)}):
            made = await stub.Create(create(account, **fields), **as_(caller))
            named = pb.DeleteRequest(account_id=account, id=made.token.id)
            await stub.Delete(named, **as_(caller))


async def test_update_and_rotate_within_the_limit(stub: Any) -> None:
    """An Update of the expiry, and the grace of a Rotate, have the same limit. Other changes to a
    token that lives longer, because it is older than the limit, stay possible."""
    made = await stub.Create(create(ttl=days(90)), **as_("manager"))

    def update(path: str, caller: str = "acmes-manager", **fields: Any) -> Any:
        request = pb.UpdateRequest(
            account_id="acme",
            id=made.token.id,
            token=pb.Token(**fields),
            update_mask=field_mask_pb2.FieldMask(paths=[path]),
        )
        return stub.Update(request, **as_(caller))

    limit = str(60 * DAY)
    late = update("expire_time", expire_time=moment(61))
    assert await refused(late) == ("EXPIRY_TOO_LATE", ["token.expire_time"], limit)
    assert await refused(update("expire_time")) == (
        "EXPIRY_REQUIRED",
        ["token.expire_time"],
        limit,
    )
    await update("name", name="renamed")
    await update("expire_time", expire_time=moment(60))

    def rotate(grace: float) -> Any:
        request = pb.RotateRequest(account_id="acme", id=made.token.id, grace=days(grace))
        return stub.Rotate(request, **as_("acmes-manager"))

    assert await refused(rotate(61)) == ("EXPIRY_TOO_LATE", ["grace"], limit)
    await rotate(60)


async def test_import_within_the_limit(stub: Any) -> None:
    """Imported tokens have the limit of their accounts, and a row beyond it is refused alone."""

    def row(name: str, account: str, **fields: Any) -> pb.ImportedToken:
        return pb.ImportedToken(
            account_id=account,
            name=name,
            scope=pb.SCOPE_READ,
            secret_sha256=os.urandom(32),
            **fields,
        )

    rows = [
        row("never", "acme"),
        row("late", "globex", expire_time=moment(31)),
        row("good", "globex", expire_time=moment(30)),
        row("longer", "acme", expire_time=moment(90)),
    ]
    response = await stub.Import(pb.ImportRequest(tokens=rows), **as_("importer"))
    invalid, imported = pb.IMPORT_OUTCOME_INVALID, pb.IMPORT_OUTCOME_IMPORTED
    assert [r.outcome for r in response.results] == [invalid, invalid, imported, imported]
    (violation,) = response.results[1].field_violations
    assert violation.field == "expire_time"
    assert "at most 30 days" in violation.description


async def test_other_mistakes_are_reported_too(stub: Any) -> None:
    """A request with several mistakes gets all of them at once; one with an invalid expiry is not
    blamed for the limit."""
    found = await refusal(stub.Create(create("acme", labels={"": ""}), **as_("manager")))
    assert set(found.fields) == {"labels", "expire_time"}
    negative = await refused(stub.Create(create(ttl=days(-1)), **as_("manager")))
    assert negative == ("INVALID_ARGUMENT", ["ttl"], "")


async def test_limits_without_settings(address: str) -> None:
    """Without a limit, tokens may live for ever, and GetLimits says so."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = pb_grpc.TokenServiceStub(channel)
        found = await stub.GetLimits(pb.GetLimitsRequest(account_id="acme"), timeout=9)
        assert (found.HasField("max_ttl"), found.require_expiry) == (False, False)

"""The secrets of a token as any client sees them, over each transport: Rotate, RetireSecrets,
RevokeSecret, ReportSecret, and requests with an id."""

import asyncio
import uuid
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.test_changes import becomes, check_receipt, get, unused, update, verdict
from tests.helpers.rich_status import refusal
from tests.helpers.waiting import eventually

HOUR = duration_pb2.Duration(seconds=3600)


def rotate(token_id, **fields):
    return pb.RotateRequest(account_id="acme", id=token_id, **fields)


def retire(token_id):
    return pb.RetireSecretsRequest(account_id="acme", id=token_id)


async def test_rotate_replaces_the_secret_at_once(stub, create):
    """Without a grace, the old secret is dead when Rotate returns. Token and name stay."""
    created = await create(labels={"a": "b"})
    assert await verdict(stub, created.secret) == "VALID"
    rotated = await stub.Rotate(rotate(created.token.id))
    assert await verdict(stub, created.secret) == "EXPIRED"
    assert await verdict(stub, rotated.secret) == "VALID"
    check_receipt(rotated.receipt)
    assert rotated.secret != created.secret
    assert rotated.token.hint == f"lk_…{rotated.secret[-4:]}"
    assert [secret.hint for secret in rotated.token.secrets] == [rotated.token.hint]
    assert (rotated.token.id, rotated.token.name) == (created.token.id, created.token.name)
    assert await get(stub, created.token.id) == rotated.token
    answer = await stub.Verify(pb.VerifyRequest(secret=created.secret))
    assert answer.token.id == created.token.id


async def test_grace(stub, create):
    """During the grace both secrets work; afterwards the old one is EXPIRED, from a cache too."""
    created = await create()
    assert await verdict(stub, created.secret) == "VALID"
    grace = duration_pb2.Duration(nanos=600_000_000)
    rotated = await stub.Rotate(rotate(created.token.id, grace=grace))
    newest, oldest = rotated.token.secrets
    assert [newest.hint, oldest.hint] == [rotated.token.hint, created.token.hint]
    assert not newest.HasField("expire_time")
    answer = await stub.Verify(pb.VerifyRequest(secret=created.secret))
    if answer.verdict == pb.VERDICT_VALID:
        assert answer.token.expire_time == oldest.expire_time
    await becomes("EXPIRED", stub, created.secret)
    assert await verdict(stub, created.secret) == "EXPIRED"
    assert await verdict(stub, rotated.secret) == "VALID"
    assert len((await get(stub, created.token.id)).secrets) == 1


async def test_a_later_grace_never_extends_an_earlier_one(stub, create):
    """Rotating again with a longer grace leaves the end of the oldest secret as it is."""
    created = await create()
    short, long = duration_pb2.Duration(seconds=60), HOUR
    first = await stub.Rotate(rotate(created.token.id, grace=short))
    second = await stub.Rotate(rotate(created.token.id, grace=long))
    assert second.token.secrets[2].expire_time == first.token.secrets[1].expire_time
    assert second.token.secrets[1].expire_time.seconds > first.token.secrets[1].expire_time.seconds


async def test_retire_secrets(stub, create):
    """RetireSecrets ends all secrets but the newest, at once and repeatably."""
    created = await create()
    secrets = [created.secret]
    for _ in range(3):
        rotated = await stub.Rotate(rotate(created.token.id, grace=HOUR))
        secrets.append(rotated.secret)
    assert {await verdict(stub, secret) for secret in secrets} == {"VALID"}
    retired = await stub.RetireSecrets(retire(created.token.id))
    assert [await verdict(stub, s) for s in secrets] == ["EXPIRED"] * 3 + ["VALID"]
    check_receipt(retired.receipt)
    assert len(retired.token.secrets) == 1
    again = await stub.RetireSecrets(retire(created.token.id))
    check_receipt(again.receipt)
    assert unused(again.token) == unused(retired.token) == await get(stub, created.token.id)


async def test_at_most_five_secrets(stub, create):
    """A sixth secret that works is refused; a rotation that leaves five is not."""
    created = await create()
    for _ in range(4):
        await stub.Rotate(rotate(created.token.id, grace=HOUR))
    error = await refusal(stub.Rotate(rotate(created.token.id, grace=HOUR)))
    assert (error.code, error.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "TOO_MANY_SECRETS",
    )
    assert len((await get(stub, created.token.id)).secrets) == 5
    await stub.Rotate(rotate(created.token.id))
    assert len((await get(stub, created.token.id)).secrets) == 1


async def test_repeated_requests_make_at_most_five_secrets(stub, create):
    """A repeated Rotate replaces the secret that nobody received. If that secret has been retired
    meanwhile, the new one counts like any other."""
    created = await create()
    requests = [str(uuid.uuid4()) for _ in range(6)]
    for request in requests:
        await stub.Rotate(rotate(created.token.id, request_id=request))
    codes = []
    for request in requests:
        try:
            await stub.Rotate(rotate(created.token.id, request_id=request))
            codes.append("OK")
        except grpc.aio.AioRpcError as error:
            codes.append(error.code().name)
    assert set(codes) == {"OK", "FAILED_PRECONDITION"}
    token = (await stub.Get(pb.GetRequest(account_id="acme", id=created.token.id))).token
    assert len(token.secrets) <= 5


async def test_retire_on_first_use(stub, create):
    """The old secret works until the new one is verified for the first time, and then ends."""
    created = await create()
    rotated = await stub.Rotate(rotate(created.token.id, retire_on_first_use=True))
    assert rotated.token.secrets[0].retire_on_first_use
    assert await verdict(stub, created.secret) == "VALID"
    assert await verdict(stub, rotated.secret) == "VALID"

    async def ended() -> bool:
        return await verdict(stub, created.secret) == "EXPIRED"

    await eventually(ended, "the older secret ends")
    assert await verdict(stub, rotated.secret) == "VALID"
    assert len((await get(stub, created.token.id)).secrets) == 1


async def test_a_refused_verify_is_not_the_first_use(stub, create):
    """A verify of the new secret that is not answered VALID leaves the old one as it is, and does
    not hide the first use that follows."""
    created = await create(scope=pb.SCOPE_READ)
    rotated = await stub.Rotate(rotate(created.token.id, retire_on_first_use=True))

    def retiring() -> bool:
        # The server runs in this process.
        return any(task.get_name() == "retire older secrets" for task in asyncio.all_tasks())

    for _ in range(3):
        refused = pb.VerifyRequest(secret=rotated.secret, required_scope=pb.SCOPE_WRITE)
        answer = await stub.Verify(refused)
        assert not retiring()
        assert answer.verdict == pb.VERDICT_INSUFFICIENT_SCOPE
        assert answer.token.id == created.token.id
        assert (answer.revision, answer.mark) == (0, 0)
    assert await verdict(stub, created.secret) == "VALID"
    assert len((await get(stub, created.token.id)).secrets) == 2
    assert await verdict(stub, rotated.secret) == "VALID"
    await becomes("EXPIRED", stub, created.secret)
    assert await verdict(stub, rotated.secret) == "VALID"


async def test_delete_ends_all_secrets(stub, create):
    """Deleting a token ends every secret of it."""
    created = await create()
    rotated = await stub.Rotate(rotate(created.token.id, grace=HOUR))
    assert await verdict(stub, created.secret) == await verdict(stub, rotated.secret) == "VALID"
    await stub.Delete(pb.DeleteRequest(account_id="acme", id=created.token.id))
    for secret in (created.secret, rotated.secret):
        assert await verdict(stub, secret) == "DELETED"


async def test_rotations_and_retirements_at_once(stub, create):
    """After concurrent calls in any order, exactly the secrets that Get shows work."""
    created = await create()
    results = await asyncio.gather(
        *(stub.Rotate(rotate(created.token.id, grace=HOUR)) for _ in range(4)),
        *(stub.RetireSecrets(retire(created.token.id)) for _ in range(3)),
    )
    secrets = [created.secret] + [r.secret for r in results if isinstance(r, pb.RotateResponse)]
    shown = {secret.hint for secret in (await get(stub, created.token.id)).secrets}
    working = {s for s in secrets if await verdict(stub, s) == "VALID"}
    assert {f"lk_…{secret[-4:]}" for secret in working} == shown
    assert 1 <= len(working) <= 5


@pytest.mark.parametrize("grace", [-1, 366 * 86_400])
async def test_bad_grace(stub, create, grace):
    """A grace must be 0 to 365 days."""
    created = await create()
    request = rotate(created.token.id, grace=duration_pb2.Duration(seconds=grace))
    assert (await refusal(stub.Rotate(request))).fields == ["grace"]


async def test_a_repeated_create_returns_the_same_token(stub):
    """A retry of Create with its request id returns the same token with a new secret, and the first
    secret, which nobody received, is dead."""
    request = pb.CreateRequest(
        account_id="acme", name="once", scope=pb.SCOPE_READ, request_id=str(uuid.uuid4())
    )
    first = await stub.Create(request)
    assert not first.HasField("receipt")
    assert await verdict(stub, first.secret) == "VALID"
    second = await stub.Create(request)
    assert await verdict(stub, first.secret) == "EXPIRED"
    assert await verdict(stub, second.secret) == "VALID"
    check_receipt(second.receipt)
    assert second.token.id == first.token.id
    assert len((await stub.List(pb.ListRequest(account_id="acme"))).tokens) == 1


async def test_concurrent_retries_leave_one_secret(stub):
    """Of concurrent Creates with one request id, exactly one of the returned secrets works."""
    request = pb.CreateRequest(
        account_id="acme", name="once", scope=pb.SCOPE_READ, request_id=str(uuid.uuid4())
    )
    answers = await asyncio.gather(*(stub.Create(request) for _ in range(6)))
    assert len({answer.token.id for answer in answers}) == 1
    verdicts = [await verdict(stub, answer.secret) for answer in answers]
    assert sorted(verdicts) == ["EXPIRED"] * 5 + ["VALID"]


async def test_concurrent_rotations_with_one_id_leave_one_secret(stub, create):
    """The same holds for Rotate, and the secret before the rotation keeps its grace."""
    created = await create()
    request = rotate(created.token.id, grace=HOUR, request_id=str(uuid.uuid4()))
    answers = await asyncio.gather(*(stub.Rotate(request) for _ in range(5)))
    verdicts = [await verdict(stub, answer.secret) for answer in answers]
    assert sorted(verdicts) == ["EXPIRED"] * 4 + ["VALID"]
    assert await verdict(stub, created.secret) == "VALID"
    assert len((await get(stub, created.token.id)).secrets) == 2


async def test_a_request_id_stands_for_one_request(stub, create):
    """The id of a request cannot be used for another body or method; another account's ids are
    separate."""
    request_id = str(uuid.uuid4())
    fields: dict[str, Any] = {"name": "one", "scope": pb.SCOPE_READ, "request_id": request_id}
    created = await stub.Create(pb.CreateRequest(account_id="acme", **fields))
    other = await create()
    for call in (
        stub.Create(pb.CreateRequest(account_id="acme", **(fields | {"name": "two"}))),
        stub.Create(pb.CreateRequest(account_id="acme", **(fields | {"scope": pb.SCOPE_WRITE}))),
        stub.Rotate(rotate(other.token.id, request_id=request_id)),
    ):
        error = await refusal(call)
        assert (error.code, error.reason) == (
            grpc.StatusCode.ALREADY_EXISTS,
            "REQUEST_ID_REUSED",
        )
    assert await verdict(stub, created.secret) == await verdict(stub, other.secret) == "VALID"
    await stub.Create(pb.CreateRequest(account_id="other", **fields))


async def test_a_refused_request_does_not_use_its_id(stub, create):
    """If Create fails because the name is taken, its request id can be used again."""
    taken = await create(name="taken")
    request = pb.CreateRequest(
        account_id="acme", name="taken", scope=pb.SCOPE_READ, request_id=str(uuid.uuid4())
    )
    assert (await refusal(stub.Create(request))).reason == "TOKEN_NAME_TAKEN"
    await stub.Delete(pb.DeleteRequest(account_id="acme", id=taken.token.id))
    first = await stub.Create(request)
    assert await verdict(stub, first.secret) == "VALID"


async def test_a_retry_after_the_deletion(stub):
    """A retry does not bring back a token that was deleted meanwhile."""
    request = pb.CreateRequest(
        account_id="acme", name="once", scope=pb.SCOPE_READ, request_id=str(uuid.uuid4())
    )
    created = await stub.Create(request)
    await stub.Delete(pb.DeleteRequest(account_id="acme", id=created.token.id))
    error = await refusal(stub.Create(request))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "TOKEN_NOT_FOUND")


@pytest.mark.parametrize(
    "request_id",
    [
        "x",
        "00000000-0000-0000-0000-000000000000",
        "{0c8a69dc-a7f8-40b0-99ba-8659f4d70d56}",
    ],
)
async def test_bad_request_id(stub, create, request_id):
    """A request id must be a UUID in its usual form."""
    request = pb.CreateRequest(
        account_id="acme", name="n", scope=pb.SCOPE_READ, request_id=request_id
    )
    assert (await refusal(stub.Create(request))).fields == ["request_id"]
    created = await create()
    error = await refusal(stub.Rotate(rotate(created.token.id, request_id=request_id)))
    assert error.fields == ["request_id"]


def outcomes(answer):
    return [
        pb.SecretOutcome.Name(result.outcome).removeprefix("SECRET_OUTCOME_")
        for result in answer.results
    ]


async def test_revoke_secrets(stub, create):
    """RevokeSecret ends exactly the secrets it is given, of any account, and says what it did. The
    answer does not reveal account or name."""
    one, two = await create(account_id="acme"), await create(account_id="other")
    rotated = await stub.Rotate(rotate(one.token.id, grace=HOUR))
    dead = await create()
    await stub.Delete(pb.DeleteRequest(account_id="acme", id=dead.token.id))
    for secret in (one.secret, two.secret, rotated.secret):
        assert await verdict(stub, secret) == "VALID"
    unknown = one.secret[:10] + ("y" if one.secret[10] == "x" else "x") + one.secret[11:]
    given = [one.secret, "nonsense", two.secret, dead.secret, one.secret, "", unknown]
    answer = await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=given))
    assert await verdict(stub, one.secret) == await verdict(stub, two.secret) == "EXPIRED"
    assert await verdict(stub, rotated.secret) == "VALID"
    assert outcomes(answer) == [
        *("ENDED", "MALFORMED", "ENDED", "ENDED_BEFORE", "ENDED", "MALFORMED", "MALFORMED")
    ]
    check_receipt(answer.receipt)
    assert "acme" not in str(answer)
    again = await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=given[:3]))
    assert outcomes(again) == ["ENDED_BEFORE", "MALFORMED", "ENDED_BEFORE"]
    check_receipt(again.receipt)
    # The owner can rotate a token whose only secret was revoked.
    shown = (await stub.Get(pb.GetRequest(account_id="other", id=two.token.id))).token.secrets
    assert len(shown) == 1
    assert shown[0].HasField("expire_time")
    fresh = await stub.Rotate(pb.RotateRequest(account_id="other", id=two.token.id))
    assert await verdict(stub, fresh.secret) == "VALID"


async def test_report_secrets(stub, create, address):
    """ReportSecret marks exactly the working secrets it is given, ends none, and keeps the first
    time. Each token gets one audit entry, under its own account."""
    one, two = await create(account_id="acme"), await create(account_id="other")
    rotated = await stub.Rotate(rotate(one.token.id, grace=HOUR))
    dead = await create()
    await stub.Delete(pb.DeleteRequest(account_id="acme", id=dead.token.id))
    given = [one.secret, "nonsense", two.secret, dead.secret, one.secret, ""]
    answer = await stub.ReportSecret(pb.ReportSecretRequest(secrets=given))
    assert outcomes(answer) == [
        *("REPORTED", "MALFORMED", "REPORTED", "ENDED_BEFORE", "REPORTED", "MALFORMED")
    ]
    for secret in (one.secret, two.secret, rotated.secret):
        assert await verdict(stub, secret) == "VALID"
    get = pb.GetRequest(account_id="acme", id=one.token.id)
    shown = (await stub.Get(get)).token.secrets
    assert [secret.HasField("leak_report_time") for secret in shown] == [False, True]
    await stub.ReportSecret(pb.ReportSecretRequest(secrets=given))
    again = (await stub.Get(get)).token.secrets
    assert again[1].leak_report_time == shown[1].leak_report_time
    async with grpc.aio.insecure_channel(address) as channel:
        page = await audit_pb_grpc.AuditServiceStub(channel).List(
            audit_pb.AuditServiceListRequest(method="/latchkey.v1.TokenService/ReportSecret")
        )
    ours = {one.token.id, two.token.id}
    entries = [(e.account_id, e.token_id) for e in page.entries if e.token_id in ours]
    assert sorted(entries) == [("acme", one.token.id), ("other", two.token.id)]
    # The mark disappears with the secret that leaked.
    retired = await stub.RetireSecrets(pb.RetireSecretsRequest(account_id="acme", id=one.token.id))
    assert not any(secret.HasField("leak_report_time") for secret in retired.token.secrets)


async def test_a_leak_outlives_an_expiry(stub, create):
    """An owner can prolong an expired token, so a report of its secret marks it, and RevokeSecret
    ends it. Both say so."""
    ttl = duration_pb2.Duration(nanos=100_000_000)
    reported, revoked = await create(ttl=ttl), await create(ttl=ttl)
    for created in (reported, revoked):
        await becomes("EXPIRED", stub, created.secret)
    answer = await stub.ReportSecret(pb.ReportSecretRequest(secrets=[reported.secret]))
    assert outcomes(answer) == ["REPORTED"]
    answer = await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=[revoked.secret]))
    assert outcomes(answer) == ["ENDED"]
    for created, prolonged in ((reported, "VALID"), (revoked, "EXPIRED")):
        update = pb.UpdateRequest(account_id="acme", id=created.token.id)
        update.update_mask.paths.append("expire_time")
        token = (await stub.Update(update)).token
        assert token.secrets[0].HasField("leak_report_time")
        await becomes(prolonged, stub, created.secret)


async def test_a_revoked_secret_is_marked_as_leaked(stub, create):
    """RevokeSecret sets the mark too, until a rotation replaces the secret."""
    created = await create()
    await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=[created.secret]))
    get = pb.GetRequest(account_id="acme", id=created.token.id)
    assert (await stub.Get(get)).token.secrets[0].HasField("leak_report_time")
    fresh = await stub.Rotate(rotate(created.token.id))
    assert not any(secret.HasField("leak_report_time") for secret in fresh.token.secrets)
    assert len((await stub.Get(get)).token.secrets) == 1


async def test_revoking_unknown_secrets(stub, create):
    """A secret of a token that is not in the database is UNKNOWN, without a receipt."""
    created = await create()
    rotated = await stub.Rotate(rotate(created.token.id))
    answer = await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=["nonsense"]))
    assert outcomes(answer) == ["MALFORMED"]
    assert not answer.HasField("receipt")
    assert await verdict(stub, rotated.secret) == "VALID"


async def test_revoke_many(stub, create):
    """1,000 secrets are one call and one revision."""
    created = [await create() for _ in range(20)]
    secrets = ["nonsense"] * 980 + [token.secret for token in created]
    answer = await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=secrets))
    assert outcomes(answer) == ["MALFORMED"] * 980 + ["ENDED"] * 20
    assert {await verdict(stub, token.secret) for token in created} == {"EXPIRED"}


@pytest.mark.parametrize("number", [0, 1001])
async def test_wrong_number_of_secrets(stub, number):
    """RevokeSecret and ReportSecret take 1 to 1,000 secrets."""
    for method in ("RevokeSecret", "ReportSecret"):
        request = getattr(pb, f"{method}Request")(secrets=["x"] * number)
        assert (await refusal(getattr(stub, method)(request))).fields == ["secrets"]


async def test_revocation_against_update(stub, create):
    """A secret that is revoked while its token is updated stays revoked."""
    for _ in range(5):
        created = await create()
        await asyncio.gather(
            stub.Update(update(created.token.id, ["scope"], scope=pb.SCOPE_WRITE)),
            stub.RevokeSecret(pb.RevokeSecretRequest(secrets=[created.secret])),
            stub.Update(update(created.token.id, ["description"], description="x")),
        )
        assert await verdict(stub, created.secret) == "EXPIRED"

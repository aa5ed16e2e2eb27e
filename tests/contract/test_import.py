"""Import, and verifies of imported secrets, on both transports."""

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.access.methods import IMPORTER, MANAGER
from latchkey_service.rpc import managed_calls
from latchkey_service.secret_format import Pepper
from latchkey_service.settings.settings import Settings

from tests.helpers.databases import session
from tests.helpers.rich_status import refusal
from tests.helpers.servers import make_settings, serving
from tests.helpers.waiting import eventually

PREFIX = "sk_live_"


@pytest.fixture(params=["native", "grpcio"])
def settings(request: pytest.FixtureRequest, database_url: str, pepper_file: Path) -> Settings:
    made = make_settings(database_url, pepper_file, request.param)
    return made.model_copy(update={"imported_prefixes": f"{PREFIX},sk-"})


@pytest.fixture
async def stub(settings: Settings) -> AsyncIterator[Any]:
    async with serving(settings) as address, grpc.aio.insecure_channel(address) as channel:
        yield pb_grpc.TokenServiceStub(channel)


def key(prefix: str = PREFIX) -> str:
    """Return a key as another system makes them."""
    return prefix + secrets.token_urlsafe(24)


def row(secret: str, name: str = "n", account: str = "acme", **fields: Any) -> pb.ImportedToken:
    digest = hashlib.sha256(secret.encode()).digest()
    values: dict[str, Any] = {"scope": pb.SCOPE_READ, "secret_sha256": digest} | fields
    return pb.ImportedToken(account_id=account, name=name, **values)


async def imported(
    stub: Any, *rows: pb.ImportedToken, validate_only: bool = False
) -> list[pb.ImportResult]:
    request = pb.ImportRequest(tokens=rows, validate_only=validate_only)
    return list((await stub.Import(request, timeout=9)).results)


def outcomes(results: list[pb.ImportResult]) -> list[str]:
    names = [pb.ImportOutcome.Name(result.outcome) for result in results]
    return [name.removeprefix("IMPORT_OUTCOME_") for name in names]


async def verdict(stub: Any, secret: str, scope: Any = 0, **fields: Any) -> str:
    request = pb.VerifyRequest(secret=secret, required_scope=scope, **fields)
    answer = await stub.Verify(request, timeout=9)
    return pb.Verdict.Name(answer.verdict).removeprefix("VERDICT_")


async def _all(*calls: Any) -> Any:
    """Make calls of several kinds at once."""
    return await asyncio.gather(*calls)


async def becomes_valid(stub: Any, secret: str) -> None:
    async def valid() -> bool:
        return await verdict(stub, secret) == "VALID"

    await eventually(valid, "the key to be accepted")


async def test_imported_secret_verifies_as_others_do(stub: Any) -> None:
    """An imported key is VALID, cold and warm, alone and in batches, with the scope, networks,
    permissions and expiry of its row. Get shows the row."""
    secret, limited = key(), key("sk-")
    created = timestamp_pb2.Timestamp(seconds=1_700_000_000)
    expires = timestamp_pb2.Timestamp()
    expires.FromDatetime(datetime.now(UTC) + timedelta(days=9))
    results = await imported(
        stub,
        row(secret, hint="sk_…" + secret[-4:], create_time=created, labels={"from": "unkey"}),
        row(
            limited,
            "limited",
            scope=pb.SCOPE_WRITE,
            allowed_networks=["192.0.2.0/24"],
            permissions=["orders:read"],
            expire_time=expires,
            description="why",
        ),
    )
    assert outcomes(results) == ["IMPORTED", "IMPORTED"]
    for _ in range(2):
        assert await verdict(stub, secret) == "VALID"
        assert await verdict(stub, secret, pb.SCOPE_WRITE) == "INSUFFICIENT_SCOPE"
        here = {"client_address": "192.0.2.1", "required_permissions": ["orders:read"]}
        assert await verdict(stub, limited, pb.SCOPE_WRITE, **here) == "VALID"
        assert await verdict(stub, limited) == "ADDRESS_NOT_ALLOWED"
    batch = pb.BatchVerifyRequest(
        requests=[pb.VerifyRequest(secret=s) for s in (key(), secret, "x", "lk_no", secret)]
    )
    answers = (await stub.BatchVerify(batch, timeout=9)).responses
    names = [pb.Verdict.Name(a.verdict).removeprefix("VERDICT_") for a in answers]
    assert names == ["UNKNOWN", "VALID", "MALFORMED", "MALFORMED", "VALID"]
    token = (await stub.Get(pb.GetRequest(account_id="acme", id=results[0].id), timeout=9)).token
    assert token.create_time == created
    assert (token.hint, dict(token.labels)) == ("sk_…" + secret[-4:], {"from": "unkey"})
    token = (await stub.Get(pb.GetRequest(account_id="acme", id=results[1].id), timeout=9)).token
    assert (token.description, token.expire_time) == ("why", expires)
    assert token.hint == "…"


async def test_rate_limit_of_an_imported_token(stub: Any) -> None:
    """An imported token can have a rate limit, which its row's seal covers."""
    secret = key()
    limit = pb.RateLimit(count=2, period=duration_pb2.Duration(seconds=3_600))
    wrong = pb.RateLimit(count=0, period=duration_pb2.Duration(seconds=1, nanos=-1))
    results = await imported(
        stub, row(secret, rate_limit=limit), row(key(), "wrong", rate_limit=wrong)
    )
    assert outcomes(results) == ["IMPORTED", "INVALID"]
    assert [v.field for v in results[1].field_violations] == ["rate_limit.period"]
    assert [await verdict(stub, secret) for _ in range(3)] == ["VALID", "VALID", "RATE_LIMITED"]
    named = pb.GetRequest(account_id="acme", id=results[0].id)
    assert (await stub.Get(named, timeout=9)).token.rate_limit.count == 2


async def test_only_accepted_prefixes_and_forms_are_looked_up(stub: Any) -> None:
    """A key with another prefix, of another length or with other characters is MALFORMED, even if
    it was imported. With an accepted prefix, a made-up one is UNKNOWN."""
    other, short, spaced = key("pk_live_"), PREFIX + "1234567", PREFIX + "12345678 0123456"
    long = PREFIX + "x" * 121
    results = await imported(
        stub, *(row(s, f"n{n}") for n, s in enumerate((other, short, spaced, long)))
    )
    assert outcomes(results) == ["IMPORTED"] * 4
    for secret in (other, short, spaced, long):
        assert await verdict(stub, secret) == "MALFORMED"
    assert await verdict(stub, key()) == "UNKNOWN"
    longest = PREFIX + "x" * 120
    await imported(stub, row(longest, "longest"))
    assert await verdict(stub, longest) == "VALID"


async def test_life_of_an_imported_token(stub: Any, settings: Settings) -> None:
    """Disable, Update, Rotate and Delete work on an imported token as on others. Rotate gives it a
    secret of Latchkey. RevokeSecret ends an imported secret."""
    secret, revoked = key(), key()
    first, second = await imported(stub, row(secret), row(revoked, "revoked", disabled=True))
    named: Any = {"account_id": "acme", "id": first.id}
    assert await verdict(stub, revoked) == "DISABLED"
    await stub.Enable(pb.EnableRequest(account_id="acme", id=second.id), timeout=9)
    await becomes_valid(stub, revoked)
    await stub.Disable(pb.DisableRequest(**named), timeout=9)
    assert await verdict(stub, secret) == "DISABLED"
    await stub.Enable(pb.EnableRequest(**named), timeout=9)
    await becomes_valid(stub, secret)
    rotated = await stub.Rotate(pb.RotateRequest(**named), timeout=9)
    assert rotated.secret.startswith("lk_")
    assert [await verdict(stub, s) for s in (secret, rotated.secret)] == ["EXPIRED", "VALID"]
    request = pb.RevokeSecretRequest(secrets=[revoked, key(), secret, "nonsense"])
    ended = (await stub.RevokeSecret(request, timeout=9)).results
    assert [pb.SecretOutcome.Name(r.outcome).removeprefix("SECRET_OUTCOME_") for r in ended] == [
        *("ENDED", "UNKNOWN", "ENDED_BEFORE", "MALFORMED")
    ]
    assert await verdict(stub, revoked) == "EXPIRED"
    await stub.Delete(pb.DeleteRequest(**named), timeout=9)
    assert await verdict(stub, secret) == "DELETED"
    # An import never revives what has ended.
    again = await imported(stub, row(secret, "again"), row(revoked, "more"))
    assert outcomes(again) == ["EXISTS", "EXISTS"]
    assert [result.id for result in again] == [first.id, second.id]
    assert [await verdict(stub, s) for s in (secret, revoked)] == ["DELETED", "EXPIRED"]


async def test_rows_are_judged_one_by_one(stub: Any) -> None:
    """Each row has its result: a wrong one does not affect the others, and says what is wrong."""
    mine, theirs = key(), key()
    await imported(stub, row(mine, "Taken"), row(theirs, "x", "globex"))
    past = timestamp_pb2.Timestamp(seconds=1)
    fresh, twice = key(), key()
    results = await imported(
        stub,
        row(mine, "other name"),
        row(theirs, "theirs"),
        row(key(), "taken"),
        row(fresh, "fresh"),
        row(key(), "FRESH"),
        row(twice, "twice"),
        row(twice, "twice more"),
        row(twice, "twice", "globex"),
        row(key(), "", "", scope=0, secret_sha256=b"short", expire_time=past, hint="x" * 17),
        row(key(), "late", create_time=timestamp_pb2.Timestamp(seconds=9_999_999_999)),
        row(key(), "never", expire_time=timestamp_pb2.Timestamp(seconds=-(10**15))),
        row(key(), "net", allowed_networks=["10.0.0.1/8"], permissions=["x"]),
    )
    assert outcomes(results) == [
        *("EXISTS", "OTHER_ACCOUNT", "NAME_TAKEN", "IMPORTED", "NAME_TAKEN", "IMPORTED"),
        *("EXISTS", "OTHER_ACCOUNT", "INVALID", "INVALID", "INVALID", "INVALID"),
    ]
    fields = [[violation.field for violation in result.field_violations] for result in results]
    assert set(fields[8]) == {
        *("account_id", "name", "scope", "secret_sha256", "expire_time", "hint"),
    }
    assert fields[9:] == [
        ["create_time"],
        ["expire_time"],
        ["allowed_networks[0]", "permissions[0]"],
    ]
    assert results[6].id == results[5].id
    assert await verdict(stub, fresh) == "VALID"
    assert (await refusal(stub.Import(pb.ImportRequest(), timeout=9))).fields == ["tokens"]


async def test_repeated_and_dry_imports_change_nothing(stub: Any, database_url: str) -> None:
    """A dry run says what an import would do. A repeated import creates nothing and writes no audit
    entry for a token."""
    rows = [row(key(), f"n{number}") for number in range(1_000)]
    dry = await imported(stub, *rows, validate_only=True)
    assert outcomes(dry) == ["IMPORTED"] * 1_000
    assert not any(result.id for result in dry)

    async def counts() -> tuple[int, int]:
        async with session(database_url) as connection:
            tokens = await connection.fetchval("SELECT count(*) FROM token")
            audited = await connection.fetchval(
                "SELECT count(*) FROM audit WHERE method LIKE '%Import' AND token_id <> ''"
            )
        return tokens, audited

    assert await counts() == (0, 0)
    first = await imported(stub, *rows)
    assert outcomes(first) == ["IMPORTED"] * 1_000
    assert await counts() == (1_000, 1_000)
    again = await imported(stub, *rows)
    assert outcomes(again) == ["EXISTS"] * 1_000
    assert [result.id for result in again] == [result.id for result in first]
    assert await counts() == (1_000, 1_000)


async def test_concurrent_imports_of_the_same_rows(stub: Any, database_url: str) -> None:
    """Calls that import the same secrets at once create each token once, and all succeed."""
    rows = [row(key(), f"n{number}") for number in range(50)]
    several = await asyncio.gather(*(imported(stub, *rows) for _ in range(4)))
    for results in zip(*several, strict=True):
        assert sorted(outcomes(list(results))) == ["EXISTS"] * 3 + ["IMPORTED"]
        assert len({result.id for result in results}) == 1
    async with session(database_url) as connection:
        assert await connection.fetchval("SELECT count(*) FROM token") == 50


@pytest.fixture
def slots_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each call of the next test have a slot. If calls queue, the service rejects some of them
    on a busy machine."""
    limits = {**managed_calls.CONCURRENCY_LIMITS, MANAGER: (16, 100), IMPORTER: (2, 100)}
    monkeypatch.setattr(managed_calls, "CONCURRENCY_LIMITS", limits)


@pytest.mark.usefixtures("slots_for_all")
async def test_concurrent_calls_that_take_the_same_names(stub: Any) -> None:
    """Imports of other secrets, Creates and Updates may want the same names at once. Each name goes
    to one of them, the others are refused, and no call fails for another reason."""
    names = [f"n{number}" for number in range(8)]
    old = await imported(stub, *(row(key(), f"old {name}") for name in names))

    async def rename(token_id: str, name: str) -> str:
        request = pb.UpdateRequest(
            account_id="acme",
            id=token_id,
            token=pb.Token(name=name),
            update_mask=field_mask_pb2.FieldMask(paths=["name"]),
        )
        return await taken(stub.Update(request, timeout=9))

    async def create(name: str) -> str:
        request = pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ)
        return await taken(stub.Create(request, timeout=9))

    async def taken(call: Any) -> str:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            return "NAME_TAKEN"
        return "IMPORTED"

    first, second, *single = await _all(
        imported(stub, *(row(key(), name) for name in names)),
        imported(stub, *(row(key(), name) for name in reversed(names))),
        *(rename(result.id, name) for result, name in zip(old, names, strict=True)),
        *(create(name) for name in names),
    )
    found = outcomes(first), list(reversed(outcomes(second))), single[:8], single[8:]
    for several in zip(*found, strict=True):
        assert sorted(several) == ["IMPORTED", "NAME_TAKEN", "NAME_TAKEN", "NAME_TAKEN"]


async def test_expired_token_does_not_hold_its_name(stub: Any, database_url: str) -> None:
    """As with Create, the name of an expired token is free, and the token has an audit entry of the
    call that took its name."""
    (old,) = await imported(stub, row(key(), "name"))
    async with session(database_url) as connection:
        await connection.execute("UPDATE token SET expire_time = now() - interval '1 day'")
        assert outcomes(await imported(stub, row(key(), "name"))) == ["IMPORTED"]
        entries = await connection.fetch(
            "SELECT account_id, method, reason FROM audit WHERE token_id = $1 ORDER BY id", old.id
        )
    method = "/latchkey.v1.TokenService/Import"
    assert [tuple(entry) for entry in entries] == [
        ("acme", method, ""),
        ("acme", method, "NAME_FREED"),
    ]


async def test_absent_secret_is_accepted_once_imported(stub: Any) -> None:
    """A key that was presented before its import, and refused, is accepted soon after."""
    secret = key()
    for _ in range(3):
        assert await verdict(stub, secret) == "UNKNOWN"
    await imported(stub, row(secret))
    await becomes_valid(stub, secret)


async def test_hash_in_the_database_is_nobodys_key(
    stub: Any, database_url: str, settings: Settings
) -> None:
    """The database has no plain hash of an imported key. Somebody who can write to it can neither
    plant a hash nor move an imported key to another token."""
    secret, planted = key(), key()
    first, _ = await imported(stub, row(secret), row(key(), "b", scope=pb.SCOPE_WRITE))
    plain = hashlib.sha256(secret.encode()).digest()
    async with session(database_url) as connection:
        assert not await connection.fetchval("SELECT count(*) FROM secret WHERE digest = $1", plain)
        await connection.execute(
            "INSERT INTO secret (digest, pepper_id, token_id, hint, seal)"
            " SELECT $1, pepper_id, token_id, hint, seal FROM secret LIMIT 1",
            hashlib.sha256(planted.encode()).digest(),
        )
        await connection.execute(
            "UPDATE secret SET token_id = (SELECT id FROM token WHERE name = 'b')"
            " WHERE token_id = $1 AND digest <> $2",
            first.id,
            hashlib.sha256(planted.encode()).digest(),
        )
    assert await verdict(stub, planted) == "UNKNOWN"
    assert await verdict(stub, secret) == "UNKNOWN"


async def test_peppers_rotate(database_url: str, tmp_path: Path, settings: Settings) -> None:
    """Keys imported under an older pepper stay valid, and are not imported again."""
    old, new = (Pepper(os.urandom(32)) for _ in range(2))
    path = tmp_path / "peppers"

    def write(*peppers: Pepper) -> None:
        path.write_text("\n".join(pepper.key.hex() for pepper in peppers))
        path.chmod(0o600)

    rotating = settings.model_copy(update={"pepper_file": path})
    secret, later = key(), key()
    write(old)
    async with serving(rotating) as address, grpc.aio.insecure_channel(address) as channel:
        assert outcomes(await imported(pb_grpc.TokenServiceStub(channel), row(secret))) == [
            "IMPORTED"
        ]
    write(new, old)
    async with serving(rotating) as address, grpc.aio.insecure_channel(address) as channel:
        stub: Any = pb_grpc.TokenServiceStub(channel)
        assert outcomes(await imported(stub, row(secret), row(later, "later"))) == [
            "EXISTS",
            "IMPORTED",
        ]
        assert [await verdict(stub, s) for s in (secret, later)] == ["VALID", "VALID"]


async def test_imported_secrets_are_refused_without_the_setting(
    address: str, channel: grpc.aio.Channel
) -> None:
    """Without the setting, rows can be imported, and their keys are MALFORMED."""
    stub: Any = pb_grpc.TokenServiceStub(channel)
    secret = key()
    assert outcomes(await imported(stub, row(secret))) == ["IMPORTED"]
    assert await verdict(stub, secret) == "MALFORMED"

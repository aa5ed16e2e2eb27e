"""The removal of tokens, secrets and request ids long after they have ended, and audit entries of
changes."""

import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, field_mask_pb2
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.settings.settings import Settings
from latchkey_service.tokens.upkeep_store import UpkeepStore

from tests.helpers.databases import session
from tests.helpers.servers import make_settings, serving
from tests.helpers.waiting import eventually


@pytest.fixture
def settings(database_url: str, pepper_file: Path) -> Settings:
    """Without a cache, so that each verify reads the row."""
    settings = make_settings(database_url, pepper_file, "native")
    return settings.model_copy(update={"cache": "off"})


@pytest.fixture
async def stub(settings: Settings) -> Any:
    async with serving(settings) as address, grpc.aio.insecure_channel(address) as channel:
        yield pb_grpc.TokenServiceStub(channel)


async def create(stub: Any, name: str, **fields: Any) -> pb.CreateResponse:
    request: dict[str, Any] = {"account_id": "acme", "name": name, "scope": pb.SCOPE_READ} | fields
    response: pb.CreateResponse = await stub.Create(pb.CreateRequest(**request), timeout=5)
    return response


async def verdict(stub: Any, secret: str) -> str:
    answer = await stub.Verify(pb.VerifyRequest(secret=secret), timeout=5)
    return pb.Verdict.Name(answer.verdict).removeprefix("VERDICT_")


async def test_what_ended_long_ago_is_removed(stub: Any, database_url: str) -> None:
    """Expired tokens and ended secrets are removed after the retention. Live tokens keep their
    newest secret, even if it has ended. The uses of a token are removed with it."""
    expired, kept, revoked = [await create(stub, name) for name in ("expired", "kept", "revoked")]
    named: dict[str, Any] = {"account_id": "acme", "id": kept.token.id}
    rotated = await stub.Rotate(pb.RotateRequest(**named), timeout=9)
    await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=[revoked.secret]), timeout=9)
    pool = await Pool.open(Connector(database_url))
    store = UpkeepStore(pool)
    now = datetime.now(UTC)
    try:
        before = now - timedelta(days=1)
        assert await store.purge_ended(before, before, 10) == 0
        async with session(database_url) as connection:
            await connection.execute(
                "UPDATE token SET expire_time = now() - interval '2 days' WHERE id = $1",
                expired.token.id,
            )
            await connection.execute(
                "INSERT INTO token_usage SELECT id, hint, '', create_time, create_time FROM token"
            )
            await connection.execute(
                "INSERT INTO token_usage_day SELECT id, '', '2026-01-01', 1 FROM token"
            )
            await connection.execute(
                "UPDATE secret SET retire_time = retire_time - interval '2 days'"
            )
        # Each kind has a retention: neither removes what the other one keeps.
        early = now - timedelta(days=9)
        assert await store.purge_ended(early, early, 10) == 0
        assert await store.purge_ended(before, early, 10) == 1
        assert await store.purge_ended(early, before, 10) == 1
        assert await store.purge_ended(before, before, 10) == 0
        listed = await stub.List(pb.ListRequest(account_id="acme"), timeout=5)
        assert {token.name for token in listed.tokens} == {"kept", "revoked"}
        assert await verdict(stub, expired.secret) == "UNKNOWN"
        async with session(database_url) as connection:
            for table in ("token_usage", "token_usage_day"):
                rows = await connection.fetch(f"SELECT token_id FROM {table}")  # noqa: S608 - ours
                assert {row[0] for row in rows} == {kept.token.id, revoked.token.id}
    finally:
        await pool.close()
    assert await verdict(stub, expired.secret) == "UNKNOWN"
    assert await verdict(stub, kept.secret) == "UNKNOWN"
    assert await verdict(stub, rotated.secret) == "VALID"
    assert await verdict(stub, revoked.secret) == "EXPIRED"
    listed = (await stub.List(pb.ListRequest(account_id="acme"))).tokens
    assert {token.id for token in listed} == {kept.token.id, revoked.token.id}


async def test_a_request_id_is_free_after_a_day(stub: Any, database_url: str) -> None:
    """After a day, a request id stands for a new request. It is removed then, too."""
    request_id = str(uuid.uuid4())
    first = await create(stub, "first", request_id=request_id)
    async with session(database_url) as connection:
        await connection.execute("UPDATE request SET create_time = now() - interval '25 hours'")
    second = await create(stub, "second", request_id=request_id)
    assert second.token.id != first.token.id
    assert await verdict(stub, first.secret) == await verdict(stub, second.secret) == "VALID"
    rotate = pb.RotateRequest(account_id="acme", id=first.token.id, request_id=str(uuid.uuid4()))
    rotated = await stub.Rotate(rotate, timeout=9)
    async with session(database_url) as connection:
        await connection.execute("UPDATE request SET create_time = now() - interval '25 hours'")
    again = await stub.Rotate(rotate, timeout=9)
    assert await verdict(stub, again.secret) == "VALID"
    # A rotation without a grace, as any other: it ended the secret before it.
    assert await verdict(stub, rotated.secret) == "EXPIRED"
    pool = await Pool.open(Connector(database_url))
    try:
        store = UpkeepStore(pool)
        now = datetime.now(UTC)
        assert await store.purge_requests(now - timedelta(days=1), 10) == 1
        assert await store.purge_requests(now + timedelta(days=1), 10) == 1
    finally:
        await pool.close()


async def test_each_change_has_one_entry(stub: Any, database_url: str) -> None:
    """Each call that changes a token, and each secret or token that a bulk call ends, has exactly
    one audit entry, with the account and the token."""
    one, two = await create(stub, "one"), await create(stub, "two", account_id="other")
    three = await create(stub, "three")
    named: dict[str, Any] = {"account_id": "acme", "id": one.token.id}
    mask = field_mask_pb2.FieldMask(paths=["description"])
    token = pb.Token(description="x")
    await stub.Update(pb.UpdateRequest(**named, token=token, update_mask=mask), timeout=9)
    await stub.Disable(pb.DisableRequest(**named), timeout=9)
    await stub.Enable(pb.EnableRequest(**named), timeout=9)
    rotated = await stub.Rotate(
        pb.RotateRequest(**named, grace=duration_pb2.Duration(seconds=60)), timeout=9
    )
    await stub.RetireSecrets(pb.RetireSecretsRequest(**named), timeout=9)
    secrets = [rotated.secret, two.secret, rotated.secret, "nonsense"]
    await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=secrets), timeout=9)
    await stub.DeleteAll(pb.DeleteAllRequest(account_id="acme"), timeout=9)
    # Nothing is left to do: an entry without a token.
    await stub.DeleteAll(pb.DeleteAllRequest(account_id="acme"), timeout=9)
    expected = sorted(
        [
            *(("Create", t.token.account_id, t.token.id) for t in (one, two, three)),
            *(
                (method, "acme", one.token.id)
                for method in ("Update", "Disable", "Enable", "Rotate", "RetireSecrets")
            ),
            ("RevokeSecret", "acme", one.token.id),
            ("RevokeSecret", "other", two.token.id),
            ("DeleteAll", "acme", one.token.id),
            ("DeleteAll", "acme", three.token.id),
            ("DeleteAll", "acme", ""),
        ]
    )

    async def found() -> list[tuple[str, str, str]]:
        async with session(database_url) as connection:
            rows = await connection.fetch("SELECT method, account_id, token_id FROM audit")
        return sorted((row[0].rpartition("/")[2], row[1], row[2]) for row in rows)

    await eventually(lambda: _equal(found, expected), "all entries are written")


async def _equal(found: Any, expected: Any) -> bool:
    entries = await found()
    assert entries == expected
    return True

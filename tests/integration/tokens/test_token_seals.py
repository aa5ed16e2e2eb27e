"""The seal of a token's own row: no change seals what somebody else has written into the row."""

import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.settings.settings import Settings
from structlog.testing import capture_logs

from tests.helpers.databases import session
from tests.helpers.rich_status import refusal
from tests.helpers.servers import make_settings, serving
from tests.helpers.waiting import eventually
from tests.integration.tokens.test_seals import (
    all_sealed,
    create,
    stub_of,
    verdict,
)

RETIRE = "UPDATE secret SET retire_time = now(), seal = '' WHERE token_id = $1"
PEPPERS = ("0a" * 32, "0b" * 32)


@pytest.fixture
def settings(database_url: str, pepper_file: Path) -> Settings:
    """Without a cache, so that each verify reads the row. Seals do not depend on the transport."""
    settings = make_settings(database_url, pepper_file, "native")
    return settings.model_copy(update={"cache": "off"})


def named(token_id: str) -> dict[str, Any]:
    return {"account_id": "acme", "id": token_id}


def renamed(token_id: str) -> pb.UpdateRequest:
    return pb.UpdateRequest(
        **named(token_id),
        token=pb.Token(description="x"),
        update_mask=field_mask_pb2.FieldMask(paths=["description"]),
    )


async def execute(url: str, statement: str, *arguments: Any) -> None:
    async with session(url) as connection:
        await connection.execute(statement, *arguments)


async def rows_of(url: str, token_id: str) -> list[Any]:
    """The token's row and those of its secrets."""
    async with session(url) as connection:
        return [
            await connection.fetchrow("SELECT * FROM token WHERE id = $1", token_id),
            *await connection.fetch("SELECT * FROM secret WHERE token_id = $1", token_id),
        ]


# Each change to a token that makes new seals. Disable and Enable need a token in the other state.
CHANGES: dict[str, Callable[[Any, str], Awaitable[Any]]] = {
    "Rotate": lambda stub, t: stub.Rotate(pb.RotateRequest(**named(t)), timeout=9),
    "Update": lambda stub, t: stub.Update(renamed(t), timeout=9),
    "Disable": lambda stub, t: stub.Disable(pb.DisableRequest(**named(t)), timeout=9),
    "Enable": lambda stub, t: stub.Enable(pb.EnableRequest(**named(t)), timeout=9),
}
TAMPERING = {
    "a wider scope": "UPDATE token SET scope = 2 WHERE id = $1",
    "no expiry": "UPDATE token SET expire_time = NULL WHERE id = $1",
    "more networks": "UPDATE token SET allowed_networks = '{}' WHERE id = $1",
    "more permissions": "UPDATE token SET permissions = '{orders:*}' WHERE id = $1",
    "enabled": "UPDATE token SET disable_time = NULL WHERE id = $1",
    "no seal": "UPDATE token SET seal = NULL WHERE id = $1",
    "an empty seal": "UPDATE token SET seal = '' WHERE id = $1",
    "a short seal": "UPDATE token SET seal = substr(seal, 1, 31) WHERE id = $1",
    "an unknown pepper": "UPDATE token SET seal_pepper_id = 'x' WHERE id = $1",
    "another token's seal": "UPDATE token SET seal = (SELECT seal FROM token WHERE name = 'other')"
    " WHERE id = $1",
    "its secret's seal": "UPDATE token SET seal = $2 WHERE id = $1",
}


async def test_no_change_seals_a_changed_row(settings: Settings, database_url: str) -> None:
    """An attacker ends all secrets of a token and widens its row. The owner's next Rotate is
    refused, counted, logged and audited as failed, and changes nothing. So is each other change
    that makes new seals."""
    async with serving(settings) as address, grpc.aio.insecure_channel(address) as channel:
        stub: Any = pb_grpc.TokenServiceStub(channel)
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        await create(stub, "other")
        for name, statement in TAMPERING.items():
            for method, change in CHANGES.items():
                created = await create(
                    stub,
                    f"{name} {method}",
                    ttl={"seconds": 3600},
                    allowed_networks=["10.0.0.0/8"],
                    permissions=["orders:read"],
                )
                token_id = created.token.id
                if method == "Enable" or name == "enabled":
                    await stub.Disable(pb.DisableRequest(**named(token_id)), timeout=9)
                if (method, name) == ("Enable", "enabled"):
                    continue
                async with session(database_url) as connection:
                    own = "SELECT seal FROM secret WHERE token_id = $1"
                    arguments = [token_id]
                    if "$2" in statement:
                        arguments.append(await connection.fetchval(own, token_id))
                    await connection.execute(RETIRE, token_id)
                    await connection.execute(statement, *arguments)
                before = await rows_of(database_url, token_id)
                error = await refusal(change(stub, token_id))
                assert (error.code, error.reason) == (
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "TOKEN_SEAL_INVALID",
                ), (name, method)
                assert await rows_of(database_url, token_id) == before
                # It can still be deleted.
                await stub.Delete(pb.DeleteRequest(**named(token_id)), timeout=9)
        audit: Any = audit_grpc.AuditServiceStub(channel)
        request = audit_pb.AuditServiceListRequest(page_size=500, outcome=audit_pb.OUTCOME_FAILED)

        async def failures() -> list[str]:
            entries = (await audit.List(request, timeout=5)).entries
            return sorted(
                {e.method.rpartition("/")[2] for e in entries if e.reason == "TOKEN_SEAL_INVALID"}
            )

        async def audited() -> bool:
            return await failures() == sorted(CHANGES)

        await eventually(audited, "an entry for each kind of refused change")


async def test_a_refused_change_is_logged(settings: Settings, database_url: str) -> None:
    """The log names the token whose row was changed, as an error."""
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        created = await create(stub, "ci")
        await execute(database_url, RETIRE, created.token.id)
        await execute(database_url, "UPDATE token SET scope = 2")
        with capture_logs() as logs:
            await refusal(stub.Rotate(pb.RotateRequest(**named(created.token.id)), timeout=9))
    (line,) = (entry for entry in logs if "changed outside" in entry["event"])
    assert line["log_level"] == "error"
    assert (line["token_id"], line["account_id"]) == (created.token.id, "acme")


async def test_a_retry_does_not_seal_a_changed_row(settings: Settings, database_url: str) -> None:
    """Retries of Create and Rotate with their ids are refused too."""
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        ids = [str(uuid.uuid4()) for _ in range(2)]
        created = await create(stub, "ci", request_id=ids[0])
        rotate = pb.RotateRequest(**named(created.token.id), request_id=ids[1])
        await stub.Rotate(rotate, timeout=9)
        await execute(database_url, RETIRE, created.token.id)
        await execute(database_url, "UPDATE token SET scope = 2")
        for call in (create(stub, "ci", request_id=ids[0]), stub.Rotate(rotate, timeout=9)):
            assert (await refusal(call)).reason == "TOKEN_SEAL_INVALID"


async def test_a_deleted_token_gets_no_secret(settings: Settings, database_url: str) -> None:
    """Restoring the columns of a deleted token does not let a change revive it."""
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        deleted, swept = await create(stub, "deleted"), await create(stub, "swept")
        await stub.Delete(pb.DeleteRequest(**named(deleted.token.id)), timeout=9)
        await stub.DeleteAll(pb.DeleteAllRequest(account_id="acme"), timeout=9)
        await execute(database_url, "UPDATE token SET delete_time = NULL")
        for created in (deleted, swept):
            await execute(database_url, RETIRE, created.token.id)
            error = await refusal(stub.Rotate(pb.RotateRequest(**named(created.token.id))))
            assert error.reason == "TOKEN_SEAL_INVALID"


async def test_a_token_without_secrets_is_rotated(settings: Settings, database_url: str) -> None:
    """A token whose only secret was revoked keeps its rights and gets a new secret. The seals of
    secrets and token agree after each kind of change."""
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        created = await create(stub, "ci")
        secret = created.secret
        for change in CHANGES.values():
            await change(stub, created.token.id)
            rotated = await stub.Rotate(pb.RotateRequest(**named(created.token.id)), timeout=9)
            secret = rotated.secret
            await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=[secret]), timeout=9)
            assert await verdict(stub, secret) in ("EXPIRED", "DISABLED")
            await stub.RetireSecrets(pb.RetireSecretsRequest(**named(created.token.id)), timeout=9)
        rotated = await stub.Rotate(pb.RotateRequest(**named(created.token.id)), timeout=9)
        assert await verdict(stub, rotated.secret) == "VALID"
        assert await verdict(stub, rotated.secret, required_scope=pb.SCOPE_WRITE) != "VALID"


async def test_tokens_of_an_earlier_release_are_sealed(
    settings: Settings, database_url: str
) -> None:
    """Tokens of a release that sealed no tokens get seals at the first start, including those
    without a working secret. A token whose secret shows that its row was changed does not."""
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        working, without = await create(stub, "working"), await create(stub, "without")
        changed = await create(stub, "changed")
        await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=[without.secret]), timeout=9)
    await execute(database_url, "UPDATE token SET seal = NULL, seal_pepper_id = NULL")
    await execute(database_url, "UPDATE token SET scope = 2 WHERE id = $1", changed.token.id)
    await execute(database_url, "UPDATE pepper SET tokens_sealed = NULL")
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the tokens are sealed")
        await execute(database_url, RETIRE, changed.token.id)
        for created in (working, without):
            await stub.Rotate(pb.RotateRequest(**named(created.token.id)), timeout=9)
        error = await refusal(stub.Rotate(pb.RotateRequest(**named(changed.token.id))))
        assert error.reason == "TOKEN_SEAL_INVALID"


async def test_the_previous_release_in_the_fleet(settings: Settings, database_url: str) -> None:
    """What a server of the previous release creates, changes and deletes without a seal is sealed
    as it appears, can be changed afterwards, and cannot be revived."""
    async with stub_of(settings) as stub:
        await execute(
            database_url,
            "INSERT INTO verifier (id, incarnation, acknowledged_revision, lease_seconds, host,"
            " process_id, version, rules) VALUES ('old', 1, 1000000, 60, 'h', 1, '0.0.1', 1)",
        )
        await execute(database_url, "UPDATE pepper SET tokens_sealed = NULL")
    async with stub_of(settings) as stub:
        made, changed = await create(stub, "made"), await create(stub, "changed")
        deleted = await create(stub, "deleted")
        # As the previous release writes them. Its changes seal the secrets, or end them.
        await execute(database_url, "UPDATE token SET seal = NULL WHERE id = $1", made.token.id)
        # In one transaction, as that release does: between the two, the secret's seal is wrong, and
        # the server would take the token for a forged one.
        async with session(database_url) as connection, connection.transaction():
            await connection.execute(
                "UPDATE token SET scope = 2, version = version + 1 WHERE id = $1", changed.token.id
            )
            await connection.execute(RETIRE, changed.token.id)
        gone = "UPDATE token SET delete_time = now() WHERE id = $1"
        await execute(database_url, gone, deleted.token.id)

        async def sealed() -> bool:
            async with session(database_url) as connection:
                missing = "SELECT count(*) FROM token WHERE seal IS NULL"
                return bool(await connection.fetchval(missing) == 0)

        await eventually(sealed, "the tokens are sealed")
        assert not await all_sealed(database_url)
        for created in (made, changed):
            await stub.Rotate(pb.RotateRequest(**named(created.token.id)), timeout=9)
        await execute(database_url, "UPDATE token SET delete_time = NULL")
        await execute(database_url, RETIRE, deleted.token.id)
        error = await refusal(stub.Rotate(pb.RotateRequest(**named(deleted.token.id))))
        assert error.reason == "TOKEN_SEAL_INVALID"
        await execute(database_url, "DELETE FROM verifier WHERE id = 'old'")
        await eventually(lambda: all_sealed(database_url), "the proof, without the old server")


async def test_the_previous_release_after_the_proof(settings: Settings, database_url: str) -> None:
    """A host that goes back to the previous release for a while does not lock the tokens that it
    creates: the seal of a working secret shows that such a token is genuine."""
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        created = await create(stub, "ci")
        await execute(database_url, "UPDATE token SET seal = NULL, seal_pepper_id = NULL")
        await stub.Update(renamed(created.token.id), timeout=9)
        async with session(database_url) as connection:
            assert await connection.fetchval("SELECT octet_length(seal) FROM token") == 32
        await execute(database_url, "UPDATE token SET seal = NULL, seal_pepper_id = NULL")
    async with stub_of(settings) as stub:

        async def sealed() -> bool:
            async with session(database_url) as connection:
                return await connection.fetchval("SELECT seal FROM token") is not None

        await eventually(sealed, "the next start seals it")
        await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=[created.secret]), timeout=9)
        await stub.Rotate(pb.RotateRequest(**named(created.token.id)), timeout=9)


async def test_seals_of_tokens_rotate_with_the_pepper(
    settings: Settings, database_url: str, tmp_path: Path
) -> None:
    """A change after the rotation of the pepper makes the token's seal with the pepper of its
    newest secret. Then the old pepper may be removed, and the rows without a seal stay refused."""
    old, new = PEPPERS

    def with_keys(*keys: str) -> Settings:
        path = tmp_path / f"peppers-{len(list(tmp_path.iterdir()))}"
        path.write_text("\n".join(keys))
        path.chmod(0o600)
        return settings.model_copy(update={"pepper_file": path})

    async def peppers_of_seals() -> set[str]:
        async with session(database_url) as connection:
            rows = await connection.fetch("SELECT seal_pepper_id FROM token")
        return {row[0] for row in rows}

    async with stub_of(with_keys(old)) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof of the old pepper")
        created = await create(stub, "ci")
    (before,) = await peppers_of_seals()
    async with stub_of(with_keys(new, old)) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof of the new pepper")
        await stub.Update(renamed(created.token.id), timeout=9)
        assert await peppers_of_seals() == {before}
        rotated = await stub.Rotate(pb.RotateRequest(**named(created.token.id)), timeout=9)
        (after,) = await peppers_of_seals()
        assert after != before
    await execute(database_url, "DELETE FROM secret WHERE retire_time IS NOT NULL")
    async with stub_of(with_keys(new)) as stub:
        await stub.Update(renamed(created.token.id), timeout=9)
        await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=[rotated.secret]), timeout=9)
        await execute(database_url, "UPDATE token SET seal = NULL")
        error = await refusal(stub.Rotate(pb.RotateRequest(**named(created.token.id))))
        assert error.reason == "TOKEN_SEAL_INVALID"

"""Sealed rows: what somebody writes into the database does not become a right."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, field_mask_pb2
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.settings.settings import Settings
from structlog.testing import capture_logs

from tests.helpers.databases import session
from tests.helpers.rich_status import refusal
from tests.helpers.servers import make_settings, serving
from tests.helpers.waiting import eventually


@pytest.fixture
def settings(database_url: str, pepper_file: Path) -> Settings:
    """Without a cache, so that each verify reads the row. Seals do not depend on the transport."""
    settings = make_settings(database_url, pepper_file, "native")
    return settings.model_copy(update={"cache": "off"})


@contextlib.asynccontextmanager
async def stub_of(settings: Settings) -> AsyncIterator[Any]:
    async with serving(settings) as address, grpc.aio.insecure_channel(address) as channel:
        yield pb_grpc.TokenServiceStub(channel)


async def create(stub: Any, name: str, **fields: Any) -> pb.CreateResponse:
    request: dict[str, Any] = {"account_id": "acme", "name": name, "scope": pb.SCOPE_READ} | fields
    response: pb.CreateResponse = await stub.Create(pb.CreateRequest(**request), timeout=5)
    return response


async def verdict(stub: Any, secret: str, **question: Any) -> str:
    answer = await stub.Verify(pb.VerifyRequest(secret=secret, **question), timeout=5)
    return pb.Verdict.Name(answer.verdict).removeprefix("VERDICT_")


async def all_sealed(url: str) -> bool:
    async with session(url) as connection:
        found = await connection.fetchval(
            "SELECT bool_and(all_sealed IS NOT NULL AND tokens_sealed IS NOT NULL) FROM pepper"
            " WHERE id <> 'other'"
        )
    return bool(found)


TAMPERING = {
    "a wider scope": "UPDATE token SET scope = 2 WHERE id = $1",
    "a later expiry": "UPDATE token SET expire_time = NULL WHERE id = $1",
    "another account": "UPDATE token SET account_id = 'other' WHERE id = $1",
    "more networks": "UPDATE token SET allowed_networks = '{}' WHERE id = $1",
    "more permissions": "UPDATE token SET permissions = '{orders:*}' WHERE id = $1",
    "a higher rate": "UPDATE token SET rate_count = 1000000 WHERE id = $1",
    "no rate limit": "UPDATE token SET rate_count = NULL, rate_period_seconds = NULL,"
    " rate_burst = NULL WHERE id = $1",
    "a longer grace": "UPDATE secret SET expire_time = '2099-01-01' WHERE token_id = $1",
    "no seal": "UPDATE secret SET seal = NULL WHERE token_id = $1",
    "a short seal": "UPDATE secret SET seal = substr(seal, 1, 31) WHERE token_id = $1",
    "no first use": "UPDATE secret SET retire_on_first_use = true WHERE token_id = $1",
}


async def test_a_changed_row_is_unknown(settings: Settings, database_url: str) -> None:
    """A writer to the database cannot widen, move or extend a token: its secret becomes
    UNKNOWN, and the log says so. Latchkey does not change such a token, but deletes it."""
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        for name, statement in TAMPERING.items():
            created = await create(
                stub,
                name,
                ttl={"seconds": 3600},
                allowed_networks=["10.0.0.0/8"],
                permissions=["orders:read"],
                rate_limit=pb.RateLimit(count=100, period=duration_pb2.Duration(seconds=1)),
            )
            here: dict[str, Any] = {"client_address": "10.0.0.1"}
            assert await verdict(stub, created.secret, **here) == "VALID"
            async with session(database_url) as connection:
                await connection.execute(statement, created.token.id)
            assert await verdict(stub, created.secret, **here) == "UNKNOWN", name
            answer = await stub.Verify(pb.VerifyRequest(secret=created.secret))
            assert not answer.HasField("token")
            if name == "another account":
                continue
            mask = field_mask_pb2.FieldMask(paths=["scope"])
            request = pb.UpdateRequest(
                account_id="acme",
                id=created.token.id,
                token=pb.Token(scope=pb.SCOPE_WRITE if name != "a wider scope" else pb.SCOPE_READ),
                update_mask=mask,
            )
            error = await refusal(stub.Update(request))
            assert error.reason == "TOKEN_SEAL_INVALID", name
            assert await verdict(stub, created.secret, **here) == "UNKNOWN", name
            await stub.Delete(pb.DeleteRequest(account_id="acme", id=created.token.id), timeout=9)
            assert await verdict(stub, created.secret, **here) == "DELETED"


async def test_a_changed_row_is_logged(settings: Settings, database_url: str) -> None:
    """The log names the token and the account, and contains neither secret nor digest."""
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        created = await create(stub, "ci")
        async with session(database_url) as connection:
            await connection.execute("UPDATE token SET scope = 2")
        with capture_logs() as logs:
            assert await verdict(stub, created.secret) == "UNKNOWN"
            assert await verdict(stub, created.secret) == "UNKNOWN"
    (line,) = (entry for entry in logs if "refused" in entry["event"])
    assert line["log_level"] == "error"
    assert (line["token_id"], line["account_id"]) == (created.token.id, "acme")
    assert created.secret[3:40] not in str(logs)


async def test_a_secret_cannot_be_moved_to_another_token(
    settings: Settings, database_url: str
) -> None:
    """A secret of one's own, pointed at another account's token in the database, is UNKNOWN, even
    with the seal of the other token's secret."""
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        own = await create(stub, "own")
        other = await create(stub, "other", account_id="victim", scope=pb.SCOPE_WRITE)
        async with session(database_url) as connection:
            move = "UPDATE secret SET token_id = $1 WHERE token_id = $2"
            await connection.execute(move, other.token.id, own.token.id)
            assert await verdict(stub, own.secret) == "UNKNOWN"
            await connection.execute(
                "UPDATE secret SET seal = (SELECT max(seal) FROM secret WHERE hint = $1)"
                " WHERE hint = $2",
                other.token.hint,
                own.token.hint,
            )
        assert await verdict(stub, own.secret) == "UNKNOWN"


async def test_the_order_of_secrets_cannot_be_changed(
    settings: Settings, database_url: str
) -> None:
    """A writer to the database cannot have an owner end the wrong secret: RetireSecrets is refused
    while the order of the secrets is changed, and works again afterwards."""
    swaps = {
        "exchanged": "UPDATE secret SET ordinal = 1 - ordinal WHERE token_id = $1",
        "equal": "UPDATE secret SET ordinal = 1 WHERE token_id = $1",
        "older is newest": "UPDATE secret SET ordinal = 9 WHERE token_id = $1 AND ordinal = 0",
    }
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        for name, statement in swaps.items():
            leaked = await create(stub, name)
            named: dict[str, Any] = {"account_id": "acme", "id": leaked.token.id}
            grace = duration_pb2.Duration(seconds=60)
            rotated = await stub.Rotate(pb.RotateRequest(**named, grace=grace), timeout=9)
            async with session(database_url) as connection:
                before = await connection.fetch(
                    "SELECT digest, ordinal FROM secret WHERE token_id = $1", leaked.token.id
                )
                await connection.execute(statement, leaked.token.id)
                error = await refusal(stub.RetireSecrets(pb.RetireSecretsRequest(**named)))
                assert error.reason == "TOKEN_SEAL_INVALID", name
                assert await verdict(stub, leaked.secret) == "UNKNOWN", name
                await connection.executemany(
                    "UPDATE secret SET ordinal = $2 WHERE digest = $1",
                    [(row["digest"], row["ordinal"]) for row in before],
                )
            await stub.RetireSecrets(pb.RetireSecretsRequest(**named), timeout=9)
            assert await verdict(stub, leaked.secret) == "EXPIRED"
            assert await verdict(stub, rotated.secret) == "VALID"


async def test_a_changed_order_does_not_keep_the_older_secret(
    settings: Settings, database_url: str
) -> None:
    """With `retire_on_first_use`, making the older secret look newer does not let it live on."""
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        leaked = await create(stub, "leaked")
        named: dict[str, Any] = {"account_id": "acme", "id": leaked.token.id}
        rotated = await stub.Rotate(pb.RotateRequest(**named, retire_on_first_use=True), timeout=9)
        set_ordinal = "UPDATE secret SET ordinal = $2 WHERE token_id = $1 AND ordinal = $3"
        async with session(database_url) as connection:
            await connection.execute(set_ordinal, leaked.token.id, 9, 0)
            assert await verdict(stub, rotated.secret) == "VALID"
            assert await verdict(stub, leaked.secret) == "UNKNOWN"
            await connection.execute(set_ordinal, leaked.token.id, 0, 9)
        assert await verdict(stub, rotated.secret) == "VALID"

        async def ended() -> bool:
            return await verdict(stub, leaked.secret) == "EXPIRED"

        await eventually(ended, "the next use ends the older secret")


async def test_what_has_ended_cannot_be_revived(settings: Settings, database_url: str) -> None:
    """Restoring the columns of a deleted token, or of a retired or revoked secret, does not revive
    it."""
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        deleted, swept = await create(stub, "deleted"), await create(stub, "swept", account_id="b")
        rotated, revoked = await create(stub, "rotated"), await create(stub, "revoked")
        named: dict[str, Any] = {"account_id": "acme"}
        await stub.Delete(pb.DeleteRequest(**named, id=deleted.token.id), timeout=9)
        await stub.DeleteAll(pb.DeleteAllRequest(account_id="b"), timeout=9)
        await stub.Rotate(pb.RotateRequest(**named, id=rotated.token.id), timeout=9)
        await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=[revoked.secret]), timeout=9)
        async with session(database_url) as connection:
            await connection.execute("UPDATE token SET delete_time = NULL")
            await connection.execute("UPDATE secret SET retire_time = NULL, expire_time = NULL")
        for created in (deleted, swept, rotated, revoked):
            assert await verdict(stub, created.secret) == "UNKNOWN"


async def test_a_disabled_token_cannot_be_enabled_in_the_database(
    settings: Settings, database_url: str
) -> None:
    """Clearing disable_time does not enable a token. Enable does."""
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        created = await create(stub, "ci")
        named: dict[str, Any] = {"account_id": "acme", "id": created.token.id}
        await stub.Disable(pb.DisableRequest(**named), timeout=9)
        async with session(database_url) as connection:
            await connection.execute("UPDATE token SET disable_time = NULL")
            assert await verdict(stub, created.secret) == "UNKNOWN"
            await connection.execute("UPDATE token SET disable_time = now()")
        assert await verdict(stub, created.secret) == "DISABLED"
        await stub.Enable(pb.EnableRequest(**named), timeout=9)
        assert await verdict(stub, created.secret) == "VALID"


async def as_an_earlier_release(url: str) -> None:
    """Bring the rows into the state in which an earlier release leaves them."""
    async with session(url) as connection:
        await connection.execute("UPDATE secret SET seal = NULL, hint = '', create_time = NULL")
        await connection.execute("UPDATE token SET seal = NULL, seal_pepper_id = NULL")
        await connection.execute("UPDATE pepper SET all_sealed = NULL, tokens_sealed = NULL")


async def test_rows_of_an_earlier_release_are_sealed(settings: Settings, database_url: str) -> None:
    """Tokens of a release without seals work throughout, and are sealed shortly after the start.
    From then on, and after further starts, a row without a seal is refused."""
    async with stub_of(settings) as stub:
        await eventually(lambda: all_sealed(database_url), "the proof that all rows are sealed")
        old = [await create(stub, f"t{number}") for number in range(3)]
        gone = await create(stub, "gone")
        await stub.Delete(pb.DeleteRequest(account_id="acme", id=gone.token.id), timeout=9)
    await as_an_earlier_release(database_url)
    async with stub_of(settings) as stub:
        for created in old:
            assert await verdict(stub, created.secret) == "VALID"
        assert await verdict(stub, gone.secret) == "DELETED"
        await eventually(lambda: all_sealed(database_url), "the rows are sealed")
        for created in old:
            assert await verdict(stub, created.secret) == "VALID"
        # Hints of the earlier release's secrets are those of the token.
        await stub.Rotate(
            pb.RotateRequest(
                account_id="acme", id=old[0].token.id, grace=duration_pb2.Duration(seconds=60)
            ),
            timeout=9,
        )
        got = await stub.Get(pb.GetRequest(account_id="acme", id=old[0].token.id), timeout=5)
        assert [s.hint for s in got.token.secrets][1] == old[0].token.hint
        async with session(database_url) as connection:
            await connection.execute("UPDATE token SET delete_time = NULL")
        assert await verdict(stub, gone.secret) == "UNKNOWN"
    async with session(database_url) as connection:
        await connection.execute("UPDATE secret SET seal = NULL")
    async with stub_of(settings) as stub:

        async def refused() -> bool:
            return {await verdict(stub, created.secret) for created in old} == {"UNKNOWN"}

        await eventually(refused, "rows without a seal are refused")


async def test_an_earlier_release_in_the_fleet(settings: Settings, database_url: str) -> None:
    """While a server of an earlier release runs, changes that it would not respect are refused, its
    tokens work, and rows without a seal are sealed as they appear."""
    async with stub_of(settings) as stub:
        async with session(database_url) as connection:
            # Its row has no `rules`. Far from expired for the duration of the test.
            await connection.execute(
                "INSERT INTO verifier (id, incarnation, acknowledged_revision, lease_seconds, host,"
                " process_id, version) VALUES ('old', 1, 1000000, 60, 'h', 1, '0.0.1')"
            )
        await as_an_earlier_release(database_url)
        created = await create(stub, "ci")
        named: dict[str, Any] = {"account_id": "acme", "id": created.token.id}
        for call in (
            stub.Disable(pb.DisableRequest(**named), timeout=9),
            stub.Rotate(pb.RotateRequest(**named), timeout=9),
            stub.RevokeSecret(pb.RevokeSecretRequest(secrets=[created.secret]), timeout=9),
            create(stub, "limited", allowed_networks=["10.0.0.0/8"]),
        ):
            error = await refusal(call)
            assert (error.code, error.reason) == (
                grpc.StatusCode.FAILED_PRECONDITION,
                "FLEET_UPGRADING",
            )
        limited = pb.RateLimit(count=1, period=duration_pb2.Duration(seconds=1))
        async with session(database_url) as connection:
            # It knows all rules but rate limits.
            await connection.execute("UPDATE verifier SET rules = 2 WHERE id = 'old'")
        for call in (
            create(stub, "limited", rate_limit=limited),
            stub.Update(
                pb.UpdateRequest(
                    **named,
                    token=pb.Token(rate_limit=limited),
                    update_mask=field_mask_pb2.FieldMask(paths=["rate_limit"]),
                ),
                timeout=9,
            ),
        ):
            assert (await refusal(call)).reason == "FLEET_UPGRADING"
        async with session(database_url) as connection:
            await connection.execute("UPDATE verifier SET rules = 0 WHERE id = 'old'")
        narrower = pb.UpdateRequest(
            **named,
            token=pb.Token(name="renamed"),
            update_mask=field_mask_pb2.FieldMask(paths=["name"]),
        )
        assert (await stub.Update(narrower, timeout=9)).token.name == "renamed"
        await as_an_earlier_release(database_url)
    async with stub_of(settings) as stub:
        assert await verdict(stub, created.secret) == "VALID"

        async def sealed() -> bool:
            async with session(database_url) as connection:
                missing = await connection.fetchval(
                    "SELECT count(*) FROM secret WHERE seal IS NULL"
                )
            return bool(missing == 0)

        await eventually(sealed, "the row is sealed")
        await as_an_earlier_release(database_url)
        assert await verdict(stub, created.secret) == "VALID"
        await eventually(sealed, "a row that appears later is sealed")
        assert not await all_sealed(database_url)
        async with session(database_url) as connection:
            await connection.execute("DELETE FROM verifier WHERE id = 'old'")
        await eventually(lambda: all_sealed(database_url), "the proof, without the old server")

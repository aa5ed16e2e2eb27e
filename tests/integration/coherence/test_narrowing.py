"""Two servers and a client library with warm caches: what a change took away is refused everywhere
when its call returns."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import latchkey
import pytest
from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.settings.settings import Settings

from tests.contract.client.fake_watch import watching
from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.servers import make_settings, serving
from tests.helpers.waiting import eventually

# Long, so that a process that stalls for a while is not outwaited.
LEASE_SECONDS = 5.0
ADDRESS = "192.0.2.1"
PERMISSION = "orders:write"

Narrow = Callable[["Fleet", pb.CreateResponse], Awaitable[pb.Receipt]]


class Fleet:
    """Two servers, and a verifier of the client library at each."""

    def __init__(self, stubs: list[Any], verifiers: list[latchkey.Verifier]) -> None:
        self.stubs = stubs
        self.verifiers = verifiers

    async def verdicts(self, secret: str) -> list[str]:
        """What servers and verifiers answer to a question that needs all of a token's rights."""
        request = pb.VerifyRequest(
            secret=secret,
            required_scope=pb.SCOPE_WRITE,
            client_address=ADDRESS,
            required_permissions=[PERMISSION],
        )
        answers = [await stub.Verify(request, timeout=5) for stub in self.stubs]
        verified = [
            await verifier.verify(
                secret,
                latchkey.Scope.WRITE,
                client_address=ADDRESS,
                permissions=[PERMISSION],
            )
            for verifier in self.verifiers
        ]
        return [
            *(pb.Verdict.Name(answer.verdict).removeprefix("VERDICT_") for answer in answers),
            *(answer.verdict.name for answer in verified),
        ]

    def cached(self, secret: str) -> list[latchkey.Verification | None]:
        return [
            verifier.verify_nowait(
                secret,
                latchkey.Scope.WRITE,
                client_address=ADDRESS,
                permissions=[PERMISSION],
            )
            for verifier in self.verifiers
        ]


@pytest.fixture
def settings(database_url: str, pepper_file: Path) -> Settings:
    """The protocol is the same on both transports."""
    settings = make_settings(database_url, pepper_file, "native")
    return settings.model_copy(update={"lease_seconds": LEASE_SECONDS})


@pytest.fixture
async def fleet(settings: Settings) -> AsyncIterator[Fleet]:
    async with contextlib.AsyncExitStack() as stack:
        stubs, verifiers = [], []
        for _ in range(2):
            address = await stack.enter_async_context(serving(settings))
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            stubs.append(pb_grpc.TokenServiceStub(await stack.enter_async_context(channel)))
            verifier = latchkey.Verifier(address, timeout_seconds=5)
            verifiers.append(await stack.enter_async_context(verifier))
        for verifier in verifiers:
            await watching(verifier)
        yield Fleet(stubs, verifiers)


def update(token_id: str, path: str, **fields: Any) -> pb.UpdateRequest:
    mask = field_mask_pb2.FieldMask(paths=[path])
    return pb.UpdateRequest(
        account_id="acme", id=token_id, token=pb.Token(**fields), update_mask=mask
    )


def updates(path: str, **fields: Any) -> Narrow:
    async def narrow(fleet: Fleet, created: pb.CreateResponse) -> pb.Receipt:
        response = await fleet.stubs[0].Update(update(created.token.id, path, **fields), timeout=9)
        receipt: pb.Receipt = response.receipt
        return receipt

    return narrow


def calls(method: str, **fields: Any) -> Narrow:
    async def narrow(fleet: Fleet, created: pb.CreateResponse) -> pb.Receipt:
        request = getattr(pb, method + "Request")(account_id="acme", id=created.token.id, **fields)
        receipt: pb.Receipt = (await getattr(fleet.stubs[0], method)(request, timeout=9)).receipt
        return receipt

    return narrow


async def revokes(fleet: Fleet, created: pb.CreateResponse) -> pb.Receipt:
    request = pb.RevokeSecretRequest(secrets=[created.secret])
    receipt: pb.Receipt = (await fleet.stubs[0].RevokeSecret(request, timeout=9)).receipt
    return receipt


async def deletes_all(fleet: Fleet, created: pb.CreateResponse) -> pb.Receipt:
    request = pb.DeleteAllRequest(account_id="acme")
    receipt: pb.Receipt = (await fleet.stubs[0].DeleteAll(request, timeout=9)).receipt
    return receipt


NARROWING: dict[str, tuple[Narrow, str]] = {
    "scope": (updates("scope", scope=pb.SCOPE_READ), "INSUFFICIENT_SCOPE"),
    "networks": (
        updates("allowed_networks", allowed_networks=["10.0.0.0/8"]),
        "ADDRESS_NOT_ALLOWED",
    ),
    "permissions": (
        updates("permissions", permissions=["orders:read"]),
        "INSUFFICIENT_PERMISSIONS",
    ),
    "disable": (calls("Disable"), "DISABLED"),
    "rotate": (calls("Rotate"), "EXPIRED"),
    "revoke": (revokes, "EXPIRED"),
    "delete all": (deletes_all, "DELETED"),
}


async def test_narrowing_is_in_effect_everywhere(fleet: Fleet) -> None:
    """After each kind of change that narrows a cached token, no server and no client library
    answers VALID, from a cache or not. The receipt says that all of them confirmed it."""
    for name, (narrow, expected) in NARROWING.items():
        created = await fleet.stubs[1].Create(
            pb.CreateRequest(
                account_id="acme",
                name=name,
                scope=pb.SCOPE_WRITE,
                allowed_networks=["192.0.2.0/24"],
                permissions=["orders:*"],
            ),
            timeout=5,
        )

        async def warm(secret: str = created.secret) -> bool:
            assert await fleet.verdicts(secret) == ["VALID"] * 4
            return None not in fleet.cached(secret)

        await eventually(warm, "all caches to have the token")
        receipt = await narrow(fleet, created)
        assert all(
            answer is None or not answer.allowed for answer in fleet.cached(created.secret)
        ), name
        assert await fleet.verdicts(created.secret) == [expected] * 4, name
        assert receipt.HasField("effective_time"), name
        assert (receipt.verifiers_acknowledged, receipt.verifiers_outwaited) == (2, 0), name
        assert receipt.clients_acknowledged == 2, name


async def test_widening_reaches_every_cache(fleet: Fleet) -> None:
    """A change that widens a token ends the answers that caches keep, without waiting for them."""
    created = await fleet.stubs[0].Create(
        pb.CreateRequest(account_id="acme", name="ci", scope=pb.SCOPE_READ), timeout=5
    )
    token_id = created.token.id

    async def becomes(*expected: str) -> None:
        async def reached() -> bool:
            return set(await fleet.verdicts(created.secret)) == set(expected)

        await eventually(reached, f"{expected} everywhere")

    await becomes("INSUFFICIENT_SCOPE")
    await fleet.stubs[0].Update(update(token_id, "scope", scope=pb.SCOPE_WRITE), timeout=5)
    await becomes("INSUFFICIENT_PERMISSIONS")
    wider = update(token_id, "permissions", permissions=[PERMISSION])
    assert not (await fleet.stubs[0].Update(wider, timeout=5)).HasField("receipt")
    await becomes("VALID")
    named = {"account_id": "acme", "id": token_id}
    await fleet.stubs[1].Disable(pb.DisableRequest(**named), timeout=9)
    assert await fleet.verdicts(created.secret) == ["DISABLED"] * 4
    await fleet.stubs[0].Enable(pb.EnableRequest(**named), timeout=5)
    await becomes("VALID")


async def test_an_earlier_expiry_is_known_to_every_cache(fleet: Fleet) -> None:
    """When an Update with an earlier expiry has returned, caches stop at the new time."""
    created = await fleet.stubs[0].Create(
        pb.CreateRequest(
            account_id="acme", name="ci", scope=pb.SCOPE_WRITE, permissions=[PERMISSION]
        ),
        timeout=5,
    )
    assert await fleet.verdicts(created.secret) == ["VALID"] * 4
    soon = timestamp_pb2.Timestamp()
    soon.GetCurrentTime()
    soon.seconds += 2
    await fleet.stubs[0].Update(
        update(created.token.id, "expire_time", expire_time=soon), timeout=9
    )

    async def expired() -> bool:
        return await fleet.verdicts(created.secret) == ["EXPIRED"] * 4

    await eventually(expired, "the token to expire everywhere")


async def test_the_first_use_anywhere_ends_the_older_secret(fleet: Fleet) -> None:
    """A client library that verifies the new secret ends the old one on every server and client."""
    created = await fleet.stubs[0].Create(
        pb.CreateRequest(
            account_id="acme", name="ci", scope=pb.SCOPE_WRITE, permissions=[PERMISSION]
        ),
        timeout=5,
    )
    assert await fleet.verdicts(created.secret) == ["VALID"] * 4
    rotated = await fleet.stubs[0].Rotate(
        pb.RotateRequest(account_id="acme", id=created.token.id, retire_on_first_use=True),
        timeout=9,
    )
    assert await fleet.verdicts(created.secret) == ["VALID"] * 4
    answer = await fleet.verifiers[1].verify(rotated.secret)
    assert answer.allowed

    async def ended() -> bool:
        return await fleet.verdicts(created.secret) == ["EXPIRED"] * 4

    await eventually(ended, "the older secret to end everywhere")
    assert await fleet.verdicts(rotated.secret) == ["VALID"] * 4


async def test_changes_on_two_servers_at_once(fleet: Fleet) -> None:
    """Changes of one token through different servers do not undo each other, and a Delete wins."""
    created = await fleet.stubs[0].Create(
        pb.CreateRequest(account_id="acme", name="ci", scope=pb.SCOPE_READ), timeout=5
    )
    token_id, (a, b) = created.token.id, fleet.stubs
    named = {"account_id": "acme", "id": token_id}
    results = await asyncio.gather(
        a.Update(update(token_id, "scope", scope=pb.SCOPE_WRITE), timeout=9),
        b.Update(update(token_id, "permissions", permissions=[PERMISSION]), timeout=9),
        a.Rotate(pb.RotateRequest(**named, grace=duration_pb2.Duration(seconds=60)), timeout=9),
        b.Rotate(pb.RotateRequest(**named, grace=duration_pb2.Duration(seconds=60)), timeout=9),
        b.RetireSecrets(pb.RetireSecretsRequest(**named), timeout=9),
    )
    token = (await a.Get(pb.GetRequest(**named), timeout=5)).token
    assert token.scope == pb.SCOPE_WRITE
    assert list(token.permissions) == [PERMISSION]
    shown = {secret.hint for secret in token.secrets}
    secrets = [created.secret, results[2].secret, results[3].secret]
    for secret in secrets:
        expected = "VALID" if f"lk_…{secret[-4:]}" in shown else "EXPIRED"
        assert set(await fleet.verdicts(secret)) == {expected}
    await asyncio.gather(
        b.Delete(pb.DeleteRequest(**named), timeout=9),
        a.Update(update(token_id, "description", description="x"), timeout=9),
        return_exceptions=True,
    )
    for secret in secrets:
        assert set(await fleet.verdicts(secret)) == {"DELETED"}

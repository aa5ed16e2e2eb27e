"""The client library changes tokens of the real service, over both transports."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import latchkey
import pytest
from latchkey import Scope, Secret, SecretOutcome, TokenFilter, TokenOrder, Verdict, Verification
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.client.fake_watch import watching
from tests.helpers.waiting import WAIT_SECONDS, eventually

if TYPE_CHECKING:
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

ADDRESS = "192.0.2.7"
PERMISSIONS = ("orders:read",)


@pytest.fixture
async def client(address: str) -> AsyncIterator[latchkey.Client]:
    async with latchkey.Client(address, timeout_seconds=WAIT_SECONDS) as connected:
        yield connected


async def verify(verifier: latchkey.Verifier, secret: Secret) -> Verification:
    return await verifier.verify(
        secret, Scope.WRITE, client_address=ADDRESS, permissions=PERMISSIONS
    )


@asynccontextmanager
async def warm(address: str, secret: Secret) -> AsyncIterator[latchkey.Verifier]:
    """A verifier that has cached that `secret` is valid."""
    async with latchkey.Verifier(address, timeout_seconds=WAIT_SECONDS) as verifier:
        await watching(verifier)

        async def cached() -> bool:
            await verify(verifier, secret)
            answer = nowait(verifier, secret)
            return answer is not None and answer.allowed

        await eventually(cached, "the verifier to have the token")
        yield verifier


def nowait(verifier: latchkey.Verifier, secret: Secret) -> Verification | None:
    return verifier.verify_nowait(
        secret, Scope.WRITE, client_address=ADDRESS, permissions=PERMISSIONS
    )


async def rotated(client: latchkey.Client, token_id: str) -> Any:
    return await client.rotate("acme", token_id)


NARROWING: dict[str, tuple[Callable[[latchkey.Client, str], Awaitable[Any]], Verdict]] = {
    "disable": (lambda c, t: c.disable("acme", t), Verdict.DISABLED),
    "scope": (lambda c, t: c.update("acme", t, scope=Scope.READ), Verdict.INSUFFICIENT_SCOPE),
    "networks": (
        lambda c, t: c.update("acme", t, allowed_networks=["203.0.113.0/24"]),
        Verdict.ADDRESS_NOT_ALLOWED,
    ),
    "permissions": (
        lambda c, t: c.update("acme", t, permissions=["orders:list"]),
        Verdict.INSUFFICIENT_PERMISSIONS,
    ),
    "rotate": (rotated, Verdict.EXPIRED),
    "delete_all": (lambda c, _: c.delete_all("acme"), Verdict.DELETED),
}


@pytest.mark.parametrize("change", NARROWING)
async def test_what_is_taken_away_is_gone_when_the_call_returns(
    address: str, client: latchkey.Client, change: str
) -> None:
    """A verifier that has cached VALID does not answer it once the change has returned."""
    make, verdict = NARROWING[change]
    created = await client.create(
        "acme", "x", Scope.WRITE, allowed_networks=["192.0.2.0/24"], permissions=["orders:*"]
    )
    async with warm(address, created.secret) as verifier:
        changed = await make(client, created.token.id)
        answer = nowait(verifier, created.secret)
        assert answer is None or not answer.allowed
        assert changed.receipt is not None
        assert changed.receipt.effective_time is not None
        assert (await verify(verifier, created.secret)).verdict is verdict


async def test_revoked_secrets_are_gone_when_the_call_returns(
    address: str, client: latchkey.Client, secret: str
) -> None:
    """A leaked secret is dead everywhere, and its token gets another one."""
    created = await client.create("acme", "x", Scope.WRITE, permissions=["orders:*"])
    async with warm(address, created.secret) as verifier:
        revocation = await client.revoke_secrets([secret, created.secret, created.secret])
        answer = nowait(verifier, created.secret)
        assert answer is None or not answer.allowed
        assert revocation.outcomes[0] is SecretOutcome.UNKNOWN
        assert SecretOutcome.ENDED in revocation.outcomes
        assert revocation.receipt is not None
        again = await client.rotate("acme", created.token.id, grace=timedelta(hours=1))
        assert (await verify(verifier, again.secret)).allowed
        assert (await verify(verifier, created.secret)).verdict is Verdict.EXPIRED


async def test_update_changes_only_what_is_given(client: latchkey.Client) -> None:
    """Each call leaves the other fields as they are. A widening change has no receipt."""
    expiry = datetime(2099, 1, 1, tzinfo=UTC)
    created = await client.create(
        "acme", "x", Scope.READ, labels={"a": "b"}, expire_time=expiry, description="d"
    )
    token_id = created.token.id
    renamed = await client.update("acme", token_id, name="y")
    assert (renamed.token.name, renamed.token.labels) == ("y", {"a": "b"})
    assert renamed.token.expire_time == expiry
    assert renamed.receipt is None
    widened = await client.update("acme", token_id, scope=Scope.WRITE, expire_time=None)
    assert widened.receipt is None
    token = await client.get("acme", token_id)
    assert (token.scope, token.expire_time, token.description) == (Scope.WRITE, None, "d")
    assert token == widened.token
    disabled = await client.disable("acme", token_id)
    assert disabled.token.disable_time is not None
    assert (await client.enable("acme", token_id)).token.disable_time is None


async def test_a_retry_of_create_leaves_one_token_and_one_secret(
    client: latchkey.Client, stub: TokenServiceAsyncStub
) -> None:
    """If the answer to a Create is lost, the retry returns the same token with another secret, and
    the lost secret is dead."""
    request_id = uuid.uuid4()
    lost = await client.create("acme", "x", Scope.READ, request_id=request_id)
    assert lost.receipt is None
    again = await client.create("acme", "x", Scope.READ, request_id=request_id)
    assert again.token.id == lost.token.id
    assert again.receipt is not None
    verdicts = [(await client.verify(made.secret)).verdict for made in (lost, again)]
    assert verdicts == [Verdict.EXPIRED, Verdict.VALID]
    with pytest.raises(latchkey.AlreadyExists) as caught:
        await client.create("acme", "other", Scope.READ, request_id=request_id)
    assert caught.value.reason == "REQUEST_ID_REUSED"
    listed = await stub.List(pb.ListRequest(account_id="acme"))
    assert len(listed.tokens) == 1


class LosesAnswers(grpc.aio.UnaryUnaryClientInterceptor):
    """Lets the first call of each method reach the service, and loses its answer."""

    def __init__(self) -> None:
        self.lost: set[Any] = set()

    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        call = await continuation(client_call_details, request)
        if client_call_details.method not in self.lost:
            self.lost.add(client_call_details.method)
            await call
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "lost"
            )
        return call


async def test_lost_answers_leave_no_orphan(address: str) -> None:
    """The library hides a lost answer of Create and Rotate: the secret that it returns works, and
    the token has no other secret that works."""
    losing = LosesAnswers()
    async with (
        grpc.aio.insecure_channel(address, interceptors=[losing]) as channel,
        latchkey.Client(channel=channel, timeout_seconds=WAIT_SECONDS) as client,
    ):
        created = await client.create("acme", "x", Scope.READ)
        assert len(losing.lost) == 1
        assert created.receipt is not None
        assert len((await client.get("acme", created.token.id)).secrets) == 1
        assert (await client.verify(created.secret)).allowed
        rotation = await client.rotate("acme", created.token.id, grace=timedelta(hours=1))
        assert (await client.verify(rotation.secret)).allowed
        assert (await client.verify(created.secret)).allowed
        working = (await client.get("acme", created.token.id)).secrets
        assert [secret.hint[-4:] for secret in working] == [
            made.secret.reveal()[-4:] for made in (rotation, created)
        ]


async def test_list_by_filter(client: latchkey.Client) -> None:
    """Filters, orders and counts of a real service reach the caller."""
    first = await client.create("acme", "first", Scope.READ, ttl=timedelta(days=2))
    second = await client.create("acme", "second", Scope.WRITE, ttl=timedelta(days=1))
    await client.create("acme", "third", Scope.READ)
    wanted = TokenFilter(never_expires=False)
    found = client.list("acme", wanted, order=TokenOrder.EXPIRY, page_size=1)
    assert [token.id async for token in found] == [second.token.id, first.token.id]
    page = await client.list_page("acme", wanted, page_size=1, include_total_size=True)
    assert (page.total_size, page.total_size_capped) == (2, False)
    by_id = await client.list_page("acme", TokenFilter(ids=(second.token.id,)))
    assert [token.id for token in by_id.tokens] == [second.token.id]


async def test_delete_all_by_filter(client: latchkey.Client) -> None:
    """A dry run lists exactly the tokens that the call then deletes."""
    kept = await client.create("acme", "kept", Scope.READ)
    gone = await client.create("acme", "gone", Scope.READ, labels={"team": "data"})
    wanted = TokenFilter(labels={"team": "data"})
    looked = await client.delete_all("acme", wanted, dry_run=True)
    assert (looked.count, [token.id for token in looked.tokens]) == (1, [gone.token.id])
    deleted = await client.delete_all("acme", wanted)
    assert (deleted.count, deleted.more) == (1, False)
    assert deleted.receipt is not None
    assert [token.id async for token in client.list("acme")] == [kept.token.id]


async def test_a_refused_verify_is_not_the_first_use(address: str, client: latchkey.Client) -> None:
    """A verifier that was refused the new secret asks the service again for a use that is allowed,
    which then ends the old secret."""
    created = await client.create("acme", "ci", Scope.READ)
    async with latchkey.Verifier(address, timeout_seconds=WAIT_SECONDS) as verifier:
        await watching(verifier)

        async def cached() -> bool:
            await verifier.verify(created.secret)
            return verifier.verify_nowait(created.secret) is not None

        await eventually(cached, "the verifier to cache answers")
        rotated = await client.rotate("acme", created.token.id, retire_on_first_use=True)
        for _ in range(3):
            refused = await verifier.verify(rotated.secret, Scope.WRITE)
            assert refused.verdict is Verdict.INSUFFICIENT_SCOPE
            assert verifier.verify_nowait(rotated.secret) is None
        assert (await verifier.verify(created.secret)).allowed
        assert (await verifier.verify(rotated.secret)).allowed

        async def ended() -> bool:
            return (await verifier.verify(created.secret)).verdict is Verdict.EXPIRED

        await eventually(ended, "the older secret to end")
        assert (await verifier.verify(rotated.secret)).allowed

"""The gRPC guard passes address and permissions to a scripted Latchkey over real gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import latchkey
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from latchkey import Scope
from latchkey.guards.grpc import GuardInterceptor
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.guarded_service import Demo, ask, detail, refused, service

if TYPE_CHECKING:
    from tests.contract.client.conftest import FakeLatchkey


@pytest.mark.parametrize("kind", ["uu", "sync_uu", "ss", "us_write"])
async def test_permissions_and_address_reach_the_service(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str, kind: str
) -> None:
    """The guard asks for the permissions of the method, and passes the address of the connection.
    A header of an untrusted peer does not change it."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    own = {f"/demo.Demo/{kind}": ["orders:cancel"]}
    guard = GuardInterceptor(verifier, None, required_permissions=["a:b"], permissions=own)
    async with service(Demo(), guard) as channel:
        await ask(channel, kind, f"Bearer {secret}", forwarded_for=["192.0.2.1"])
    assert fake.calls[0].request == pb.VerifyRequest(
        secret=secret,
        client_address="127.0.0.1",
        required_permissions=["orders:cancel"],
        spends_shares=True,
    )


async def test_an_address_from_a_trusted_proxy(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str
) -> None:
    """Behind a trusted proxy, the address is the last one in x-forwarded-for. A proxy that names
    none leaves it unknown."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    guard = GuardInterceptor(
        verifier, None, required_permissions=["a:b"], trusted_proxies=["127.0.0.0/8"]
    )
    async with service(Demo(), guard) as channel:
        for forwarded_for in (["203.0.113.5, 192.0.2.1"], ["203.0.113.5", "192.0.2.2"], []):
            await ask(channel, "uu", f"Bearer {secret}", forwarded_for=forwarded_for)
    asked = [call.request.client_address for call in fake.calls]
    assert asked == ["192.0.2.1", "192.0.2.2", ""]
    assert {tuple(call.request.required_permissions) for call in fake.calls} == {("a:b",)}


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (pb.VERDICT_INSUFFICIENT_SCOPE, "TOKEN_SCOPE_INSUFFICIENT"),
        (pb.VERDICT_INSUFFICIENT_PERMISSIONS, "TOKEN_PERMISSIONS_INSUFFICIENT"),
        (pb.VERDICT_ADDRESS_NOT_ALLOWED, "TOKEN_ADDRESS_NOT_ALLOWED"),
    ],
)
async def test_a_live_token_that_does_not_suffice(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str, verdict: int, reason: str
) -> None:
    """The holder of a live token learns what it lacks."""
    fake.on("Verify", fake.verdict(verdict))
    async with service(Demo(), GuardInterceptor(verifier, Scope.READ)) as channel:
        error = await refused(channel, "uu", f"Bearer {secret}")
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert detail(error, error_details_pb2.ErrorInfo).reason == reason


async def test_a_token_that_is_used_too_often(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str
) -> None:
    """The holder learns the limit and when to try again."""
    seven = duration_pb2.Duration(seconds=7)
    limited = pb.VerifyResponse(verdict=pb.VERDICT_RATE_LIMITED, retry_after=seven)
    limited.token.rate_limit.count = 5
    limited.token.rate_limit.period.seconds = 60
    fake.on("Verify", fake.says(limited))
    async with service(Demo(), GuardInterceptor(verifier, Scope.READ)) as channel:
        error = await refused(channel, "uu", f"Bearer {secret}")
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail(error, error_details_pb2.ErrorInfo).reason == "TOKEN_RATE_LIMITED"
    assert detail(error, error_details_pb2.RetryInfo).retry_delay.seconds == 7
    assert "5/minute" in detail(error, error_details_pb2.QuotaFailure).violations[0].description


def test_a_guard_with_a_typing_error_cannot_be_created(verifier: latchkey.Verifier) -> None:
    """Permissions and proxies are checked when the guard is created."""
    for wrong in (
        {"required_permissions": "orders:read"},
        {"required_permissions": ["orders"]},
        {"permissions": {"/a.B/C": ["orders"]}},
        {"trusted_proxies": "10.0.0.0/8"},
        {"trusted_proxies": ["10.0.0.0/80"]},
    ):
        arguments: Any = wrong
        with pytest.raises((TypeError, ValueError)):
            GuardInterceptor(verifier, Scope.READ, **arguments)

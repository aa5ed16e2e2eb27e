"""The gRPC guard around a real grpc.aio service, with a scripted Latchkey over real gRPC."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import grpc
import latchkey
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from latchkey import Scope
from latchkey.guards.grpc import GuardInterceptor
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.guarded_service import KINDS, Demo, ask, detail, refused, service

if TYPE_CHECKING:
    from tests.contract.client.conftest import FakeLatchkey

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("kind", KINDS)
async def test_a_valid_token_is_accepted(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str, kind: str
) -> None:
    """Every kind of handler runs as without the guard, and sees the token."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    demo = Demo()
    async with service(demo, GuardInterceptor(verifier, Scope.READ)) as channel:
        for _ in range(2):
            answers = await ask(channel, kind, f"Bearer {secret}")
            assert set(answers) == {b"t1:'hi'"}
            assert len(answers) == (2 if kind in ("us", "sync_us") else 1)
    assert demo.reached == [kind, kind]
    assert fake.calls[0].request == pb.VerifyRequest(
        secret=secret,
        required_scope=pb.SCOPE_READ,
        client_address="127.0.0.1",
        spends_shares=True,
    )


@pytest.mark.parametrize("kind", [*KINDS, "uu_nonexistent", "ss_nonexistent"])
async def test_calls_without_a_valid_token_are_refused(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str, kind: str
) -> None:
    """No handler runs, nothing is parsed, and the caller cannot learn which methods exist."""
    demo = Demo()
    async with service(demo, GuardInterceptor(verifier, Scope.READ)) as channel:
        error = await refused(channel, kind)
        assert error.code() is UNAUTHENTICATED
        info = detail(error, error_details_pb2.ErrorInfo)
        assert (info.reason, info.domain) == ("TOKEN_MISSING", "latchkey")

        error = await refused(channel, kind, "Bearer hunter2")
        assert error.code() is UNAUTHENTICATED
        assert detail(error, error_details_pb2.ErrorInfo).reason == "TOKEN_INVALID"
        assert "hunter2" not in str(error)

        fake.on("Verify", fake.verdict(pb.VERDICT_INSUFFICIENT_SCOPE))
        error = await refused(channel, kind, f"Bearer {secret}")
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert detail(error, error_details_pb2.ErrorInfo).reason == "TOKEN_SCOPE_INSUFFICIENT"
    assert demo.reached == []
    assert demo.parsed == 0


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("kind", ["uu", "ss", "sync_uu", "sync_us", "uu_nonexistent"])
@pytest.mark.parametrize("fault", ["status", "internal", "hang", "dead", "silent", "no token"])
async def test_without_latchkey_calls_are_refused(
    fake: FakeLatchkey,
    dead_target: str,
    silent_target: str,
    secret: str,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    fault: str,
) -> None:
    """Whatever fault Latchkey has, the status is UNAVAILABLE and no handler runs."""
    caplog.set_level(logging.DEBUG)
    answers = {
        "status": fake.fails(grpc.StatusCode.UNAVAILABLE, secret),
        "internal": fake.fails(grpc.StatusCode.INTERNAL, secret),
        "hang": fake.hangs(),
        "no token": fake.verdict(pb.VERDICT_VALID, token=False),
    }
    fake.on("Verify", answers.get(fault, fake.hangs()))
    target = {"dead": dead_target, "silent": silent_target}.get(fault, fake.target)
    demo = Demo()
    async with (
        latchkey.Verifier(target, timeout_seconds=0.2) as verifier,
        service(demo, GuardInterceptor(verifier, Scope.READ)) as channel,
    ):
        error = await refused(channel, kind, f"Bearer {secret}")
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert detail(error, error_details_pb2.ErrorInfo).reason == "VERIFIER_UNAVAILABLE"
    assert demo.reached == []
    assert secret not in caplog.text + str(error)


async def test_the_requested_delay_is_passed_on(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str
) -> None:
    """RetryInfo reaches the caller of the guarded service, including in the form that gRPC's own
    retries read."""
    wait = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=30))
    fake.on("Verify", fake.fails(grpc.StatusCode.UNAVAILABLE, "busy", wait))
    async with service(Demo(), GuardInterceptor(verifier, Scope.READ)) as channel:
        error = await refused(channel, "uu", f"Bearer {secret}")
    assert detail(error, error_details_pb2.RetryInfo) == wait
    trailing = dict(tuple(error.trailing_metadata() or ()))
    assert trailing["grpc-retry-pushback-ms"] == "30000"


async def test_unknown_methods_are_unimplemented_for_valid_callers(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str
) -> None:
    """A valid caller learns that a method does not exist, whatever kind of call it makes."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    async with service(Demo(), GuardInterceptor(verifier, Scope.READ)) as channel:
        for kind in ("uu_no", "us_no", "su_no", "ss_no"):
            error = await refused(channel, kind, f"Bearer {secret}")
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_scopes_by_method_and_public_methods(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str
) -> None:
    """Single methods, by their exact names, can require another scope or none."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    guard = GuardInterceptor(
        verifier,
        Scope.READ,
        scopes={"/demo.Demo/us": Scope.WRITE, "/demo.Demo/ss": None},
        public={"/demo.Demo/uu", "/demo.Demo/uu_gone"},
    )
    async with service(Demo(), guard) as channel:
        assert await ask(channel, "uu") == [b"nobody:'hi'"]
        assert (await refused(channel, "uu_gone")).code() is grpc.StatusCode.UNIMPLEMENTED
        assert (await refused(channel, "sync_uu")).code() is UNAUTHENTICATED
        for kind in ("us", "ss", "su"):
            await ask(channel, kind, f"Bearer {secret}")
    scopes = [call.request.required_scope for call in fake.calls]
    assert scopes == [pb.SCOPE_WRITE, pb.SCOPE_UNSPECIFIED, pb.SCOPE_READ]


async def test_exactly_one_authorization(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str
) -> None:
    """Two values are refused even if both are valid. The scheme's letter case does not matter."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    demo = Demo()
    async with service(demo, GuardInterceptor(verifier, Scope.READ)) as channel:
        bearer = f"Bearer {secret}"
        for values in ((bearer, bearer), (bearer, "Basic x"), (f"{bearer},{bearer}",)):
            assert (await refused(channel, "uu", *values)).code() is UNAUTHENTICATED
        assert (await refused(channel, "uu", f"Basic {secret}")).code() is UNAUTHENTICATED
        assert demo.reached == []
        assert fake.calls == []
        await ask(channel, "uu", f"bEARER {secret}")


@pytest.mark.parametrize("kind", ["uu", "sync_uu"])
async def test_the_callers_deadline_bounds_the_verify(
    fake: FakeLatchkey, secret: str, kind: str
) -> None:
    """Latchkey gets at most the call's remaining time, and at most the verifier's bound."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    async with (
        latchkey.Verifier(fake.target, timeout_seconds=20) as verifier,
        service(Demo(), GuardInterceptor(verifier, Scope.READ)) as channel,
    ):
        await ask(channel, kind, f"Bearer {secret}", timeout=8)
        await ask(channel, kind, f"Bearer {secret}", timeout=None)
        await ask(channel, kind, f"Bearer {secret}", timeout=600)
    left = [call.seconds_left for call in fake.calls]
    assert left[0] is not None
    assert 4 < left[0] <= 8.1
    for seconds in left[1:]:
        assert seconds is not None
        assert 10 < seconds <= 20.1


class OddDetails:
    """Call details from a transport that is less strict than gRPC's."""

    method = "/demo.Demo/uu"

    def __init__(self, *authorization: str | bytes) -> None:
        self.invocation_metadata = tuple(("Authorization", value) for value in authorization)


class OddContext:
    """A context whose abort() does not raise."""

    def __init__(self) -> None:
        self.codes: list[grpc.StatusCode] = []

    def peer(self) -> str:
        return "ipv4:192.0.2.1:5"

    def time_remaining(self) -> float:
        return 0.0

    async def abort(self, code: grpc.StatusCode, _text: str, _trailing: object) -> None:
        self.codes.append(code)


@pytest.mark.parametrize(
    "value",
    ["Bearer \udcff", "Bearer \u00e9", b"Bearer \xff\xfe", b"\xff", "Bearer \x00", "\u212a"],
)
async def test_odd_header_values_are_refused(
    verifier: latchkey.Verifier, value: str | bytes
) -> None:
    """Invalid bytes and text are refused, even if abort() returns."""
    demo = Demo()

    async def continuation(_details: object) -> Any:
        return demo.handlers()["uu"]

    guard = GuardInterceptor(verifier, Scope.READ)
    handler = await guard.intercept_service(continuation, OddDetails(value))
    context = OddContext()
    assert await handler.unary_unary(b"hi", context) is None
    assert context.codes == [UNAUTHENTICATED]
    assert demo.reached == []


async def test_options_are_checked_at_construction(verifier: latchkey.Verifier) -> None:
    """Mistakes that would open or break the guard are reported at start-up."""
    with pytest.raises(TypeError):
        GuardInterceptor(verifier, Scope.READ, public="/demo.Demo/uu")
    with pytest.raises(ValueError, match="UNSPECIFIED"):
        GuardInterceptor(verifier, Scope.UNSPECIFIED)
    with pytest.raises(TypeError):
        GuardInterceptor(verifier, Scope.READ, scopes={"/x": "read"})  # type: ignore[dict-item]

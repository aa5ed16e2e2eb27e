"""The gRPC guard around a real grpc.aio service, with a scripted Latchkey over real gRPC."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import latchkey
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from latchkey import Scope
from latchkey.guards import current_token
from latchkey.guards.grpc import GuardInterceptor
from latchkey_proto.v1 import token_service_pb2 as pb

if TYPE_CHECKING:
    from tests.contract.client.conftest import FakeLatchkey

KINDS = ("uu", "us", "su", "ss", "sync_uu", "sync_us", "sync_su", "sync_ss", "us_write", "ss_write")
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


def who(request: object = b"") -> bytes:
    token = current_token()
    return f"{token.id if token else 'nobody'}:{request!r}".encode()


class Demo:
    """A service with every kind of handler that grpc.aio supports. Each answers with who()."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.parsed = 0

    def parse(self, raw: bytes) -> str:
        self.parsed += 1
        return raw.decode()

    def handlers(self) -> dict[str, Any]:
        reached = self.reached

        async def uu(request: str, _context: Any) -> bytes:
            reached.append("uu")
            return who(request)

        async def us(request: str, _context: Any) -> AsyncIterator[bytes]:
            reached.append("us")
            yield who(request)
            yield who(request)

        async def su(requests: AsyncIterator[str], _context: Any) -> bytes:
            reached.append("su")
            return who("".join([r async for r in requests]))

        async def ss(requests: AsyncIterator[str], _context: Any) -> AsyncIterator[bytes]:
            reached.append("ss")
            async for request in requests:
                yield who(request)

        def sync_uu(request: str, _context: Any) -> bytes:
            reached.append("sync_uu")
            return who(request)

        def sync_us(request: str, _context: Any) -> Iterator[bytes]:
            reached.append("sync_us")
            yield who(request)
            yield who(request)

        def sync_su(requests: Iterator[str], _context: Any) -> bytes:
            reached.append("sync_su")
            return who("".join(requests))

        def sync_ss(requests: Iterator[str], _context: Any) -> Iterator[bytes]:
            reached.append("sync_ss")
            for request in requests:
                yield who(request)

        async def us_write(request: str, context: Any) -> None:
            reached.append("us_write")
            await context.write(who(request))

        async def ss_write(_requests: object, context: Any) -> None:
            reached.append("ss_write")
            while (request := await context.read()) is not grpc.aio.EOF:
                await context.write(who(request))

        makers: dict[str, Callable[..., Any]] = {
            "uu": grpc.unary_unary_rpc_method_handler,
            "us": grpc.unary_stream_rpc_method_handler,
            "su": grpc.stream_unary_rpc_method_handler,
            "ss": grpc.stream_stream_rpc_method_handler,
        }
        behaviours = (uu, us, su, ss, sync_uu, sync_us, sync_su, sync_ss, us_write, ss_write)
        return {
            name: makers[name.removeprefix("sync_")[:2]](behaviour, self.parse)
            for name, behaviour in zip(KINDS, behaviours, strict=True)
        }


@asynccontextmanager
async def service(demo: Demo, guard: GuardInterceptor) -> AsyncIterator[grpc.aio.Channel]:
    threads = ThreadPoolExecutor(1)
    server = grpc.aio.server(threads, interceptors=[guard], options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("demo.Demo", demo.handlers())]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)
        # Not on the event loop, which a thread may need to finish its call.
        await asyncio.to_thread(threads.shutdown)


async def ask(
    channel: grpc.aio.Channel,
    kind: str,
    *authorization: str,
    send: bool = True,
    forwarded_for: Sequence[str] = (),
    timeout: float | None = 10.0,  # noqa: ASYNC109 - gRPC's own timeout, sent to the server
) -> list[bytes]:
    """Call a method of Demo with these authorization values and return its answers.

    Without `send`, request streams stay silent. gRPC's Python client reports INTERNAL if a server
    refuses a stream while the client is writing.
    """
    options: Any = {
        "metadata": (
            *(("authorization", value) for value in authorization),
            *(("x-forwarded-for", value) for value in forwarded_for),
        ),
        "timeout": timeout,
    }
    untyped: Any = channel  # the stubs have no type for raw bytes
    method, short = f"/demo.Demo/{kind}", kind.removeprefix("sync_")[:2]
    requests = iter([b"hi"]) if send else None
    if short == "uu":
        return [await untyped.unary_unary(method)(b"hi", **options)]
    if short == "su":
        return [await untyped.stream_unary(method)(requests, **options)]
    if short == "us":
        return [answer async for answer in untyped.unary_stream(method)(b"hi", **options)]
    call = untyped.stream_stream(method)(requests, **options)
    if not send:
        return [await call.read()]
    return [answer async for answer in call]


async def refused(
    channel: grpc.aio.Channel, kind: str, *authorization: str, **options: Any
) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(channel, kind, *authorization, send=False, **options)
    return caught.value


def detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    """Return the first rich detail of `kind`."""
    trailing: dict[str, Any] = dict(tuple(error.trailing_metadata()))
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    for packed in status.details:
        message = kind()
        if packed.Unpack(message):
            return message
    return None


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
        secret=secret, required_scope=pb.SCOPE_READ, client_address="127.0.0.1"
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
    """RetryInfo reaches the caller of the guarded service."""
    wait = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=30))
    fake.on("Verify", fake.fails(grpc.StatusCode.UNAVAILABLE, "busy", wait))
    async with service(Demo(), GuardInterceptor(verifier, Scope.READ)) as channel:
        error = await refused(channel, "uu", f"Bearer {secret}")
    assert detail(error, error_details_pb2.RetryInfo) == wait


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
        secret=secret, client_address="127.0.0.1", required_permissions=["orders:cancel"]
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

"""The gRPC guard for threads around a real grpc server, and the options of both gRPC guards."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from latchkey import RateLimit, Scope, Secret, Token, Unavailable, Verdict, Verification
from latchkey.guards import current_token, current_token_or_none
from latchkey.guards import grpc as aio_guard
from latchkey.guards._grpc import CallRules
from latchkey.guards.grpc_sync import GuardInterceptor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

SECRET = "lk" + "_" + "S3cr3t" * 9 + "abc"
BEARER = (("authorization", f"Bearer  {SECRET} "),)
TOKEN = Token(
    id="t1",
    account_id="acme",
    name="ci",
    scope=Scope.READ,
    create_time=datetime(2026, 1, 1, tzinfo=UTC),
)
KINDS = ("uu", "us", "su", "ss")


class Stub:
    """A verifier that knows one token, TOKEN, with scope READ, unless it is set to fail."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.answer: Verification | None = None
        """The answer about TOKEN to a question without requirements. None: VALID."""
        self.asked: list[float | None] = []
        self.addresses: list[str] = []

    def verify(
        self,
        secret: Secret,
        scope: Scope | None,
        /,
        *,
        client_address: str = "",
        permissions: Collection[str] = (),
        timeout_seconds: float | None = None,
    ) -> Verification:
        self.asked.append(timeout_seconds)
        self.addresses.append(client_address)
        if self.failure is not None:
            raise self.failure
        if secret.reveal() != SECRET:
            return Verification(verdict=Verdict.UNKNOWN)
        if permissions:
            return Verification(verdict=Verdict.INSUFFICIENT_PERMISSIONS, token=TOKEN)
        if scope is Scope.WRITE:
            return Verification(verdict=Verdict.INSUFFICIENT_SCOPE, token=TOKEN)
        return self.answer or Verification(verdict=Verdict.VALID, token=TOKEN)


class Demo:
    """A service with each kind of method. `reached` lists the methods that ran, `parsed` counts
    requests that were parsed."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.parsed = 0

    def parse(self, data: bytes) -> bytes:
        self.parsed += 1
        return data

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        def uu(_request: Any, _context: Any) -> bytes:
            self.reached.append("uu")
            return current_token().name.encode()

        def us(_request: Any, _context: Any) -> Iterator[bytes]:
            self.reached.append("us")
            for _ in range(2):
                yield current_token().name.encode()

        def su(requests: Any, _context: Any) -> bytes:
            self.reached.append("su")
            return b"".join(requests) + current_token().name.encode()

        def ss(requests: Any, _context: Any) -> Iterator[bytes]:
            self.reached.append("ss")
            for _ in requests:
                yield current_token().name.encode()

        def open_to_all(_request: Any, _context: Any) -> bytes:
            return b"nobody" if current_token_or_none() is None else b"leaked"

        return {
            "uu": grpc.unary_unary_rpc_method_handler(uu, self.parse),
            "us": grpc.unary_stream_rpc_method_handler(us, self.parse),
            "su": grpc.stream_unary_rpc_method_handler(su, self.parse),
            "ss": grpc.stream_stream_rpc_method_handler(ss, self.parse),
            "open": grpc.unary_unary_rpc_method_handler(open_to_all),
        }


@contextlib.contextmanager
def serving(verifier: Stub, **options: Any) -> Iterator[tuple[grpc.Channel, Demo]]:
    demo = Demo()
    guard = GuardInterceptor(verifier, Scope.READ, public={"/demo.Demo/open"}, **options)
    # One thread serves all calls, which so could see each other's tokens.
    server = grpc.server(
        ThreadPoolExecutor(1), interceptors=[guard], options=[("grpc.so_reuseport", 0)]
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("demo.Demo", demo.handlers())]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel, demo
    finally:
        server.stop(None).wait(10)


def call(
    channel: grpc.Channel,
    kind: str,
    metadata: tuple[tuple[str, str], ...] = (),
    timeout: float | None = 10,
) -> Any:
    """Call a method, with two messages if it takes a stream. Return its answer or answers."""
    path = f"/demo.Demo/{kind}"
    method: Any
    if kind == "us":
        method = channel.unary_stream(path)
        return list(method(b"x", metadata=metadata, timeout=timeout))
    if kind == "su":
        method = channel.stream_unary(path)
        return method(iter([b"x", b"y"]), metadata=metadata, timeout=timeout)
    if kind == "ss":
        method = channel.stream_stream(path)
        return list(method(iter([b"x", b"y"]), metadata=metadata, timeout=timeout))
    method = channel.unary_unary(path)
    return method(b"x", metadata=metadata, timeout=timeout)


def refused(*arguments: Any) -> tuple[grpc.StatusCode, str, float | None]:
    """Make a call that must be refused. Return the status, the reason and the retry delay."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    error: Any = caught.value
    raw = dict(error.trailing_metadata()).get("grpc-status-details-bin")
    if raw is None:
        return error.code(), "", None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    delay = None
    for detail in status_pb2.Status.FromString(raw).details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            delay = retry.retry_delay.ToTimedelta().total_seconds()
    return error.code(), info.reason, delay


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_uses_are_refused(kind: str) -> None:
    """The holder of a token that is used too often learns the limit and when to try again."""
    stub = Stub()
    stub.answer = Verification(
        verdict=Verdict.RATE_LIMITED,
        token=replace(TOKEN, rate_limit=RateLimit(100, timedelta(minutes=1), 20)),
        retry_after=timedelta(seconds=7),
    )
    with serving(stub) as (channel, demo), pytest.raises(grpc.RpcError) as caught:
        call(channel, kind, BEARER)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailing = dict(error.trailing_metadata())
    assert trailing["grpc-retry-pushback-ms"] == "7000"
    quota = error_details_pb2.QuotaFailure()
    assert any(
        packed.Unpack(quota)
        for packed in status_pb2.Status.FromString(trailing["grpc-status-details-bin"]).details
    )
    assert quota.violations[0].description == "the token's rate limit is 100/minute, burst 20"
    assert demo.reached == []


def test_valid_tokens_are_let_in() -> None:
    """Methods of every kind see the token, and calls in the same thread do not see each other's."""
    with serving(Stub()) as (channel, demo):
        assert call(channel, "uu", BEARER) == b"ci"
        assert call(channel, "us", BEARER) == [b"ci", b"ci"]
        assert call(channel, "su", BEARER) == b"xyci"
        assert call(channel, "ss", BEARER) == [b"ci", b"ci"]
        assert call(channel, "open") == b"nobody"
        assert demo.reached == list(KINDS)


@pytest.mark.parametrize("kind", [*KINDS, "nonexistent"])
def test_other_calls_are_refused(kind: str) -> None:
    """Without a valid token no method runs, and no request of a single message is parsed. The
    answer does not show whether a method exists."""
    with serving(Stub()) as (channel, demo):
        unauthenticated = grpc.StatusCode.UNAUTHENTICATED
        for metadata, reason in (
            ((), "TOKEN_MISSING"),
            ((("authorization", "Basic dTpw"),), "TOKEN_MISSING"),
            ((("authorization", "Bearer wr0ng"),), "TOKEN_INVALID"),
            ((*BEARER, *BEARER), "TOKEN_INVALID"),
        ):
            assert refused(channel, kind, metadata) == (unauthenticated, reason, None)
        assert demo.reached == []
        assert demo.parsed == 0
    down = Unavailable("down", retry_after=timedelta(seconds=2))
    for failure, delay in ((down, 2.0), (RuntimeError(SECRET), None)):
        with serving(Stub(failure)) as (channel, demo):
            expected = (grpc.StatusCode.UNAVAILABLE, "VERIFIER_UNAVAILABLE", delay)
            assert refused(channel, kind, BEARER) == expected
            assert demo.reached == []


def test_scopes_and_unknown_methods() -> None:
    """A method may require more. A valid caller learns that a method does not exist."""
    with serving(Stub(), scopes={"/demo.Demo/uu": Scope.WRITE}) as (channel, demo):
        assert refused(channel, "uu", BEARER)[:2] == (
            grpc.StatusCode.PERMISSION_DENIED,
            "TOKEN_SCOPE_INSUFFICIENT",
        )
        assert refused(channel, "nonexistent", BEARER)[0] is grpc.StatusCode.UNIMPLEMENTED
        assert demo.reached == []


def test_the_deadline_bounds_the_verify() -> None:
    """The verifier gets the time that the call has left; without a deadline it gets no bound, so
    that its own applies."""
    verifier = Stub()
    with serving(verifier) as (channel, _):
        call(channel, "uu", BEARER, 10)
        call(channel, "uu", BEARER, None)
    with_deadline, without = verifier.asked
    assert with_deadline is not None
    # Clocks of client and server are compared, and a busy machine rounds.
    assert 0 < with_deadline < 11
    assert without is None


def test_api_keys() -> None:
    """With the setting, the token may come in another key, not beside a bearer token."""
    key = (("x-api-key", f"{SECRET} "),)
    with serving(Stub(), api_key_header="X-Api-Key") as (channel, _):
        assert call(channel, "uu", key) == b"ci"
        assert call(channel, "uu", BEARER) == b"ci"
        for metadata in ((*key, *BEARER), (*key, *key), (("x-api-key", ""),)):
            assert refused(channel, "uu", metadata)[1] == "TOKEN_INVALID"
    with serving(Stub()) as (channel, _):
        assert refused(channel, "uu", key)[1] == "TOKEN_MISSING"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("/grpc.health.v1.Health/Check", True),
        ("/grpc.health.v1.Health/Watch", True),
        ("/demo.Demo/open", True),
        ("/grpc.health.v1.Healthy/Check", False),
        ("/grpc.health.v1.Health/", False),
        ("/grpc.health.v1.Health", False),
        ("/grpc.health.v1.Health/Check/x", False),
        ("//grpc.health.v1.Health/Check", False),
        ("grpc.health.v1.Health/Check", False),
        ("/grpc.health.v1.Health/../demo.Demo/uu", False),
        ("/demo.Demo/open/", False),
    ],
)
def test_public_services_have_exact_names(method: str, expected: bool) -> None:
    """All methods of a public service are public, and nothing else."""
    rules = CallRules(
        None,
        scopes={},
        public={"/demo.Demo/open"},
        public_services={"grpc.health.v1.Health"},
        api_key_header=None,
    )
    assert rules.exempts(method) is expected


def test_mistakes_are_reported_at_construction() -> None:
    """Options that would open or break a guard are refused, and a verifier of the wrong kind."""
    for options in (
        {"public": "/demo.Demo/uu"},
        {"public_services": "grpc.health.v1.Health"},
        {"public_services": {"/grpc.health.v1.Health"}},
        {"public_services": {""}},
        {"api_key_header": "a b"},
    ):
        wrong: Any = options
        with pytest.raises((TypeError, ValueError)):
            GuardInterceptor(Stub(), None, **wrong)
    wrong = Stub()
    with pytest.raises(TypeError, match=r"latchkey\.Verifier"):
        aio_guard.GuardInterceptor(wrong, None)

    class Async:
        async def verify(self) -> None: ...

    wrong = Async()
    with pytest.raises(TypeError, match=r"latchkey\.sync\.Verifier"):
        GuardInterceptor(wrong, None)


def test_permissions_and_addresses() -> None:
    """A method may require permissions. The verifier gets the client's address: that of the
    connection, or the one that a trusted proxy names."""
    with serving(Stub(), permissions={"/demo.Demo/uu": {"orders:read"}}) as (channel, _):
        assert refused(channel, "uu", BEARER)[:2] == (
            grpc.StatusCode.PERMISSION_DENIED,
            "TOKEN_PERMISSIONS_INSUFFICIENT",
        )
    forwarded = (*BEARER, ("x-forwarded-for", "192.0.2.1"))
    for proxies, expected in (((), "127.0.0.1"), (("127.0.0.1",), "192.0.2.1")):
        verifier = Stub()
        with serving(verifier, trusted_proxies=proxies) as (channel, _):
            call(channel, "uu", forwarded)
        assert verifier.addresses == [expected]

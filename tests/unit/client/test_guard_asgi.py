"""The ASGI guard with real applications."""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, MutableMapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from latchkey import Scope, Secret, Token, Unavailable, Verdict, Verification
from latchkey.guards import current_token_or_none
from latchkey.guards.asgi import GuardMiddleware, scope_by_method
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

SECRET = "lk" + "_" + "S3cr3t" * 9 + "abc"
TOKEN = Token(
    id="t1",
    account_id="acme",
    name="ci",
    scope=Scope.READ,
    create_time=datetime(2026, 1, 1, tzinfo=UTC),
)
BEARER = {"authorization": f"Bearer {SECRET}"}
TOKEN_PERMISSIONS = {"orders:read"}
# From which TOKEN may not be used.
ELSEWHERE = "203.0.113.9"
Message = MutableMapping[str, Any]


class Stub:
    """A verifier that knows one token, TOKEN, with scope READ, unless it is set to fail."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.calls = 0
        self.addresses: list[str] = []

    async def verify(
        self,
        secret: Secret,
        scope: Scope | None,
        /,
        *,
        client_address: str = "",
        permissions: Collection[str] = (),
        timeout_seconds: float | None = None,
    ) -> Verification:
        del timeout_seconds
        self.calls += 1
        self.addresses.append(client_address)
        if self.failure is not None:
            raise self.failure
        if secret.reveal() != SECRET:
            return Verification(verdict=Verdict.UNKNOWN)
        if scope is Scope.WRITE:
            return Verification(verdict=Verdict.INSUFFICIENT_SCOPE, token=TOKEN)
        if not TOKEN_PERMISSIONS.issuperset(permissions):
            return Verification(verdict=Verdict.INSUFFICIENT_PERMISSIONS, token=TOKEN)
        if client_address == ELSEWHERE:
            return Verification(verdict=Verdict.ADDRESS_NOT_ALLOWED, token=TOKEN)
        return Verification(verdict=Verdict.VALID, token=TOKEN)


async def whoami(request: Request) -> PlainTextResponse:
    token = current_token_or_none()
    assert request.scope.get("latchkey.token") == token
    return PlainTextResponse(token.name if token else "nobody")


def whoami_in_thread(_request: Request) -> PlainTextResponse:
    token = current_token_or_none()
    return PlainTextResponse(token.name if token else "nobody")


ROUTES = [
    Route("/", whoami, methods=["GET", "HEAD", "POST"]),
    Route("/thread", whoami_in_thread),
    Route("/healthz", whoami),
]


@asynccontextmanager
async def web(
    verifier: Stub, peer: str = "127.0.0.1", **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    app = Starlette(
        routes=ROUTES, middleware=[Middleware(GuardMiddleware, verifier=verifier, **options)]
    )
    transport = httpx.ASGITransport(app, client=(peer, 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://demo") as client:
        yield client


async def test_a_valid_token_is_accepted_and_visible_to_the_application() -> None:
    """The handler sees the token, in the event loop or a thread. Afterwards it is reset."""
    async with web(Stub()) as client:
        for path in ("/", "/thread"):
            response = await client.get(path, headers=BEARER)
            assert (response.status_code, response.text) == (200, "ci")
    assert current_token_or_none() is None


async def test_missing_token_is_401_without_an_error_code() -> None:
    """RFC 6750 §3.1: a request without a token learns the scheme, but gets no error code."""
    async with web(Stub()) as client:
        for headers in ({}, {"authorization": "Basic dXNlcjpwYXNz"}):
            response = await client.get("/", headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == 'Bearer realm="latchkey"'
            assert response.headers["content-type"] == "application/problem+json"
            assert response.headers["cache-control"] == "no-store"
            assert response.json()["status"] == 401


async def test_invalid_token_is_401() -> None:
    """RFC 6750 §3.1: the error is invalid_token. The answer does not repeat the token."""
    async with web(Stub(), realm="demo") as client:
        response = await client.get("/", headers={"authorization": "Bearer wr0ng"})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == 'Bearer realm="demo", error="invalid_token"'
    assert "wr0ng" not in response.text + str(response.headers)


async def test_insufficient_scope_is_403() -> None:
    """RFC 6750 §3.1: the error is insufficient_scope, with the required scope."""
    async with web(Stub()) as client:
        response = await client.post("/", headers=BEARER)
    assert response.status_code == 403
    assert response.headers["www-authenticate"] == (
        'Bearer realm="latchkey", error="insufficient_scope", scope="write"'
    )


@pytest.mark.parametrize(
    ("failure", "wait"),
    [
        (Unavailable("down"), "1"),
        (Unavailable("down", retry_after=timedelta(seconds=2.1)), "3"),
        (RuntimeError(SECRET), "1"),
    ],
)
async def test_no_safe_answer_is_503(failure: Exception, wait: str) -> None:
    """If Latchkey gives no safe answer, the request is refused with a time to try again."""
    async with web(Stub(failure)) as client:
        response = await client.get("/", headers=BEARER)
    assert response.status_code == 503
    assert response.headers["retry-after"] == wait
    assert "www-authenticate" not in response.headers
    assert "S3cr3t" not in response.text + str(response.headers)


async def test_refused_head_has_no_body() -> None:
    """A refused HEAD has the headers of a refused GET, and no body."""
    get = http([])
    answers = [
        await talk(GuardMiddleware(accept, Stub()), s) for s in (get, {**get, "method": "HEAD"})
    ]
    assert answers[0][0] == answers[1][0]
    assert answers[0][1]["body"]
    assert answers[1][1]["body"] == b""


async def test_public_paths_match_exactly() -> None:
    """A public path needs no token. A path that only resembles it does."""
    verifier = Stub()
    async with web(verifier, public={"/healthz"}) as client:
        assert (await client.get("/healthz")).text == "nobody"
        for path in (
            "/healthz/",
            "/Healthz",
            "//healthz",
            "/healthz/../",
            "/healthz%2f",
            "/healthz;x",
        ):
            assert (await client.get(path)).status_code == 401, path
        assert (await client.get("/healthz?x=1")).status_code == 200
    assert verifier.calls == 0


async def test_duplicate_headers_are_refused() -> None:
    """Two authorization headers are refused even if valid, since layers may read different ones."""
    async with web(Stub()) as client:
        pair = ("authorization", f"Bearer {SECRET}")
        assert (await client.get("/", headers=[pair, pair])).status_code == 401


async def test_required_scope_is_fixed_or_computed() -> None:
    """required_scope is a Scope, None, or a function of the request."""
    async with web(Stub(), required_scope=Scope.READ) as client:
        assert (await client.post("/", headers=BEARER)).status_code == 200
    async with web(Stub(), required_scope=None) as client:
        assert (await client.post("/", headers=BEARER)).status_code == 200
    async with web(Stub(), required_scope=lambda _: Scope.WRITE) as client:
        assert (await client.get("/", headers=BEARER)).status_code == 403


@pytest.mark.parametrize("result", ["read", Scope.UNSPECIFIED, ZeroDivisionError])
async def test_a_failing_scope_function_lets_no_request_in(result: object) -> None:
    """If the scope function raises or returns an invalid value, the server reports an error."""

    def broken(_scope: object) -> Any:
        if result is ZeroDivisionError:
            raise ZeroDivisionError
        return result

    reached = False

    async def app(*_: object) -> None:
        nonlocal reached
        reached = True

    guard = GuardMiddleware(app, Stub(), broken)
    with pytest.raises((TypeError, ValueError, ZeroDivisionError)):
        await talk(guard, http([(b"authorization", f"Bearer {SECRET}".encode())]))
    assert not reached


def http(headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {"type": "http", "method": "GET", "path": "/", "headers": headers}


async def talk(app: Callable[..., Awaitable[None]], scope: dict[str, Any]) -> list[Message]:
    """Run `app` on one connection and return the messages that it sent."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect" if scope["type"] == "websocket" else "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def accept(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await receive()
        token = current_token_or_none()
        await send({"type": "websocket.accept", "subprotocol": token.name if token else None})


@pytest.mark.parametrize(
    "value",
    [
        b"Bearer \xff\xfe",
        b"\xff",
        b"Bearer \x00",
        b"",
        "Bearer \u00e4".encode(),
        b"Bearer " + b"=" * 9000,
    ],
)
async def test_undecodable_bytes_are_refused(value: bytes) -> None:
    """Header bytes in an unknown encoding get a 401 like any other invalid token."""
    sent = await talk(GuardMiddleware(accept, Stub()), http([(b"Authorization", value)]))
    assert sent[0]["status"] == 401


async def test_websocket_with_a_valid_token_is_accepted() -> None:
    """A WebSocket handshake is judged by its header, and its application sees the token."""
    guard = GuardMiddleware(accept, Stub(), Scope.READ)
    headers = [(b"authorization", f"Bearer {SECRET}".encode())]
    sent = await talk(guard, {"type": "websocket", "path": "/", "headers": headers})
    assert sent == [{"type": "websocket.accept", "subprotocol": "ci"}]


@pytest.mark.parametrize(
    ("verifier", "headers", "code", "status"),
    [
        (Stub(), [], 1008, 401),
        (Stub(), [(b"authorization", f"Bearer {SECRET}".encode())], 1008, 403),  # needs WRITE
        (Stub(OSError()), [(b"authorization", f"Bearer {SECRET}".encode())], 1013, 503),
    ],
)
async def test_websocket_is_refused_before_it_is_accepted(
    verifier: Stub, headers: list[tuple[bytes, bytes]], code: int, status: int
) -> None:
    """A refused handshake is closed, or answered with the status if the server supports that."""
    guard = GuardMiddleware(accept, verifier)
    scope: dict[str, Any] = {"type": "websocket", "path": "/", "headers": headers}
    assert await talk(guard, scope) == [{"type": "websocket.close", "code": code, "reason": ""}]
    scope["extensions"] = {"websocket.http.response": {}}
    start, body = await talk(guard, scope)
    assert (start["type"], start["status"]) == ("websocket.http.response.start", status)
    assert body["type"] == "websocket.http.response.body"
    assert body["body"]


async def test_lifespan_passes_and_unknown_types_are_refused() -> None:
    """Lifespan messages pass. An unknown connection type is refused."""
    seen = []

    async def app(scope: MutableMapping[str, Any], _receive: object, _send: object) -> None:
        seen.append(scope["type"])

    guard = GuardMiddleware(app, Stub())
    await talk(guard, {"type": "lifespan"})
    with pytest.raises(ValueError, match="webtransport"):
        await talk(guard, {"type": "webtransport", "path": "/", "headers": []})
    assert seen == ["lifespan"]


def test_default_scope_depends_on_the_method() -> None:
    """Reading methods require READ. All others, known or not, require WRITE."""
    for method in ("GET", "HEAD", "OPTIONS"):
        assert scope_by_method({"type": "http", "method": method}) is Scope.READ
    for method in ("POST", "PUT", "PATCH", "DELETE", "TRACE", "get", "BREW"):
        assert scope_by_method({"type": "http", "method": method}) is Scope.WRITE
    assert scope_by_method({"type": "websocket"}) is Scope.WRITE


def test_options_are_checked_at_construction() -> None:
    """Mistakes that would open or break the guard are reported at start-up."""
    with pytest.raises(TypeError):
        GuardMiddleware(accept, Stub(), public="/healthz")
    with pytest.raises(ValueError, match="realm"):
        GuardMiddleware(accept, Stub(), realm='a"b')
    with pytest.raises(ValueError, match="UNSPECIFIED"):
        GuardMiddleware(accept, Stub(), Scope.UNSPECIFIED)
    with pytest.raises(TypeError):
        GuardMiddleware(accept, Stub(), "read")  # type: ignore[arg-type]  # the point of the test


async def test_required_permissions() -> None:
    """A token that lacks a required permission gets 403, and the challenge names all that the
    request requires. A function may require others for each request."""
    async with web(Stub(), required_permissions=["orders:read"]) as client:
        assert (await client.get("/", headers=BEARER)).status_code == 200
    async with web(Stub(), required_permissions=["orders:read", "orders:cancel"]) as client:
        refused = await client.get("/", headers=BEARER)
        assert refused.status_code == 403
        assert "lacks a permission" in refused.json()["detail"]
        assert refused.headers["www-authenticate"] == (
            'Bearer realm="latchkey", error="insufficient_scope", '
            'scope="read orders:read orders:cancel"'
        )
    by_path = {"/": ["orders:read"], "/thread": ["orders:cancel"]}
    async with web(
        Stub(), required_permissions=lambda connection: by_path[connection["path"]]
    ) as client:
        assert (await client.get("/", headers=BEARER)).status_code == 200
        assert (await client.get("/thread", headers=BEARER)).status_code == 403
    for wrong in ("orders:read", ["orders"]):
        with pytest.raises((TypeError, ValueError)):
            GuardMiddleware(whoami, Stub(), required_permissions=wrong)  # type: ignore[arg-type]


async def test_a_token_from_a_wrong_address_gets_403() -> None:
    """The address of the connection counts, and no header of an untrusted peer changes it."""
    stub = Stub()
    async with web(stub, peer=ELSEWHERE) as client:
        refused = await client.get("/", headers={**BEARER, "x-forwarded-for": "192.0.2.1"})
        assert refused.status_code == 403
        assert "from this address" in refused.json()["detail"]
        assert refused.headers["www-authenticate"] == 'Bearer realm="latchkey"'
    assert stub.addresses == [ELSEWHERE]


async def test_addresses_come_from_trusted_proxies() -> None:
    """Behind a trusted proxy, the client's address is the last one that the proxy appended."""
    stub = Stub()
    async with web(stub, peer="10.1.2.3", trusted_proxies=["10.0.0.0/8"]) as client:
        headers = [*BEARER.items(), ("x-forwarded-for", "192.0.2.1"), ("X-Forwarded-For", "::1")]
        assert (await client.get("/", headers=headers)).status_code == 200
        assert (await client.get("/", headers=BEARER)).status_code == 200
    assert stub.addresses == ["::1", ""]
    with pytest.raises(TypeError):
        GuardMiddleware(whoami, Stub(), trusted_proxies="10.0.0.0/8")  # type: ignore[arg-type]


@pytest.mark.parametrize("client", [None, ["192.0.2.7", 80]])
async def test_a_peer_without_an_address(client: list[Any] | None) -> None:
    """On a UNIX socket, the server reports no peer. The address is then not known."""
    stub = Stub()
    served: list[Any] = []

    async def application(scope: Any, _receive: Any, _send: Any) -> None:
        served.append(scope["latchkey.token"])

    guard = GuardMiddleware(application, stub)
    headers = [(b"authorization", BEARER["authorization"].encode())]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": client}

    async def never(*_: object) -> Any:
        raise AssertionError("nothing is received or sent")

    await guard(scope, never, never)
    assert served == [TOKEN]
    assert stub.addresses == ["192.0.2.7" if client else ""]

"""All guards for HTTP behave alike, in the real frameworks."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test.utils import override_settings
from fastapi import FastAPI, WebSocket
from latchkey import RateLimit, Scope, Unavailable, Verdict, Verification
from latchkey.guards import asgi, current_token, current_token_or_none, fastapi, wsgi
from latchkey.guards import django as django_guard
from latchkey.guards._http import has_prefix
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from tests.unit.client.guarded import (
    BEARER,
    KINDS,
    SECRET,
    TOKEN,
    Kind,
    Stub,
    SyncStub,
    fastapi_app,
)

every_guard = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
WHOLE = {name: kind for name, kind in KINDS.items() if kind.whole}
whole_guards = pytest.mark.parametrize("kind", WHOLE.values(), ids=WHOLE)
PREFLIGHT = {"origin": "https://shop.example", "access-control-request-method": "POST"}


@every_guard
async def test_valid_tokens_are_let_in(kind: Kind) -> None:
    """The application sees the token, which does not outlive the request."""
    async with kind.serve(SyncStub()) as client:
        for value in (f"Bearer {SECRET}", f"bearer  {SECRET}", f"BEARER {SECRET} "):
            answer = await client.get("/", headers={"authorization": value})
            assert (answer.status_code, answer.text.strip('"')) == (200, "ci")
        assert current_token_or_none() is None


@every_guard
async def test_challenges(kind: Kind) -> None:
    """RFC 6750 §3: no error code without credentials; invalid_token with 401; insufficient_scope
    with 403 and the required scope."""
    async with kind.serve(SyncStub(), realm="shop") as client:
        for headers, method, status, challenge in (
            ({}, "GET", 401, 'Bearer realm="shop"'),
            ({"authorization": "Basic dTpw"}, "GET", 401, 'Bearer realm="shop"'),
            (
                {"authorization": "Bearer wr0ng"},
                "GET",
                401,
                'Bearer realm="shop", error="invalid_token"',
            ),
            (
                BEARER,
                "POST",
                403,
                'Bearer realm="shop", error="insufficient_scope", scope="write"',
            ),
        ):
            answer = await client.request(method, "/", headers=headers)
            assert answer.status_code == status, answer.text
            assert answer.headers["www-authenticate"] == challenge
            assert answer.headers["cache-control"] == "no-store"
            assert "wr0ng" not in answer.text


@every_guard
@pytest.mark.parametrize(
    ("failure", "wait"),
    [
        (Unavailable("down"), "1"),
        (Unavailable("down", retry_after=timedelta(seconds=2.1)), "3"),
        (RuntimeError(SECRET), "1"),
    ],
)
async def test_no_safe_answer_is_503(kind: Kind, failure: Exception, wait: str) -> None:
    """If Latchkey gives no safe answer, the request is refused with a time to try again."""
    async with kind.serve(SyncStub(failure)) as client:
        answer = await client.get("/", headers=BEARER)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, wait)
    assert answer.headers["cache-control"] == "no-store"
    assert "S3cr3t" not in answer.text


@every_guard
@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [(timedelta(seconds=4.2), 5), (timedelta(milliseconds=3), 1), (timedelta(days=9), 3600)],
)
async def test_too_many_uses_are_429(kind: Kind, retry_after: timedelta, seconds: int) -> None:
    """A token that is used too often gets a bounded time to try again, and its limit."""
    stub = SyncStub()
    limit = RateLimit(100, timedelta(minutes=1), 20)
    stub.answer = Verification(
        verdict=Verdict.RATE_LIMITED,
        token=replace(TOKEN, rate_limit=limit),
        retry_after=retry_after,
    )
    async with kind.serve(stub) as client:
        answer = await client.get("/", headers=BEARER)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, str(seconds))
    assert "www-authenticate" not in answer.headers
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["ratelimit"] == f'"token";r=0;t={seconds}'
    assert answer.headers["ratelimit-policy"] == '"token";q=100;w=60'
    assert "S3cr3t" not in answer.text


@every_guard
async def test_request_counts_once_against_the_limit(kind: Kind) -> None:
    """However many parts of a guard judge a request, a token with a limit is verified once."""
    stub = SyncStub()
    limit = RateLimit(100, timedelta(minutes=1), 20)
    stub.answer = Verification(verdict=Verdict.VALID, token=replace(TOKEN, rate_limit=limit))
    async with kind.serve(stub) as client:
        assert (await client.get("/", headers=BEARER)).status_code == 200
        assert stub.calls == 1
        assert (await client.post("/", headers=BEARER)).status_code == 403
        assert stub.calls == 2


@every_guard
async def test_api_keys(kind: Kind) -> None:
    """With the setting, the token may come in `x-api-key`, exactly once and not beside a bearer
    token. Without it, that header means nothing."""
    key = {"x-api-key": SECRET}
    async with kind.serve(SyncStub(), api_key_header="X-API-Key") as client:
        for headers, status in (
            (key, 200),
            ({"x-api-key": f" {SECRET} "}, 200),
            (BEARER, 200),
            ({**key, "authorization": "Basic dTpw"}, 200),
            ({**key, **BEARER}, 401),
            ({"x-api-key": "wr0ng"}, 401),
            ({"x-api-key": ""}, 401),
            ({"x-api-key": f"{SECRET},{SECRET}"}, 401),
            ({}, 401),
        ):
            answer = await client.get("/", headers=headers)
            assert answer.status_code == status, headers
        assert answer.headers["www-authenticate"] == 'Bearer realm="latchkey"'
        # Django REST framework has another text for anonymous requests.
        assert "x-api-key" in answer.text or kind is KINDS["drf"]
    async with kind.serve(SyncStub()) as client:
        assert (await client.get("/", headers=key)).status_code == 401


@every_guard
async def test_only_true_preflights_need_no_token(kind: Kind) -> None:
    """OPTIONS needs a token unless it has exactly the headers of a preflight. A preflight never
    reaches a route that a token guards in Django, and passes a guard of a whole application."""
    stub = SyncStub()
    async with kind.serve(stub) as client:
        for headers in (
            {},
            {"origin": PREFLIGHT["origin"]},
            {"access-control-request-method": "POST"},
            {**PREFLIGHT, "authorization": "Bearer wr0ng"},
        ):
            assert (await client.options("/", headers=headers)).status_code == 401, headers
        for method in ("GET", "POST"):
            assert (await client.request(method, "/", headers=PREFLIGHT)).status_code == 401
        asked = stub.calls
        if kind is KINDS["fastapi"] or kind is KINDS["drf"]:
            return  # CORS middleware answers preflights before their routes
        answer = await client.options("/", headers=PREFLIGHT)
        assert answer.status_code in (200, 204)
        assert answer.text in ("nobody", "")
        if kind in (KINDS["django"], KINDS["django views"]):
            assert answer.text == ""
        assert stub.calls == asked
    async with kind.serve(SyncStub(), preflights=False) as client:
        assert (await client.options("/", headers=PREFLIGHT)).status_code == 401


@whole_guards
async def test_public_paths_and_prefixes(kind: Kind) -> None:
    """A public path matches exactly, a public prefix by whole segments. Nothing that another layer
    could read as another path slips through."""
    async with kind.serve(SyncStub(), public={"/healthz"}, public_prefixes={"/static/"}) as client:
        for path in ("/healthz", "/healthz?x=1", "/static/a.css", "/static/a/b", "/static/a/"):
            answer = await client.get(path)
            assert (answer.status_code, answer.text) == (200, "nobody"), path
        for path in (
            "/",
            "/healthz/",
            "/Healthz",
            "/healthz%2f",
            "/healthz;x",
            "/staticx",
            "/STATIC/a",
            "/static/%2e%2e/",
            "/static/..%2fhealthz",
            "/static/a%2fb",
            "/static/a%5cb",
            "/static/%252e%252e/",
            "/static/a;/b",
            "/static/a%00",
        ):
            assert (await client.get(path)).status_code == 401, path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/static", True),
        ("/static/", True),
        ("/static/a/b.css", True),
        ("/static/...", True),
        ("/static/..", False),
        ("/static/../admin", False),
        ("/static/./a", False),
        ("/static//a", False),
        ("//static/a", False),
        ("/static/a\\..\\b", False),
        ("/static/%2e%2e", False),
        ("/static\n/a", False),
        ("static/a", False),
        ("/statics", False),
        ("/x/static/a", False),
    ],
)
def test_prefixes_compare_whole_segments(path: str, expected: bool) -> None:
    """Only plain paths lie below a prefix."""
    assert has_prefix(path, {"/static"}) is expected


def test_mistakes_are_reported_at_construction() -> None:
    """Options that would open or break a guard are refused, and so is a verifier of the wrong
    kind."""

    def app(*_: Any) -> Any:
        raise AssertionError

    for options in (
        {"public": "/healthz"},
        {"public_prefixes": "/static"},
        {"public_prefixes": {"/"}},
        {"public_prefixes": {""}},
        {"public_prefixes": {"static"}},
        {"public_prefixes": {"/a/../b"}},
        {"realm": 'a"b'},
        {"api_key_header": "x api"},
        {"api_key_header": ""},
        {"api_key_header": "Authorization"},
    ):
        wrong: Any = options
        with pytest.raises((TypeError, ValueError)):
            wsgi.GuardMiddleware(app, SyncStub(), **wrong)
        with pytest.raises((TypeError, ValueError)):
            asgi.GuardMiddleware(app, Stub(SyncStub()), **wrong)
        upper = {key.upper(): value for key, value in wrong.items()}
        with (
            override_settings(LATCHKEY={"VERIFIER": SyncStub(), **upper}),
            pytest.raises(ImproperlyConfigured),
        ):
            django_guard.GuardMiddleware(app)
    wrong = Stub(SyncStub())
    with pytest.raises(TypeError, match=r"latchkey\.sync\.Verifier"):
        wsgi.GuardMiddleware(app, wrong)
    wrong = SyncStub()
    with pytest.raises(TypeError, match=r"latchkey\.Verifier"):
        asgi.GuardMiddleware(app, wrong)
    with pytest.raises(TypeError, match=r"latchkey\.Verifier"):
        fastapi.Guard(wrong)
    for setting in (None, {}, {"VERIFIER": SyncStub(), "PUBLICS": ()}):
        with override_settings(LATCHKEY=setting), pytest.raises(ImproperlyConfigured):
            django_guard.GuardMiddleware(app)


def test_a_request_without_a_token_has_no_current_token() -> None:
    """`current_token` returns a token or raises; it never returns None."""
    with pytest.raises(LookupError, match="current_token_or_none"):
        current_token()


async def test_streamed_answers_see_their_token() -> None:
    """An answer that is made while it is sent sees the token of its request. Requests that are
    answered in turns do not see each other's."""
    closed: list[bool] = []

    def app(_environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])

        def parts() -> Iterator[bytes]:
            try:
                for _ in range(2):
                    yield current_token().name.encode()
            finally:
                assert current_token().name == "ci"
                closed.append(True)

        return parts()

    guarded = wsgi.GuardMiddleware(app, SyncStub())
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/",
        "HTTP_AUTHORIZATION": f"Bearer {SECRET}",
    }
    answers = [guarded(dict(environ), lambda *_: print) for _ in range(2)]
    first, second = (iter(answer) for answer in answers)
    assert [next(first), next(second), next(first), next(second)] == [b"ci"] * 4
    assert current_token_or_none() is None
    for answer in answers:
        answer.close()  # type: ignore[attr-defined]  # WSGI's, not an iterable's
    assert len(closed) == 2


def test_fastapi_documents_what_each_route_needs() -> None:
    """The documentation has the security scheme, and each route its scope."""
    described = fastapi_app(
        fastapi.Guard(Stub(SyncStub()), api_key_header="x-api-key", scheme_name="Token")
    ).openapi()
    schemes = described["components"]["securitySchemes"]
    assert (schemes["Token"]["type"], schemes["Token"]["scheme"]) == ("http", "bearer")
    assert schemes["Token key"]["in"] == "header"
    assert schemes["Token key"]["name"] == "x-api-key"
    paths = described["paths"]["/"]
    assert paths["post"]["security"] == [{"Token": ["write"]}, {"Token key": []}]
    assert paths["get"]["security"] == [{"Token": ["read"]}, {"Token key": []}]
    assert not paths["get"].get("parameters"), "the dependency adds no parameters"


@pytest.mark.parametrize(
    ("headers", "code"), [(BEARER, None), ({}, 1008), ({"authorization": "Bearer x"}, 1008)]
)
def test_fastapi_guards_websockets(headers: dict[str, str], code: int | None) -> None:
    """A WebSocket without a valid token is refused before it is accepted."""
    require = fastapi.Guard(Stub(SyncStub()))
    app = FastAPI()

    from fastapi import Depends

    async def talk(socket: WebSocket, token: Any = Depends(require(Scope.READ))) -> None:  # noqa: B008 - FastAPI's way
        await socket.accept()
        await socket.send_text(token.name)
        await socket.close()

    app.add_api_websocket_route("/", talk)
    with TestClient(app) as client:
        if code is None:
            with client.websocket_connect("/", headers=headers) as socket:
                assert socket.receive_text() == "ci"
            return
        with (
            pytest.raises(WebSocketDisconnect) as refused,
            client.websocket_connect("/", headers=headers),
        ):
            raise AssertionError
        assert refused.value.code == code


async def test_drf_views_choose_their_scope() -> None:
    """`required_scope` of a view replaces the scope by method. An anonymous request is refused even
    where any token would do."""
    from django.urls import re_path
    from latchkey.guards import drf
    from rest_framework.response import Response
    from rest_framework.views import APIView

    from tests.unit.client.guarded import served_by_django

    class View(APIView):
        authentication_classes = (drf.TokenAuthentication,)
        permission_classes = (drf.HasScope,)
        required_scope: Scope | None = None

        def post(self, _request: Any) -> Response:
            return Response("posted")

    class Strict(View):
        required_scope = Scope.WRITE

        def get(self, _request: Any) -> Response:
            raise AssertionError

    urls = (re_path("^any$", View.as_view()), re_path("^strict$", Strict.as_view()))
    async with served_by_django(urls, SyncStub(), {}, []) as client:
        assert (await client.post("/any", headers=BEARER)).status_code == 200
        assert (await client.post("/any")).status_code == 401
        assert (await client.get("/strict", headers=BEARER)).status_code == 403


@pytest.mark.parametrize("kind", ["asgi", "flask"])
async def test_a_refused_head_has_no_body(kind: str) -> None:
    """A refused HEAD has the headers of a refused GET, and no body."""
    async with KINDS[kind].serve(SyncStub()) as client:
        get: httpx.Response = await client.get("/")
        head = await client.head("/")
    assert get.content
    assert not head.content
    assert get.headers["content-type"] == "application/problem+json"
    assert {**get.headers} == {**head.headers}


@every_guard
async def test_the_verifier_gets_the_clients_address(kind: Kind) -> None:
    """It is that of the connection, or the one that a trusted proxy names."""
    headers = {**BEARER, "x-forwarded-for": "198.51.100.1, 192.0.2.1"}
    for proxies, expected in (((), "127.0.0.1"), (("127.0.0.1",), "192.0.2.1")):
        stub = SyncStub()
        async with kind.serve(stub, trusted_proxies=proxies) as client:
            assert (await client.get("/", headers=headers)).status_code == 200
        assert set(stub.addresses) == {expected}


@whole_guards
async def test_permissions_can_be_required(kind: Kind) -> None:
    """A token without a required permission gets 403, and the challenge names what is required."""
    async with kind.serve(SyncStub(), required_permissions={"orders:read"}) as client:
        answer = await client.get("/", headers=BEARER)
    assert answer.status_code == 403
    assert answer.headers["www-authenticate"] == (
        'Bearer realm="latchkey", error="insufficient_scope", scope="read orders:read"'
    )

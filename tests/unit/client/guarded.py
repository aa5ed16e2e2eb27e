"""The same small service behind each guard for HTTP, in the real frameworks, without sockets.

Every service has `/` for all methods. Those behind a guard of a whole application also have
`/healthz` and `/static/…`. Each answers with the name of the token, or "nobody".
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import django as django_app
import httpx
from django.conf import settings as django_settings
from fastapi import Depends, FastAPI
from flask import Flask
from latchkey import Scope, Secret, Token, Verdict, Verification
from latchkey.guards import asgi, current_token_or_none, fastapi, wsgi
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

if not django_settings.configured:
    django_settings.configure(
        ALLOWED_HOSTS=["*"],
        LATCHKEY=None,
        REST_FRAMEWORK={"UNAUTHENTICATED_USER": None},
        ROOT_URLCONF=(),
    )
    django_app.setup()

from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpResponse
from django.test.utils import override_settings
from django.urls import re_path
from latchkey.guards import django as django_guard
from latchkey.guards import drf
from rest_framework.response import Response
from rest_framework.views import APIView

METHODS = ["GET", "HEAD", "POST", "OPTIONS"]
SECRET = "lk" + "_" + "S3cr3t" * 9 + "abc"
TOKEN = Token(
    id="t1",
    account_id="acme",
    name="ci",
    scope=Scope.READ,
    create_time=datetime(2026, 1, 1, tzinfo=UTC),
)
BEARER = {"authorization": f"Bearer {SECRET}"}


class SyncStub:
    """A verifier that knows one token, TOKEN, with scope READ, unless it is set to fail."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.answer: Verification | None = None
        """The answer about TOKEN to a question without requirements. None: VALID."""
        self.calls = 0
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
        del timeout_seconds
        self.addresses.append(client_address)
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        if secret.reveal() != SECRET:
            return Verification(verdict=Verdict.UNKNOWN)
        if permissions:
            return Verification(verdict=Verdict.INSUFFICIENT_PERMISSIONS, token=TOKEN)
        if scope is Scope.WRITE:
            return Verification(verdict=Verdict.INSUFFICIENT_SCOPE, token=TOKEN)
        return self.answer or Verification(verdict=Verdict.VALID, token=TOKEN)


class Stub:
    """The same for an event loop."""

    def __init__(self, inner: SyncStub) -> None:
        self._inner = inner

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
        return self._inner.verify(
            secret,
            scope,
            client_address=client_address,
            permissions=permissions,
            timeout_seconds=timeout_seconds,
        )


def name() -> str:
    token = current_token_or_none()
    return "nobody" if token is None else token.name


def from_asgi(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://demo")


class _Wsgi(httpx.AsyncBaseTransport):
    """Calls a WSGI application in a thread, with the undecoded target, as gunicorn does."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()

        def app(environ: Any, start_response: Any) -> Any:
            environ["RAW_URI"] = request.url.raw_path.decode()
            return self._app(environ, start_response)

        inner = httpx.WSGITransport(app)
        response = await asyncio.to_thread(inner.handle_request, request)
        return httpx.Response(
            response.status_code, headers=response.headers, content=response.read()
        )


def from_wsgi(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=_Wsgi(app), base_url="http://demo")


@asynccontextmanager
async def of_asgi(stub: SyncStub, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async def answer(_request: Request) -> PlainTextResponse:
        return PlainTextResponse(name())

    paths = ("/", "/healthz", "/static/{rest:path}")
    app = Starlette(routes=[Route(path, answer, methods=METHODS) for path in paths])
    async with from_asgi(asgi.GuardMiddleware(app, Stub(stub), **options)) as client:
        yield client


@asynccontextmanager
async def of_wsgi(stub: SyncStub, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = Flask("demo", static_folder=None)
    for number, rule in enumerate(("/", "/healthz", "/static/<path:rest>")):
        app.add_url_rule(rule, str(number), lambda **_: name(), methods=METHODS)
    guarded: Any = wsgi.GuardMiddleware(app.wsgi_app, stub, **options)
    async with from_wsgi(guarded) as client:
        yield client


@asynccontextmanager
async def of_django(stub: SyncStub, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    def view(_request: object) -> HttpResponse:
        return HttpResponse(name())

    async with served_by_django(
        (re_path("^(?:healthz|static/.*)?$", view),),
        stub,
        options,
        ["latchkey.guards.django.GuardMiddleware"],
    ) as client:
        yield client


@asynccontextmanager
async def of_django_views(stub: SyncStub, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    @django_guard.require(Scope.READ)
    def read(_request: object) -> HttpResponse:
        return HttpResponse(name())

    @django_guard.require(Scope.WRITE)
    async def write(_request: object) -> HttpResponse:
        return HttpResponse(name())

    # A view chooses by method, as `django.views` does for classes.
    def view(request: Any) -> Any:
        return (read if request.method in ("GET", "HEAD", "OPTIONS") else write_sync)(request)

    from asgiref.sync import async_to_sync

    write_sync = async_to_sync(write)
    async with served_by_django((re_path("^$", view),), stub, options, []) as client:
        yield client


@asynccontextmanager
async def of_drf(stub: SyncStub, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    class View(APIView):
        authentication_classes = (drf.TokenAuthentication,)
        permission_classes = (drf.HasScope,)

        def get(self, request: Any) -> Response:
            assert request.user.account_id == request.auth.account_id
            return Response(request.auth.name)

        post = get

    async with served_by_django((re_path("^$", View.as_view()),), stub, options, []) as client:
        yield client


@asynccontextmanager
async def served_by_django(
    urls: tuple[Any, ...], stub: SyncStub, options: dict[str, Any], middleware: list[str]
) -> AsyncIterator[httpx.AsyncClient]:
    setting = {"VERIFIER": stub} | {key.upper(): value for key, value in options.items()}
    with override_settings(LATCHKEY=setting, MIDDLEWARE=middleware, ROOT_URLCONF=urls):
        async with from_wsgi(WSGIHandler()) as client:
            yield client


@asynccontextmanager
async def of_fastapi(stub: SyncStub, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = fastapi_app(fastapi.Guard(Stub(stub), **options))
    async with from_asgi(app) as client:
        yield client


def fastapi_app(require: fastapi.Guard) -> FastAPI:
    app = FastAPI()
    reader = Annotated[Token, Depends(require(Scope.READ))]
    writer = Annotated[Token, Depends(require(Scope.WRITE))]

    async def read(token: reader) -> PlainTextResponse:
        assert token == current_token_or_none()
        return PlainTextResponse(name())

    def write(token: writer) -> PlainTextResponse:
        assert token == current_token_or_none()
        return PlainTextResponse(name())

    app.add_api_route("/", read, methods=["GET"])
    app.add_api_route("/", read, methods=["HEAD", "OPTIONS"], include_in_schema=False)
    app.add_api_route("/", write, methods=["POST"])
    return app


@dataclass(frozen=True)
class Kind:
    """A guard in its framework."""

    serve: Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]
    whole: bool
    """Whether it guards a whole application, and so knows public paths."""


KINDS = {
    "asgi": Kind(of_asgi, whole=True),
    "flask": Kind(of_wsgi, whole=True),
    "django": Kind(of_django, whole=True),
    "django views": Kind(of_django_views, whole=False),
    "drf": Kind(of_drf, whole=False),
    "fastapi": Kind(of_fastapi, whole=False),
}

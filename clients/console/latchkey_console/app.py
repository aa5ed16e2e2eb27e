"""The application put together: addresses, middleware, and what happens to what goes wrong."""

import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Final

import latchkey
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from latchkey_console.failures import Trouble
from latchkey_console.identity import FixedAccount, Identity, NotSignedIn, ProxyHeader, Refused
from latchkey_console.openid import SIGN_IN_SECONDS, OpenId
from latchkey_console.pages import Pages
from latchkey_console.protection import BadForm, Protection, Seals, read_form, session_id
from latchkey_console.rendering import Renderer, is_part
from latchkey_console.settings import Settings

__all__ = ["make_app"]

_log = logging.getLogger("latchkey.console")

HEALTH: Final = "/healthz"
# Where a sign-in may lead back to: pages that only show.
_RETURNS: Final = frozenset({"/", "/new", "/delete"})
_RETURN_LENGTH_MAX: Final = 512


def make_app(
    settings: Settings,
    *,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    monotonic: Callable[[], float] = time.monotonic,
) -> ASGIApp:
    """Return the page as an ASGI application. It has its lifespan run, for its client to close."""
    client = latchkey.Client(settings.target)
    # Made anew at each start: sessions and forms of the process before are over, as its memory is.
    key = secrets.token_urlsafe(32)
    renderer = Renderer()
    openid: OpenId | None = None
    identity: Identity
    if settings.account is not None:
        identity = FixedAccount(settings.account)
    elif settings.proxy is not None:
        identity = ProxyHeader(settings.proxy)
    elif settings.openid is not None:
        identity = openid = OpenId(settings.openid, settings.public_url, monotonic)
    else:
        raise ValueError("settings do not say how to know who is looking")
    seals = Seals(key)
    pages = Pages(client, identity, seals, renderer, now, monotonic)
    errors = _Errors(renderer, openid)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    routes = [
        Route("/", pages.index),
        Route("/rows", pages.rows),
        Route("/new", pages.new),
        Route("/tokens", pages.create, methods=["POST"]),
        Route("/created/{place}", pages.created),
        Route("/seal.svg", renderer.seal),
        Route("/delete", pages.confirm_delete, methods=["GET"]),
        Route("/delete", pages.delete, methods=["POST"]),
        Route("/static/{version}/{name}", renderer.static),
        Route(HEALTH, _health),
    ]
    if openid is not None:
        routes += _SignIn(openid, seals, renderer).routes()
    secure = settings.https
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(
                SessionMiddleware,
                secret_key=key,
                # The prefix keeps other hosts of the domain from setting it (RFC 6265bis §4.1.3).
                session_cookie="__Host-latchkey" if secure else "latchkey_console",
                max_age=int(SIGN_IN_SECONDS),
                # Not strict: the provider's redirect back here comes from another site.
                same_site="lax",
                https_only=secure,
            ),
        ],
        exception_handlers={
            NotSignedIn: errors.not_signed_in,
            Refused: errors.refused,
            HTTPException: errors.http,
            Exception: errors.unexpected,
        },
    )
    # Around all of it: middleware of Starlette's would not see the answer to a fault.
    return Protection(
        app,
        hosts=settings.hosts,
        scheme="https" if secure else "http",
        open_paths=frozenset({HEALTH}),
    )


async def _health(_: Request) -> Response:
    """Tell that the page is up. Whether Latchkey is, it tells people and not probes."""
    return PlainTextResponse("ok\n")


class _SignIn:
    """The addresses of signing in and out."""

    def __init__(self, openid: OpenId, seals: Seals, renderer: Renderer) -> None:
        self._openid = openid
        self._seals = seals
        self._renderer = renderer

    def routes(self) -> list[Route]:
        return [
            Route("/sign-in", self.sign_in),
            Route("/signed-in", self.signed_in),
            Route("/sign-out", self.sign_out, methods=["POST"]),
            Route("/signed-out", self.signed_out),
        ]

    async def sign_in(self, request: Request) -> Response:
        """Send the browser to the provider."""
        return await self._openid.begin(request)

    async def signed_in(self, request: Request) -> Response:
        """Take the browser back from the provider, to where it wanted to go."""
        wanted, draft = request.session.get("return", "/"), request.session.get("draft")
        await self._openid.finish(request)
        if draft is not None:
            request.session["draft"] = draft
        return RedirectResponse(wanted if isinstance(wanted, str) else "/", 303)

    async def sign_out(self, request: Request) -> Response:
        """Sign out here, then at the provider."""
        try:
            fields = await read_form(request)
        except BadForm:
            fields = {}
        try:
            account_id = self._openid.viewer(request).account_id
        except NotSignedIn:
            return RedirectResponse("/signed-out", 303)
        if not self._seals.is_csrf(fields.get("csrf", ""), session_id(request), account_id):
            raise Refused(403, "You are still signed in", "Go back to the page and sign out there.")
        url = await self._openid.end(request)
        if url is None:
            return RedirectResponse("/signed-out", 303)
        # Not a redirect of the form's: the policy lets forms go nowhere else, and rightly.
        told = Trouble(200, "Signing out", "You are signed out here, and at the provider next.")
        response = self._renderer.message(told, None, action=("Continue", url))
        response.headers["refresh"] = f"0; url={url}"
        return response

    async def signed_out(self, _: Request) -> Response:
        """Say so, and do not sign in again by itself."""
        told = Trouble(200, "You are signed out", "To be sure, close the browser's windows.")
        return self._renderer.message(told, None, action=("Sign in", "/sign-in"))


class _Errors:
    """What a browser gets when a page could not be made."""

    def __init__(self, renderer: Renderer, openid: OpenId | None) -> None:
        self._renderer = renderer
        self._openid = openid

    async def not_signed_in(self, request: Request, _: Exception) -> Response:
        """Lead to the sign-in, unless something was sent: then say that it was not done."""
        if request.method in ("GET", "HEAD") and not is_part(request):
            wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            if request.url.path in _RETURNS and len(wanted) <= _RETURN_LENGTH_MAX:
                request.session["return"] = wanted
            return RedirectResponse("/sign-in", 303)
        told = Trouble(
            401, "You are not signed in any more", "Nothing was changed. Sign in and try again."
        )
        return self._renderer.message(
            told, None, part=is_part(request), action=("Sign in", "/sign-in")
        )

    async def refused(self, request: Request, error: Exception) -> Response:
        """Say why."""
        if not isinstance(error, Refused):
            raise error
        action = ("Try again", "/sign-in") if self._openid else None
        return self._renderer.message(
            Trouble(error.status, error.title, error.text),
            None,
            part=is_part(request),
            action=action,
        )

    async def http(self, request: Request, error: Exception) -> Response:
        """Say that there is no such page, or no such way to use it."""
        if not isinstance(error, HTTPException):
            raise error
        title = "There is no such page" if error.status_code == 404 else "This does not work so"
        told = Trouble(error.status_code, title, "The tokens are one click away.")
        response = self._renderer.message(
            told, None, part=is_part(request), action=("API Tokens", "/")
        )
        response.headers.update(error.headers or {})
        return response

    async def unexpected(self, request: Request, error: Exception) -> Response:
        """Say that it is our fault. What it was is in the log, by type: texts may quote a form."""
        number = secrets.token_hex(4)
        _log.error("fault %s: %s at %s", number, type(error).__name__, request.url.path)
        told = Trouble(
            500,
            "The page had a fault",
            "Reload to see what is so. If it stays, tell whoever runs this page.",
            number,
        )
        return self._renderer.message(told, None, part=is_part(request), action=("API Tokens", "/"))

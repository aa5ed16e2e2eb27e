"""Assembles the application: routes, middleware and error pages."""

import asyncio
import contextlib
import json
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
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from latchkey_console.accounts import NotChosen, ProxyAccounts, choose
from latchkey_console.base_path import BasePath
from latchkey_console.choosing import Choosing
from latchkey_console.cookies import CookieRules, Sessions
from latchkey_console.ended import PEERS_PATH, Ended, Peers
from latchkey_console.failures import Trouble
from latchkey_console.frame import Frame
from latchkey_console.identity import FixedAccount, Identity, NotSignedIn, ProxyHeader, Refused
from latchkey_console.lifecycle import Lifecycle
from latchkey_console.openid import SIGN_IN_SECONDS, SIGN_OUT, OpenId
from latchkey_console.operations import Operations
from latchkey_console.operators import ProxyOperators
from latchkey_console.pages import Pages
from latchkey_console.protection import BadForm, Protection, Seals, read_form, session_id
from latchkey_console.rendering import Renderer, is_part
from latchkey_console.selection import Selection
from latchkey_console.settings import Peer, ProxySettings, Settings
from latchkey_console.showing import Displays
from latchkey_console.state import StateKeys

__all__ = ["HEALTH", "console_of", "make_app"]

_log = logging.getLogger("latchkey.console")

HEALTH: Final = "/healthz"
# Pages to which a sign-in may return. They only display things.
_RETURNS: Final = frozenset(
    {
        *("/", "/new", "/delete", "/token", "/replace", "/edit", "/disable", "/retire"),
        *("/audit", "/servers"),
    }
)
_RETURN_LENGTH_MAX: Final = 512
# The text and the URL of the link on error pages, and what to do there.
_START: Final = ("API Tokens", "/", "Go back to your tokens.")
_OPERATORS_START: Final = ("Find a token", "/", "Go back to the search.")


def make_app(
    settings: Settings,
    *,
    client: latchkey.Client | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    monotonic: Callable[[], float] = time.monotonic,
) -> ASGIApp:
    """Return the console as an ASGI application. Run its lifespan, which closes the client.

    `client` replaces the client for the settings' target.
    """
    client = client or latchkey.Client(settings.target)
    # Without keys in a file, a new one at each start ends the sessions of the previous process.
    keys = StateKeys(settings.state_keys, console_of(settings))
    embedding = settings.embedding
    rules = CookieRules(
        settings.cookie_name,
        f"{embedding.base_path}/",
        secure=settings.https,
        framed=settings.https and bool(embedding.frame_ancestors),
    )
    renderer = Renderer(settings.brand, embedding, rules)
    ended = Ended(now)
    own = Peer(settings.host, settings.port)
    peers = Peers(ended, settings.peers, keys, embedding.base_path, now, own)
    openid: OpenId | None = None
    identity: Identity
    if settings.account is not None:
        identity = FixedAccount(settings.account)
    elif settings.proxy is not None:
        identity = _proxied(settings.proxy)
    elif settings.openid is not None:
        identity = openid = OpenId(
            settings.openid, settings.home_url, rules, keys, ended, peers, now
        )
    else:
        raise ValueError("the settings do not say how to identify visitors")
    seals = Seals(keys.signing("forms"))
    if settings.is_for_operators:
        routes = Operations(client, identity, seals, renderer, now).routes()
        errors = _Errors(renderer, openid, _OPERATORS_START)
    else:
        frame = Frame(client, identity, seals, renderer, rules, keys, now, monotonic)
        displays = Displays(client, rules, keys, now, monotonic)
        routes = _token_routes(frame, displays, renderer)
        if settings.has_accounts:
            routes += Choosing(frame, renderer).routes()
        errors = _Errors(renderer, openid, _START)
    routes += [
        Route("/static/{version}/{name}", renderer.static),
        Route(HEALTH, _health),
        Route(PEERS_PATH, peers.serve, methods=["POST"]),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            await peers.fetch()
            fetching = asyncio.create_task(peers.fetch_regularly())
            try:
                yield
            finally:
                fetching.cancel()

    if openid is not None:
        routes += _SignIn(openid, seals, renderer).routes()
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(
                Sessions, rules=rules, box=keys.box("session", now), max_age=SIGN_IN_SECONDS
            ),
        ],
        exception_handlers={
            NotSignedIn: errors.not_signed_in,
            NotChosen: errors.not_chosen,
            Refused: errors.refused,
            HTTPException: errors.http,
            Exception: errors.unexpected,
        },
    )
    # It would redirect to addresses without the base path.
    app.router.redirect_slashes = False
    # Wraps the whole app: Starlette's own middleware would not see the answer to a crash.
    open_paths = frozenset({HEALTH, PEERS_PATH})
    protected = Protection(
        app,
        hosts=settings.hosts,
        scheme="https" if settings.https else "http",
        open_paths=open_paths,
        frame_ancestors=embedding.frame_ancestors,
    )
    return BasePath(protected, embedding.base_path, open_paths)


def console_of(settings: Settings) -> str:
    """Return what distinguishes this console from another one that has the same keys.

    A sign-in counts only where it was checked: at this address, with this provider, these claims
    and these groups. Otherwise, somebody could carry the cookie of an API Tokens page to the
    operators' view.
    """
    proxy, openid = settings.proxy, settings.openid
    ways = [
        settings.account,
        proxy and [proxy.header, proxy.person_header, proxy.several, sorted(proxy.operators)],
        openid
        and [
            *(openid.issuer, openid.client_id, openid.claim, openid.accounts_claim),
            *(openid.accounts_key, openid.groups_claim, sorted(openid.operators)),
        ],
    ]
    return json.dumps([settings.home_url, ways])


def _proxied(settings: ProxySettings) -> Identity:
    """Return the identity for what a sign-in proxy sends."""
    if settings.operators:
        return ProxyOperators(settings)
    return ProxyAccounts(settings) if settings.several else ProxyHeader(settings)


def _token_routes(frame: Frame, displays: Displays, renderer: Renderer) -> list[Route]:
    """Return the routes of the API Tokens page."""
    pages = Pages(frame, displays)
    return [
        Route("/", pages.index),
        Route("/rows", pages.rows),
        Route("/new", pages.new),
        Route("/tokens", pages.create, methods=["POST"]),
        Route("/created/{place}", pages.created),
        Route("/seal.svg", renderer.seal),
        Route("/delete", pages.confirm_delete, methods=["GET"]),
        Route("/delete", pages.delete, methods=["POST"]),
        *Lifecycle(frame, displays).routes(),
        *Selection(frame).routes(),
    ]


async def _health(_: Request) -> Response:
    """Report that the console runs. The pages, not this probe, show whether Latchkey does."""
    return PlainTextResponse("ok\n")


class _SignIn:
    """The routes that sign people in and out."""

    def __init__(self, openid: OpenId, seals: Seals, renderer: Renderer) -> None:
        self._openid = openid
        self._seals = seals
        self._renderer = renderer

    def routes(self) -> list[Route]:
        return [
            Route("/sign-in", self.sign_in),
            Route("/signed-in", self.signed_in),
            Route(SIGN_OUT, self.sign_out, methods=["POST"]),
            Route("/signed-out", self.signed_out),
        ]

    async def sign_in(self, request: Request) -> Response:
        """Redirect the browser to the provider."""
        return await self._openid.begin(request)

    async def signed_in(self, request: Request) -> Response:
        """Complete the sign-in and redirect the browser to the page it first asked for."""
        wanted, draft = request.session.get("return", "/"), request.session.get("draft")
        remember = await self._openid.finish(request)
        if draft is not None:
            request.session["draft"] = draft
        response = self._renderer.redirect(wanted if isinstance(wanted, str) else "/")
        remember(response)
        return response

    async def sign_out(self, request: Request) -> Response:
        """End the session here, then at the provider."""
        try:
            fields = await read_form(request)
        except BadForm:
            fields = {}
        try:
            viewer = self._openid.viewer(request)
        except NotSignedIn:
            return self._renderer.redirect("/signed-out")
        try:
            account_id = choose(viewer, fields.get("account", "")).account_id
        except NotChosen:
            # The form of the page on which the visitor chooses.
            account_id = ""
        if not self._seals.is_csrf(fields.get("csrf", ""), session_id(request), account_id):
            raise Refused(403, "You are still signed in", "Go back and use the Sign out button.")
        url = await self._openid.end(request)
        if url is None:
            return self._renderer.redirect("/signed-out")
        # Not a plain redirect: the content security policy keeps forms on this site.
        message = Trouble(
            200,
            "Signing out",
            "You are signed out of this page. Continue to sign out of the provider.",
        )
        response = self._renderer.message(message, None, action=("Continue", url))
        response.headers["refresh"] = f"0; url={url}"
        return response

    async def signed_out(self, _: Request) -> Response:
        """Confirm the sign-out. An automatic sign-in would undo it."""
        message = Trouble(200, "You are signed out", "To be safe, close all browser windows.")
        return self._renderer.message(message, None, action=("Sign in", "/sign-in"))


class _Errors:
    """Error pages."""

    def __init__(
        self, renderer: Renderer, openid: OpenId | None, start: tuple[str, str, str]
    ) -> None:
        self._renderer = renderer
        self._openid = openid
        text, url, self._back = start
        self._start = (text, url)

    async def not_signed_in(self, request: Request, error: Exception) -> Response:
        """Redirect to the sign-in, or report that a submitted form had no effect."""
        if request.method in ("GET", "HEAD") and not is_part(request):
            wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            if request.url.path in _RETURNS and len(wanted) <= _RETURN_LENGTH_MAX:
                request.session["return"] = wanted
            return self._renderer.redirect("/sign-in")
        text = " ".join(("Nothing was changed. Sign in and try again.", *map(str, error.args)))
        message = Trouble(401, "You are no longer signed in", text)
        return self._renderer.message(
            message, None, part=is_part(request), action=("Sign in", "/sign-in")
        )

    async def not_chosen(self, request: Request, _: Exception) -> Response:
        """Let the visitor choose an account, or report that a submitted form had no effect."""
        if request.method in ("GET", "HEAD") and not is_part(request):
            return self._renderer.redirect("/accounts")
        message = Trouble(
            400,
            "Choose an account first",
            "Nothing was changed. This request does not say which of your accounts it is for.",
        )
        action = ("Choose an account", "/accounts")
        return self._renderer.message(message, None, part=is_part(request), action=action)

    async def refused(self, request: Request, error: Exception) -> Response:
        """Explain why the request was refused."""
        if not isinstance(error, Refused):
            raise error
        action = error.action or (("Try again", "/sign-in") if self._openid else None)
        return self._renderer.message(
            Trouble(error.status, error.title, error.text),
            None,
            part=is_part(request),
            action=action,
        )

    async def http(self, request: Request, error: Exception) -> Response:
        """Report an unknown page or an unsupported method."""
        if not isinstance(error, HTTPException):
            raise error
        title = "Page not found" if error.status_code == 404 else "This request is not supported"
        message = Trouble(error.status_code, title, self._back)
        response = self._renderer.message(message, None, part=is_part(request), action=self._start)
        response.headers.update(error.headers or {})
        return response

    async def unexpected(self, request: Request, error: Exception) -> Response:
        """Report an internal error. Log only its type, because its text may quote a form."""
        number = secrets.token_hex(4)
        _log.error("fault %s: %s at %s", number, type(error).__name__, request.url.path)
        message = Trouble(
            500,
            "Something went wrong on this page",
            "Reload to see the current state. If the error persists, contact the administrator.",
            number,
        )
        return self._renderer.message(message, None, part=is_part(request), action=self._start)

"""Protects the pages from other sites, other people and caches: sessions, form seals, hosts and
headers.

This module owns the checks that apply to every page. `identity` identifies the visitor.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import Final

from itsdangerous import BadSignature, Signer, TimestampSigner
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latchkey_console.forms import BODY_BYTES_MAX, SELECTION_BYTES_MAX, parse_body

__all__ = [
    "FORM_SECONDS",
    "BadForm",
    "Protection",
    "Seals",
    "new_session",
    "read_form",
    "session_id",
]

# How long a form may stay open. An older form is shown again as typed, to be submitted once more.
FORM_SECONDS: Final = 3_600
# A form takes a few hundred bytes. Clients that send it too slowly are dropped.
BODY_SECONDS: Final = 10.0
_UNSAFE: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})

# Forbids inline scripts and styles, foreign resources, and forms to other sites.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors "
)
_HEADERS: Final[Mapping[str, str]] = {
    "x-content-type-options": "nosniff",
    # Not no-referrer: with it, browsers send forms with the origin "null".
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class BadForm(Exception):
    """The body is not one of our forms, is too large, or did not arrive in time."""


class Protection:
    """Middleware that refuses unknown hosts and foreign forms and sets headers on every answer.

    The Host header must be one of our names. This stops DNS rebinding, in which an attacker's page
    keeps its own name but suddenly points it at 127.0.0.1. `open_paths` skip this check for probes,
    which call by address; they reveal nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: frozenset[str],
        scheme: str,
        open_paths: frozenset[str],
        frame_ancestors: Sequence[str] = (),
    ) -> None:
        self._app = app
        policy = _POLICY + (" ".join(frame_ancestors) or "'none'")
        self._headers = {"content-security-policy": policy, **_HEADERS}
        if not frame_ancestors:
            # For old browsers. It cannot name origins.
            self._headers["x-frame-options"] = "DENY"
        self._hosts = hosts
        self._origins = frozenset(f"{scheme}://{host}" for host in hosts)
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers[name] = value
                # Only static files set another value, and they contain no personal data.
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = None if scope["path"] in self._open_paths else self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return PlainTextResponse(
                "This page is not served under this name. Use the address that it was started "
                "with. --public-url sets the name that browsers use.\n",
                421,
            )
        if scope["method"] not in _UNSAFE or self._is_ours(headers):
            return None
        return PlainTextResponse(
            "This form did not come from this page, so nothing was changed. Open the page itself "
            "and try again.\n",
            403,
        )

    def _is_ours(self, headers: Headers) -> bool:
        """Return whether one of our pages sent the form, by headers that all current browsers set.

        The forms' seals are a second, independent defence.
        """
        origins, sites = headers.getlist("origin"), headers.getlist("sec-fetch-site")
        if any(site != "same-origin" for site in sites):
            return False
        if origins:
            return len(origins) == 1 and origins[0].lower() in self._origins
        return bool(sites)


def session_id(request: Request) -> str:
    """Return the id of the browser's session. Starts a session if there is none."""
    session: dict[str, object] = request.session
    found = session.get("id")
    return found if isinstance(found, str) and found else new_session(request)


def new_session(request: Request) -> str:
    """Start a new, empty session and return its id."""
    created = secrets.token_urlsafe(24)
    request.session.clear()
    request.session["id"] = created
    return created


class Seals:
    """Signs forms, to prove their session and account and to recognise repeated submissions."""

    def __init__(self, keys: Sequence[str]) -> None:
        """`keys` are those of all seals that are valid. The last one makes new seals."""
        self._keys = list(keys)

    def csrf(self, session: str, account_id: str) -> str:
        """Return the seal that every form of the session carries."""
        return self._signer(session, account_id).get_signature(b"form").decode()

    def is_csrf(self, value: str, session: str, account_id: str) -> bool:
        """Return whether `value` is that seal. Runs in constant time."""
        return self._signer(session, account_id).verify_signature(b"form", value.encode())

    def new_form(self, session: str, account_id: str) -> str:
        """Return the signed mark of a new form. Repeated submissions with it count once."""
        mark = secrets.token_urlsafe(12)
        return self._timed(session, account_id).sign(mark).decode()

    def form(self, value: str, session: str, account_id: str) -> str | None:
        """Return the mark, or None if it belongs to another session or is over an hour old."""
        try:
            mark = self._timed(session, account_id).unsign(value, max_age=FORM_SECONDS)
        except BadSignature:
            return None
        return mark.decode()

    def _signer(self, session: str, account_id: str) -> Signer:
        return Signer(self._keys, salt=f"csrf {session} {account_id}", key_derivation="hmac")

    def _timed(self, session: str, account_id: str) -> TimestampSigner:
        return TimestampSigner(self._keys, salt=f"mark {session} {account_id}")


async def read_form(
    request: Request, repeated: str = "", bytes_max: int = BODY_BYTES_MAX
) -> dict[str, str]:
    """Return the fields of a submitted form, bounded in size and time. Raises BadForm.

    The field `repeated` may occur several times; see `parse_body`.
    """
    bytes_max = SELECTION_BYTES_MAX if repeated else bytes_max
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise BadForm
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > bytes_max:
                    raise BadForm
        return parse_body(body, repeated)
    except (TimeoutError, ValueError, ClientDisconnect):
        raise BadForm from None

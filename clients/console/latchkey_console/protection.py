"""What keeps other sites, other people and caches out: sessions, forms' seals, hosts and headers.

It owns the checks that hold for every page. Who is looking is `identity`'s.
"""

import asyncio
import secrets
from collections.abc import Mapping
from typing import Final

from itsdangerous import BadSignature, Signer, TimestampSigner
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latchkey_console.forms import BODY_BYTES_MAX, parse_body

__all__ = [
    "FORM_SECONDS",
    "BadForm",
    "Protection",
    "Seals",
    "new_session",
    "read_form",
    "session_id",
]

# As long as a form may lie open. Then it is given back as it was typed, to be sent once more.
FORM_SECONDS: Final = 3_600
# A form has a few hundred bytes. Who sends them one by one is not waited for.
BODY_SECONDS: Final = 10.0
_UNSAFE: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})

# No inline script or style, nothing from elsewhere, in no frame. Forms go here only.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": _POLICY,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    # Not no-referrer, with which browsers send forms with the origin "null".
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class BadForm(Exception):
    """What was sent is not a form of this page's, or too large, or did not arrive."""


class Protection:
    """Middleware: refuses wrong hosts and forms from elsewhere, and puts headers on every answer.

    A name that leads a browser here without being ours is DNS rebinding: a page of somebody else's
    under a name of their own that suddenly points at 127.0.0.1. So the Host header is held to the
    names that we know. `open_paths` are for probes, which call by address, and tell nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: frozenset[str],
        scheme: str,
        open_paths: frozenset[str],
    ) -> None:
        self._app = app
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
                for name, value in _HEADERS.items():
                    headers[name] = value
                # Static files, which say otherwise, have nothing of anybody's in them.
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
                "with; --public-url says by which name browsers reach it.\n",
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
        """Tell whether a form was sent by a page of ours; every browser of today says so.

        Beside the forms' own seals, which hold even where this should not.
        """
        origins, sites = headers.getlist("origin"), headers.getlist("sec-fetch-site")
        if any(site != "same-origin" for site in sites):
            return False
        if origins:
            return len(origins) == 1 and origins[0].lower() in self._origins
        return bool(sites)


def session_id(request: Request) -> str:
    """Return the id of the browser's session, beginning one if there is none."""
    session: dict[str, object] = request.session
    found = session.get("id")
    return found if isinstance(found, str) and found else new_session(request)


def new_session(request: Request) -> str:
    """Begin a session anew, with nothing of the one before, and return its id."""
    created = secrets.token_urlsafe(24)
    request.session.clear()
    request.session["id"] = created
    return created


class Seals:
    """Signs what forms carry: that they are of this session and account, and which form it was."""

    def __init__(self, key: str) -> None:
        self._key = key

    def csrf(self, session: str, account_id: str) -> str:
        """Return what every form of the session carries."""
        return self._signer(session, account_id).get_signature(b"form").decode()

    def is_csrf(self, value: str, session: str, account_id: str) -> bool:
        """Tell whether `value` is that. In constant time."""
        return self._signer(session, account_id).verify_signature(b"form", value.encode())

    def new_form(self, session: str, account_id: str) -> str:
        """Return the mark of one form, by which it is done once however often it is sent."""
        mark = secrets.token_urlsafe(12)
        return self._timed(session, account_id).sign(mark).decode()

    def form(self, value: str, session: str, account_id: str) -> str | None:
        """Return the mark, or None when it is not of this session, or an hour old."""
        try:
            mark = self._timed(session, account_id).unsign(value, max_age=FORM_SECONDS)
        except BadSignature:
            return None
        return mark.decode()

    def _signer(self, session: str, account_id: str) -> Signer:
        return Signer(self._key, salt=f"csrf {session} {account_id}", key_derivation="hmac")

    def _timed(self, session: str, account_id: str) -> TimestampSigner:
        return TimestampSigner(self._key, salt=f"mark {session} {account_id}")


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form that was sent. Raises BadForm; bounded in size and time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise BadForm
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES_MAX:
                    raise BadForm
        return parse_body(body)
    except (TimeoutError, ValueError, ClientDisconnect):
        raise BadForm from None

"""Guard for ASGI applications: HTTP and WebSocket, any framework.

    app = GuardMiddleware(app, verifier)

It owns the way from a request's headers to a refusal (RFC 6750 §3); `_decision` decides.
"""

import json
import math
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any, Final

from latchkey.guards._decision import (
    Decision,
    Outcome,
    SupportsVerify,
    checked_scope,
    decide,
    token_var,
)
from latchkey.models import Scope

__all__ = ["GuardMiddleware", "scope_by_method"]

# ASGI calls it "scope", which is another thing here.
Connection = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Connection, Receive, Send], Awaitable[None]]

# RFC 9110 §9.2.1, without TRACE, which no service has a use for.
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})

# When Latchkey does not say how long to wait.
RETRY_AFTER_SECONDS: Final = 1
# RFC 6455 §7.4.1: policy violation; and 1013, try again later (IANA registry).
_CLOSE_REFUSED: Final = 1008
_CLOSE_UNAVAILABLE: Final = 1013

# Same text for a token that expired, was deleted or never existed: it is not told which.
_REFUSALS: Final[Mapping[Outcome, tuple[HTTPStatus, str]]] = {
    Outcome.MISSING: (
        HTTPStatus.UNAUTHORIZED,
        "No bearer token: send the header 'Authorization: Bearer <token>'.",
    ),
    Outcome.INVALID: (HTTPStatus.UNAUTHORIZED, "The bearer token is not valid."),
    Outcome.FORBIDDEN: (
        HTTPStatus.FORBIDDEN,
        "The bearer token's scope does not include this request.",
    ),
    Outcome.UNAVAILABLE: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The bearer token cannot be verified now. Try again later.",
    ),
}


def scope_by_method(connection: Connection) -> Scope:
    """Return READ for GET, HEAD and OPTIONS, and WRITE for all else, WebSockets included."""
    if connection["type"] == "http" and connection["method"] in _SAFE_METHODS:
        return Scope.READ
    return Scope.WRITE


class GuardMiddleware:
    """Lets a request in when its bearer token is valid and its scope includes what it needs.

    `required_scope` is a Scope for all requests, None for "any valid token", or a function of the
    ASGI connection scope that returns one of these. Paths in `public` need no token, exactly as
    they are spelled. All else is refused: 401 or 403 with WWW-Authenticate, 503 with Retry-After
    when Latchkey gives no safe answer; a WebSocket is refused before it is accepted. An exception
    from a `required_scope` function lets nobody in and is the server's to report.

    The application finds the token with `latchkey.guards.current_token()` and as
    `scope["latchkey.token"]`. CORS preflights carry no token: put CORS middleware around this.
    """

    def __init__(
        self,
        app: App,
        verifier: SupportsVerify,
        required_scope: Scope | Callable[[Connection], Scope | None] | None = scope_by_method,
        *,
        public: Collection[str] = (),
        realm: str = "latchkey",
    ) -> None:
        if isinstance(public, str):
            raise TypeError("public is a collection of paths, not one of them")
        if re.fullmatch(r"[ !#-\[\]-~]+", realm) is None:
            raise ValueError("realm has to be printable ASCII without quotes and backslashes")
        self._app = app
        self._verifier = verifier
        self._required_scope = (
            required_scope if callable(required_scope) else checked_scope(required_scope)
        )
        self._public = frozenset(public)
        self._realm = realm

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
            return
        if kind not in ("http", "websocket"):
            # Something newer than this guard, which cannot know how to refuse it.
            raise ValueError(f"the guard lets no connection of type {kind!r} through")
        if scope["path"] in self._public:
            await self._app(scope, receive, send)
            return

        required = self._required_scope
        if callable(required):
            required = checked_scope(required(scope))
        authorization = [
            value.decode("latin-1")
            for name, value in scope["headers"]
            if name.lower() == b"authorization"
        ]
        decision = await decide(self._verifier, authorization, required)
        if decision.outcome is Outcome.ALLOWED:
            reset = token_var.set(decision.token)
            try:
                await self._app({**scope, "latchkey.token": decision.token}, receive, send)
            finally:
                token_var.reset(reset)
        elif kind == "http":
            await self._refuse_http(decision, required, scope, send)
        else:
            await self._refuse_websocket(decision, required, scope, receive, send)

    async def _refuse_http(
        self,
        decision: Decision,
        required: Scope | None,
        scope: Connection,
        send: Send,
        *,
        prefix: str = "http.response",
    ) -> None:
        status, detail = _REFUSALS[decision.outcome]
        # RFC 9457
        problem = {"title": status.phrase, "status": status.value, "detail": detail}
        body = json.dumps(problem).encode()
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            *self._headers(decision, required),
        ]
        await send({"type": f"{prefix}.start", "status": status.value, "headers": headers})
        head = scope.get("method") == "HEAD"
        await send({"type": f"{prefix}.body", "body": b"" if head else body})

    def _headers(self, decision: Decision, required: Scope | None) -> list[tuple[bytes, bytes]]:
        """Return the headers that tell a refused caller what would help (RFC 6750 §3)."""
        if decision.outcome is Outcome.UNAVAILABLE:
            asked = decision.retry_after.total_seconds() if decision.retry_after else 0.0
            wait = max(RETRY_AFTER_SECONDS, math.ceil(asked))
            return [(b"retry-after", str(wait).encode())]
        challenge = f'Bearer realm="{self._realm}"'
        if decision.outcome is Outcome.INVALID:
            challenge += ', error="invalid_token"'
        elif decision.outcome is Outcome.FORBIDDEN:
            challenge += ', error="insufficient_scope"'
            if required is not None:
                challenge += f', scope="{required.value}"'
        # MISSING has no error code: nothing was wrong with what was not there (§3.1).
        return [(b"www-authenticate", challenge.encode("ascii"))]

    async def _refuse_websocket(
        self,
        decision: Decision,
        required: Scope | None,
        scope: Connection,
        receive: Receive,
        send: Send,
    ) -> None:
        message = await receive()
        if message["type"] != "websocket.connect":
            return  # gone before it was answered
        if "websocket.http.response" in (scope.get("extensions") or {}):
            await self._refuse_http(
                decision, required, scope, send, prefix="websocket.http.response"
            )
            return
        # Before acceptance servers answer the handshake with 403, whatever the code.
        unavailable = decision.outcome is Outcome.UNAVAILABLE
        code = _CLOSE_UNAVAILABLE if unavailable else _CLOSE_REFUSED
        await send({"type": "websocket.close", "code": code, "reason": ""})

"""Guard for ASGI applications: HTTP and WebSocket, any framework.

    app = GuardMiddleware(app, verifier)

This module translates a decision of `_decision` into a refusal (RFC 6750 §3).
"""

import json
import math
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any, Final

from latchkey.guards._address import TrustedProxies
from latchkey.guards._decision import (
    Decision,
    Outcome,
    SupportsVerify,
    checked_permissions,
    checked_scope,
    decide,
    token_var,
)
from latchkey.models import Scope

__all__ = ["GuardMiddleware", "scope_by_method"]

# ASGI calls this "scope", which means something else here.
Connection = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Connection, Receive, Send], Awaitable[None]]

# RFC 9110 §9.2.1, without TRACE, which services do not use.
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})

# The delay if Latchkey does not request one.
RETRY_AFTER_SECONDS: Final = 1
# 1008: policy violation (RFC 6455 §7.4.1). 1013: try again later (IANA registry).
_CLOSE_REFUSED: Final = 1008
_CLOSE_UNAVAILABLE: Final = 1013

# An expired, a deleted and an unknown token get the same text, so that holders cannot probe.
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
    Outcome.UNPERMITTED: (
        HTTPStatus.FORBIDDEN,
        "The bearer token lacks a permission that this request requires.",
    ),
    Outcome.WRONG_ADDRESS: (
        HTTPStatus.FORBIDDEN,
        "The bearer token may not be used from this address.",
    ),
    Outcome.UNAVAILABLE: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The bearer token cannot be verified now. Try again later.",
    ),
}


def scope_by_method(connection: Connection) -> Scope:
    """Return READ for GET, HEAD and OPTIONS. Return WRITE for everything else, also WebSockets."""
    if connection["type"] == "http" and connection["method"] in _SAFE_METHODS:
        return Scope.READ
    return Scope.WRITE


class GuardMiddleware:
    """Lets a request in if its bearer token is valid for the required scope and permissions.

    `required_scope` is a Scope for all requests, None to accept any valid token, or a function of
    the ASGI connection scope that returns one of these. `required_permissions` are of the form
    `resource:action`, for all requests, or a function that returns them. If a function raises, the
    request is not served, and the server reports the exception. Requests whose path is exactly in
    `public` need no token.

    Tokens may be limited to networks. The client's address is that of the connection. Behind
    proxies, name their networks as `trusted_proxies`; the address is then the last one in
    X-Forwarded-For that is not a trusted proxy.

    Other requests are refused with 401 or 403 and WWW-Authenticate. If Latchkey gives no safe
    answer, they are refused with 503 and Retry-After. A WebSocket is refused before it is accepted.

    The application finds the token with `latchkey.guards.current_token()` and as
    `scope["latchkey.token"]`. CORS preflights carry no token, so wrap this in CORS middleware.
    """

    def __init__(
        self,
        app: App,
        verifier: SupportsVerify,
        required_scope: Scope | Callable[[Connection], Scope | None] | None = scope_by_method,
        *,
        required_permissions: Collection[str] | Callable[[Connection], Collection[str]] = (),
        trusted_proxies: Collection[str] = (),
        public: Collection[str] = (),
        realm: str = "latchkey",
    ) -> None:
        if isinstance(public, str):
            raise TypeError("public must be a collection of paths, not a single path")
        if re.fullmatch(r"[ !#-\[\]-~]+", realm) is None:
            raise ValueError("realm must be printable ASCII without quotes and backslashes")
        self._app = app
        self._verifier = verifier
        self._required_scope = (
            required_scope if callable(required_scope) else checked_scope(required_scope)
        )
        self._required_permissions = (
            required_permissions
            if callable(required_permissions)
            else checked_permissions(required_permissions)
        )
        self._proxies = TrustedProxies(trusted_proxies)
        self._public = frozenset(public)
        self._realm = realm

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
            return
        if kind not in ("http", "websocket"):
            # A newer connection type, which this guard does not know how to refuse.
            raise ValueError(f"the guard does not support connections of type {kind!r}")
        if scope["path"] in self._public:
            await self._app(scope, receive, send)
            return

        required = self._required_scope
        if callable(required):
            required = checked_scope(required(scope))
        permissions = self._required_permissions
        if callable(permissions):
            permissions = checked_permissions(permissions(scope))
        # Absent on a UNIX socket, or if the server does not know it.
        peer, _ = scope.get("client") or ("", None)
        decision = await decide(
            self._verifier,
            _values(scope, b"authorization"),
            required,
            client_address=self._proxies.client_address(peer, _values(scope, b"x-forwarded-for")),
            permissions=permissions,
        )
        if decision.outcome is Outcome.ALLOWED:
            reset = token_var.set(decision.token)
            try:
                await self._app({**scope, "latchkey.token": decision.token}, receive, send)
            finally:
                token_var.reset(reset)
            return
        scopes = [] if required is None else [required.value]
        wanted = " ".join([*scopes, *permissions])
        if kind == "http":
            await self._refuse_http(decision, wanted, scope, send)
        else:
            await self._refuse_websocket(decision, wanted, scope, receive, send)

    async def _refuse_http(
        self,
        decision: Decision,
        wanted: str,
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
            *self._headers(decision, wanted),
        ]
        await send({"type": f"{prefix}.start", "status": status.value, "headers": headers})
        head = scope.get("method") == "HEAD"
        await send({"type": f"{prefix}.body", "body": b"" if head else body})

    def _headers(self, decision: Decision, wanted: str) -> list[tuple[bytes, bytes]]:
        """Return the headers that tell a refused client what to do (RFC 6750 §3).

        `wanted` are the scope and the permissions that the request requires.
        """
        if decision.outcome is Outcome.UNAVAILABLE:
            asked = decision.retry_after.total_seconds() if decision.retry_after else 0.0
            wait = max(RETRY_AFTER_SECONDS, math.ceil(asked))
            return [(b"retry-after", str(wait).encode())]
        challenge = f'Bearer realm="{self._realm}"'
        if decision.outcome is Outcome.INVALID:
            challenge += ', error="invalid_token"'
        elif decision.outcome in (Outcome.FORBIDDEN, Outcome.UNPERMITTED):
            challenge += ', error="insufficient_scope"'
            if wanted:
                challenge += f', scope="{wanted}"'
        # MISSING has no error code, because the request contained nothing wrong (§3.1). For a wrong
        # address, RFC 6750 has none.
        return [(b"www-authenticate", challenge.encode("ascii"))]

    async def _refuse_websocket(
        self,
        decision: Decision,
        wanted: str,
        scope: Connection,
        receive: Receive,
        send: Send,
    ) -> None:
        message = await receive()
        if message["type"] != "websocket.connect":
            return  # the client has disconnected
        if "websocket.http.response" in (scope.get("extensions") or {}):
            await self._refuse_http(decision, wanted, scope, send, prefix="websocket.http.response")
            return
        # Before acceptance, servers answer the handshake with 403 for every code.
        unavailable = decision.outcome is Outcome.UNAVAILABLE
        code = _CLOSE_UNAVAILABLE if unavailable else _CLOSE_REFUSED
        await send({"type": "websocket.close", "code": code, "reason": ""})


def _values(scope: Connection, name: bytes) -> list[str]:
    """Return the values of a header, in their order."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]

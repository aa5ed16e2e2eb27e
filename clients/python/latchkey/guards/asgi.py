"""Guard for ASGI applications: HTTP and WebSocket, any framework.

    app = GuardMiddleware(app, verifier)

This module translates a decision of `_decision` into a refusal (RFC 6750 §3).
"""

from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from typing import Any, Final

from latchkey.guards._decision import (
    Decision,
    Outcome,
    SupportsVerify,
    check_verifier,
    checked_permissions,
    checked_scope,
    decide,
    token_var,
)
from latchkey.guards._http import HttpRequest, HttpRules, Refusal, scope_of_method
from latchkey.models import Scope

__all__ = ["GuardMiddleware", "scope_by_method"]

# ASGI calls this "scope", which means something else here.
Connection = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Connection, Receive, Send], Awaitable[None]]

# 1008: policy violation (RFC 6455 §7.4.1). 1013: try again later (IANA registry).
_CLOSE_REFUSED: Final = 1008
_CLOSE_UNAVAILABLE: Final = 1013


def scope_by_method(connection: Connection) -> Scope:
    """Return READ for GET, HEAD and OPTIONS. Return WRITE for everything else, also WebSockets."""
    return scope_of_method(connection["method"]) if connection["type"] == "http" else Scope.WRITE


def http_request(connection: Connection) -> HttpRequest:
    """Return the parts of an ASGI connection that a guard needs."""

    def header(name: str) -> Sequence[str]:
        wanted = name.encode("ascii")
        return [
            value.decode("latin-1") for key, value in connection["headers"] if key.lower() == wanted
        ]

    target: bytes = connection.get("raw_path") or b""
    method = connection["method"] if connection["type"] == "http" else ""
    # Absent on a UNIX socket, or if the server does not know it.
    peer, _ = connection.get("client") or ("", None)
    return HttpRequest(method, connection["path"], target.decode("latin-1"), header, peer)


class GuardMiddleware:
    """Lets a request in if its bearer token is valid for the required scope and permissions.

    `required_scope` is a Scope for all requests, None to accept any valid token, or a function of
    the ASGI connection scope that returns one of these. `required_permissions` are of the form
    `resource:action`, for all requests, or a function that returns them. If a function raises, the
    request is not served, and the server reports the exception.

    Tokens may be limited to networks. The client's address is that of the connection. Behind
    proxies, name their networks as `trusted_proxies`; the address is then the last one in
    X-Forwarded-For that is not a trusted proxy.

    These requests need no token: those whose path is exactly in `public`; those at or below a path
    in `public_prefixes`, compared by whole segments; and CORS preflights, unless `preflights` is
    False. `api_key_header` names a header, such as "x-api-key", in which clients may send the token
    instead. `realm` names your service in the challenge.

    Other requests are refused with 401 or 403 and WWW-Authenticate. If Latchkey gives no safe
    answer, they are refused with 503 and Retry-After. A WebSocket is refused before it is accepted.

    The application finds the token with `latchkey.guards.current_token()` and as
    `scope["latchkey.token"]`. To let browsers read refusals too, put CORS middleware around it.
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
        public_prefixes: Collection[str] = (),
        preflights: bool = True,
        realm: str = "latchkey",
        api_key_header: str | None = None,
    ) -> None:
        check_verifier(verifier, for_threads=False)
        self._rules = HttpRules(
            public=public,
            public_prefixes=public_prefixes,
            preflights=preflights,
            realm=realm,
            api_key_header=api_key_header,
            trusted_proxies=trusted_proxies,
        )
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

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
            return
        if kind not in ("http", "websocket"):
            # A newer connection type, which this guard does not know how to refuse.
            raise ValueError(f"the guard does not support connections of type {kind!r}")
        request = http_request(scope)
        if self._rules.exempts(request):
            await self._app(scope, receive, send)
            return

        required = self._required_scope
        if callable(required):
            required = checked_scope(required(scope))
        permissions = self._required_permissions
        if callable(permissions):
            permissions = checked_permissions(permissions(scope))
        decision = await decide(
            self._verifier,
            self._rules.authorization(request),
            required,
            api_keys=self._rules.api_keys(request),
            client_address=self._rules.client_address(request),
            permissions=permissions,
            traceparent=request.header("traceparent"),
        )
        if decision.outcome is Outcome.ALLOWED:
            reset = token_var.set(decision.token)
            try:
                await self._app({**scope, "latchkey.token": decision.token}, receive, send)
            finally:
                token_var.reset(reset)
        elif kind == "http":
            refusal = self._rules.refusal(decision, required, permissions)
            await _refuse_http(refusal, scope, send)
        else:
            refusal = self._rules.refusal(decision, required, permissions)
            await _refuse_websocket(refusal, decision, scope, receive, send)


async def _refuse_http(
    refusal: Refusal, scope: Connection, send: Send, *, prefix: str = "http.response"
) -> None:
    headers = [(name.encode(), value.encode("ascii")) for name, value in refusal.all_headers]
    await send({"type": f"{prefix}.start", "status": refusal.status.value, "headers": headers})
    head = scope.get("method") == "HEAD"
    await send({"type": f"{prefix}.body", "body": b"" if head else refusal.body})


async def _refuse_websocket(
    refusal: Refusal, decision: Decision, scope: Connection, receive: Receive, send: Send
) -> None:
    message = await receive()
    if message["type"] != "websocket.connect":
        return  # the client has disconnected
    if "websocket.http.response" in (scope.get("extensions") or {}):
        await _refuse_http(refusal, scope, send, prefix="websocket.http.response")
        return
    # Before acceptance, servers answer the handshake with 403 for every code.
    unavailable = decision.outcome in (Outcome.UNAVAILABLE, Outcome.RATE_LIMITED)
    code = _CLOSE_UNAVAILABLE if unavailable else _CLOSE_REFUSED
    await send({"type": "websocket.close", "code": code, "reason": ""})

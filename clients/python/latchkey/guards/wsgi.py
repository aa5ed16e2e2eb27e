"""Guard for WSGI applications: Flask, Bottle, Pyramid, any framework.

    app.wsgi_app = GuardMiddleware(app.wsgi_app, verifier)

This module translates a decision of `_decision` into a refusal (RFC 6750 §3). It blocks the thread
of the request, so it needs a `latchkey.sync.Verifier`.
"""

import contextvars
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from latchkey.guards._decision import (
    Outcome,
    SupportsVerifySync,
    check_verifier,
    checked_permissions,
    checked_scope,
    decide_blocking,
    token_var,
)
from latchkey.guards._http import HttpRequest, HttpRules, scope_of_method
from latchkey.models import Scope

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["GuardMiddleware", "scope_by_method"]

# Not standard. gunicorn sets the first; uWSGI, werkzeug and mod_wsgi the second.
_TARGETS = ("RAW_URI", "REQUEST_URI")


def scope_by_method(environ: "WSGIEnvironment") -> Scope:
    """Return READ for GET, HEAD and OPTIONS, and WRITE for every other method."""
    return scope_of_method(environ["REQUEST_METHOD"])


class GuardMiddleware:
    """Lets a request in if its bearer token is valid for the required scope and permissions.

    `required_scope` is a Scope for all requests, None to accept any valid token, or a function of
    the WSGI environment that returns one of these. `required_permissions` are of the form
    `resource:action`, for all requests, or a function that returns them. If a function raises, the
    request is not served, and the server reports the exception. `trusted_proxies` is that of
    `latchkey.guards.asgi.GuardMiddleware`.

    These requests need no token: those whose path is exactly in `public`; those at or below a path
    in `public_prefixes`, compared by whole segments; and CORS preflights, unless `preflights` is
    False. Paths are those of the application, below the address where it is mounted.
    `api_key_header` names a header, such as "x-api-key", in which clients may send the token
    instead. `realm` names your service in the challenge.

    Other requests are refused with 401 or 403 and WWW-Authenticate. If Latchkey gives no safe
    answer, they are refused with 503 and Retry-After.

    The application finds the token with `latchkey.guards.current_token()`, even while it streams
    its answer, and as `environ["latchkey.token"]`.
    """

    def __init__(
        self,
        app: "WSGIApplication",
        verifier: SupportsVerifySync,
        required_scope: (
            "Scope | Callable[[WSGIEnvironment], Scope | None] | None"
        ) = scope_by_method,
        *,
        required_permissions: (
            "Collection[str] | Callable[[WSGIEnvironment], Collection[str]]"
        ) = (),
        trusted_proxies: Collection[str] = (),
        public: Collection[str] = (),
        public_prefixes: Collection[str] = (),
        preflights: bool = True,
        realm: str = "latchkey",
        api_key_header: str | None = None,
    ) -> None:
        check_verifier(verifier, for_threads=True)
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

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Serve one request."""
        # A client cannot set it, since it is not the name of a header.
        environ["latchkey.token"] = None
        request = http_request(environ)
        if self._rules.exempts(request):
            return self._app(environ, start_response)
        required = self._required_scope
        if callable(required):
            required = checked_scope(required(environ))
        permissions = self._required_permissions
        if callable(permissions):
            permissions = checked_permissions(permissions(environ))
        decision = decide_blocking(
            self._verifier,
            self._rules.authorization(request),
            required,
            api_keys=self._rules.api_keys(request),
            client_address=self._rules.client_address(request),
            permissions=permissions,
            traceparent=request.header("traceparent"),
        )
        if decision.outcome is Outcome.ALLOWED:
            environ["latchkey.token"] = decision.token
            # Other requests reuse this thread, so run in a separate context.
            context = contextvars.copy_context()
            context.run(token_var.set, decision.token)
            return _InContext(context, context.run(self._app, environ, start_response))
        refusal = self._rules.refusal(decision, required, permissions)
        status = f"{refusal.status.value} {refusal.status.phrase}"
        start_response(status, list(refusal.all_headers))
        return [] if request.method == "HEAD" else [refusal.body]


class _InContext:
    """The answer of an application, which may be made while it is sent, in the same context."""

    def __init__(self, context: contextvars.Context, answer: Iterable[bytes]) -> None:
        self._context = context
        self._answer = answer
        self._parts: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._parts is None:
            self._parts = self._context.run(iter, self._answer)
        return self._context.run(next, self._parts)

    def close(self) -> None:
        """Close the application's answer, as WSGI requires of a wrapper."""
        close: Any = getattr(self._answer, "close", None)
        if close is not None:
            self._context.run(close)


def http_request(environ: "WSGIEnvironment") -> HttpRequest:
    """Return the parts of a WSGI environment that a guard needs."""

    def header(name: str) -> Sequence[str]:
        value = environ.get(f"HTTP_{name.upper().replace('-', '_')}")
        # Servers join repeated headers with a comma, which occurs in no token.
        return () if value is None else (value,)

    # PEP 3333: the bytes of the path, as Latin-1. What is not UTF-8 matches no public path.
    path = environ.get("PATH_INFO", "").encode("latin-1").decode("utf-8", "surrogateescape")
    target = next((environ[name] for name in _TARGETS if name in environ), "")
    # "" on a UNIX socket.
    peer = environ.get("REMOTE_ADDR") or ""
    return HttpRequest(environ["REQUEST_METHOD"], path or "/", target, header, peer)

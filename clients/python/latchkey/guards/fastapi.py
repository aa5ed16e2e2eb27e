"""Guard for individual routes of a FastAPI application, with the padlock in its documentation.

    require = Guard(verifier)

    @app.post("/orders")
    async def place(token: Annotated[Token, Depends(require(Scope.WRITE))]) -> None: ...

This module translates a decision of `_decision` into HTTPException. To guard a whole application,
use `latchkey.guards.asgi`; both may be combined.
"""

from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

from latchkey.guards._missing import not_installed

try:
    from fastapi import Depends, HTTPException, Security, WebSocketException
    from fastapi.openapi.models import APIKey, APIKeyIn, HTTPBearer
    from fastapi.openapi.models import SecurityBase as Model
    from fastapi.requests import HTTPConnection
    from fastapi.security.base import SecurityBase
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "fastapi":
        raise
    raise not_installed("fastapi", "fastapi") from None

from latchkey.guards._decision import (
    Outcome,
    SupportsVerify,
    check_verifier,
    checked_permissions,
    checked_scope,
    decide,
    token_var,
)
from latchkey.guards._http import HttpRules
from latchkey.guards.asgi import http_request
from latchkey.models import Scope, Token

__all__ = ["Guard"]

# As for ASGI: policy violation (RFC 6455 §7.4.1), and try again later (IANA registry).
_CLOSE_REFUSED = 1008
_CLOSE_UNAVAILABLE = 1013

Dependency = Callable[..., AsyncIterator[Token]]


class Guard:
    """Makes dependencies that let a request in if its bearer token is valid for a scope.

    `require = Guard(verifier)`, and then `Depends(require(Scope.WRITE))` in a route, a router or
    the application. `require(None)` accepts any valid token. The dependency's value is the token,
    which `latchkey.guards.current_token()` returns too.

    Other requests are refused with HTTPException: 401 or 403 with WWW-Authenticate, or 503 with
    Retry-After if Latchkey gives no safe answer. `realm` names your service in the challenge.
    `api_key_header` names a header, such as "x-api-key", in which clients may send the token
    instead. `trusted_proxies` is that of `latchkey.guards.asgi`. `scheme_name` is the name of the
    security scheme in the documentation.
    """

    def __init__(
        self,
        verifier: SupportsVerify,
        *,
        realm: str = "latchkey",
        api_key_header: str | None = None,
        scheme_name: str = "Latchkey",
        trusted_proxies: Collection[str] = (),
    ) -> None:
        check_verifier(verifier, for_threads=False)
        self._verifier = verifier
        self._rules = HttpRules(
            realm=realm, api_key_header=api_key_header, trusted_proxies=trusted_proxies
        )
        bearer = HTTPBearer(description="An API token.", bearerFormat="Latchkey token")
        self._schemes = [_Scheme(bearer, scheme_name)]
        if self._rules.api_key_header is not None:
            # pydantic knows the field by its alias.
            where: dict[str, Any] = {"in": APIKeyIn.header, "name": api_key_header}
            key = APIKey(**where, description="An API token.")
            self._schemes.append(_Scheme(key, f"{scheme_name} key"))
        self._made: dict[tuple[Scope | None, tuple[str, ...]], Dependency] = {}

    def __call__(self, scope: Scope | None, permissions: Collection[str] = ()) -> Dependency:
        """Return the dependency that requires a token with `scope`, or any token for None.

        The token also has to have all `permissions`, of the form `resource:action`.
        """
        required = (checked_scope(scope), checked_permissions(permissions))
        if required not in self._made:
            self._made[required] = self._make(*required)
        return self._made[required]

    def _make(self, required: Scope | None, permissions: tuple[str, ...]) -> Dependency:
        scopes = [*([] if required is None else [required.value]), *permissions]
        bearer = Security(self._schemes[0], scopes=scopes)

        async def require(
            connection: HTTPConnection, _bearer: None = bearer
        ) -> AsyncIterator[Token]:
            token = await self._judge(connection, required, permissions)
            token_var.set(token)
            try:
                yield token
            finally:
                # Not reset(): the end of a dependency may run in another context.
                token_var.set(None)

        if len(self._schemes) == 1:
            return require

        async def require_either(
            connection: HTTPConnection,
            _bearer: None = bearer,
            _key: None = Depends(self._schemes[1]),
        ) -> AsyncIterator[Token]:
            async for token in require(connection):
                yield token

        return require_either

    async def _judge(
        self, connection: HTTPConnection, required: Scope | None, permissions: tuple[str, ...]
    ) -> Token:
        """Return the token of a request. Raises HTTPException, or WebSocketException."""
        request = http_request(connection.scope)
        decision = await decide(
            self._verifier,
            self._rules.authorization(request),
            required,
            api_keys=self._rules.api_keys(request),
            client_address=self._rules.client_address(request),
            permissions=permissions,
            traceparent=request.header("traceparent"),
        )
        if decision.outcome is Outcome.ALLOWED and decision.token is not None:
            return decision.token
        if connection.scope["type"] == "websocket":
            unavailable = decision.outcome in (Outcome.UNAVAILABLE, Outcome.RATE_LIMITED)
            raise WebSocketException(_CLOSE_UNAVAILABLE if unavailable else _CLOSE_REFUSED)
        refusal = self._rules.refusal(decision, required, permissions)
        raise HTTPException(refusal.status.value, refusal.detail, dict(refusal.headers))


class _Scheme(SecurityBase):
    """A security scheme in the documentation. It checks nothing, which `Guard` does."""

    def __init__(self, model: Model, name: str) -> None:
        self.model = model
        self.scheme_name = name

    async def __call__(self) -> None:
        """Do nothing."""

"""Guards for Django REST framework: an authentication class and a permission class.

    class Orders(APIView):
        authentication_classes = [TokenAuthentication]
        permission_classes = [HasScope]

The setting LATCHKEY describes the guard, as for `latchkey.guards.django`. This module translates a
decision of `_decision` into the framework's exceptions.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from latchkey.guards._missing import not_installed

try:
    from rest_framework import exceptions
    from rest_framework.authentication import BaseAuthentication
    from rest_framework.permissions import BasePermission
    from rest_framework.request import Request
    from rest_framework.views import APIView
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("django", "rest_framework"):
        raise
    raise not_installed("drf", "djangorestframework") from None

from latchkey.guards import _http
from latchkey.guards._decision import (
    Decision,
    Outcome,
    checked_permissions,
    checked_scope,
    judge_again,
)
from latchkey.guards.django import configured
from latchkey.models import Scope, Token

if TYPE_CHECKING:
    from django.http import HttpRequest

__all__ = [
    "Account",
    "HasScope",
    "TokenAuthentication",
    "TokenRateLimited",
    "VerifierUnavailable",
]

# Where a failed authentication leaves its challenge for `authenticate_header`.
_CHALLENGE: Final = "_latchkey_challenge"


@dataclass(frozen=True, slots=True)
class Account:
    """The `request.user` of a request with a valid token: the account that owns the token."""

    account_id: str

    @property
    def pk(self) -> str:
        """The key by which the framework counts requests for its throttles."""
        return self.account_id

    @property
    def is_authenticated(self) -> bool:
        """Return True, which is what the framework asks of a user."""
        return True

    @property
    def is_anonymous(self) -> bool:
        """Return False."""
        return False


class VerifierUnavailable(exceptions.APIException):
    """Latchkey gives no safe answer, so the request is refused: 503 with Retry-After."""

    status_code = 503
    default_detail = "The bearer token cannot be verified now. Try again later."
    default_code = "verifier_unavailable"

    def __init__(self, wait: int) -> None:
        super().__init__()
        self.wait = wait
        """The seconds for Retry-After, which the framework reads here."""


class TokenRateLimited(exceptions.Throttled):
    """The token is used too often, so the request is refused: 429 with Retry-After."""

    default_code = "token_rate_limited"

    def __init__(self, wait: int, detail: str) -> None:
        super().__init__()
        # The framework would add the delay to the text.
        self.detail = exceptions.ErrorDetail(detail, self.default_code)
        self.wait = wait


class TokenAuthentication(BaseAuthentication):
    """Authenticates a request by its bearer token: `request.user` is an `Account`, `request.auth`
    the `latchkey.Token`.

    A request without a bearer token stays anonymous, and permission classes judge it. `HasScope`
    refuses it. A token that is not valid gets 401, and one that is used too often 429. Without a
    safe answer, the request gets 503.
    """

    def authenticate(self, request: Request) -> tuple[Any, Any] | None:
        """Return the account and the token, or None if the request presents none."""
        # The framework's request passes on the attributes of Django's.
        decision = configured().decide(cast("HttpRequest", request), None)
        if decision.outcome is Outcome.MISSING:
            return None
        token = _allowed(request, decision, None)
        return Account(token.account_id), token

    def authenticate_header(self, request: Request) -> str:
        """Return the challenge of a 401."""
        challenge: str | None = getattr(request, _CHALLENGE, None)
        return challenge or configured().rules.challenge(Outcome.MISSING, None)


class HasScope(BasePermission):
    """Requires a token whose scope includes the request.

    By default GET, HEAD and OPTIONS need READ, and all other methods WRITE. A view may set
    `required_scope` to a Scope, or to None to accept any valid token, and `required_permissions` to
    permissions of the form `resource:action`.
    """

    def has_permission(self, request: Request, view: APIView) -> bool:
        """Return whether the request is let in."""
        if not isinstance(request.auth, Token):
            _add_headers(request, Decision(Outcome.MISSING), None, ())
            return False
        by_method = _http.scope_of_method(request.method or "")
        required: Scope | None = checked_scope(getattr(view, "required_scope", by_method))
        permissions = checked_permissions(getattr(view, "required_permissions", ()))
        if request.auth.rate_limit is None:
            # The verifier judges again, from its cache.
            decision = configured().decide(cast("HttpRequest", request), required, permissions)
        else:
            decision = judge_again(request.auth, required, permissions)
        _allowed(request, decision, required, permissions)
        return True


def _add_headers(
    request: Request,
    decision: Decision,
    required: Scope | None,
    permissions: tuple[str, ...],
) -> None:
    """Add the headers of a refusal to the view's answer, whichever exception handler makes it.

    The framework itself passes on only the challenge and Retry-After of an exception. It sends
    WWW-Authenticate only with some exceptions, and the value depends on all the view's classes, so
    that header is left to it.
    """
    view = (request.parser_context or {}).get("view")
    headers = getattr(view, "headers", None)
    if headers is None:
        return  # the request is authenticated outside a view
    for name, value in configured().rules.refusal(decision, required, permissions).headers:
        if name != "www-authenticate":
            headers[name] = value


def _allowed(
    request: Request,
    decision: Decision,
    required: Scope | None,
    permissions: tuple[str, ...] = (),
) -> Token:
    """Return the token of an allowed request. Raises the exception for any other."""
    if decision.outcome is Outcome.ALLOWED and decision.token is not None:
        return decision.token
    rules = configured().rules
    _add_headers(request, decision, required, permissions)
    if decision.outcome is Outcome.UNAVAILABLE:
        raise VerifierUnavailable(_http.retry_after_seconds(decision))
    detail = rules.refusal(decision, required, permissions).detail
    if decision.outcome is Outcome.RATE_LIMITED:
        raise TokenRateLimited(_http.retry_after_seconds(decision), detail)
    challenge = rules.challenge(decision.outcome, required, permissions)
    setattr(request, _CHALLENGE, challenge)
    if decision.outcome in (Outcome.FORBIDDEN, Outcome.UNPERMITTED, Outcome.WRONG_ADDRESS):
        refused = exceptions.PermissionDenied(detail)
        # The framework sends it as WWW-Authenticate.
        refused.auth_header = challenge  # type: ignore[attr-defined]  # not in the stubs
        raise refused
    raise exceptions.AuthenticationFailed(detail)

"""Guards for Django: a middleware for all views, and a decorator for individual ones.

    # settings.py
    LATCHKEY = {"VERIFIER": latchkey.sync.Verifier("127.0.0.1:50051")}
    MIDDLEWARE = [..., "latchkey.guards.django.GuardMiddleware"]

This module translates a decision of `_decision` into an answer. It blocks the thread of the
request, so it needs a `latchkey.sync.Verifier`.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

from latchkey.guards._missing import not_installed

try:
    from asgiref.sync import sync_to_async
    from django.conf import settings
    from django.core.exceptions import ImproperlyConfigured
    from django.http import HttpRequest, HttpResponse
    from django.http.response import HttpResponseBase
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("asgiref", "django"):
        raise
    raise not_installed("django", "django") from None

from latchkey.guards import _http
from latchkey.guards._decision import (
    Decision,
    Outcome,
    SupportsVerifySync,
    check_verifier,
    checked_permissions,
    checked_scope,
    decide_blocking,
    token_var,
)
from latchkey.models import Scope

__all__ = ["GuardMiddleware", "require"]

View = TypeVar("View", bound=Callable[..., Any])
_Required = tuple[Scope | None, tuple[str, ...]]
GetResponse = Callable[[HttpRequest], HttpResponseBase]

# Not standard. gunicorn sets the first; uWSGI, werkzeug and mod_wsgi the second.
_TARGETS: Final = ("RAW_URI", "REQUEST_URI")
_OPTIONS: Final = {
    "PUBLIC": "public",
    "PUBLIC_PREFIXES": "public_prefixes",
    "PREFLIGHTS": "preflights",
    "REALM": "realm",
    "API_KEY_HEADER": "api_key_header",
    "TRUSTED_PROXIES": "trusted_proxies",
}
_BY_METHOD: Final = "by method"


class Guard:
    """The guard that the setting LATCHKEY describes. Raises ImproperlyConfigured."""

    def __init__(self, options: object) -> None:
        if not isinstance(options, Mapping) or "VERIFIER" not in options:
            raise ImproperlyConfigured(
                "the setting LATCHKEY must be a dict with VERIFIER, a latchkey.sync.Verifier"
            )
        known = {"VERIFIER", "REQUIRED_SCOPE", "REQUIRED_PERMISSIONS", *_OPTIONS}
        if unknown := sorted(str(name) for name in options if name not in known):
            raise ImproperlyConfigured(
                f"the setting LATCHKEY has no option {unknown[0]}; "
                f"there are {', '.join(sorted(known))}"
            )
        try:
            check_verifier(options["VERIFIER"], for_threads=True)
            self.verifier: SupportsVerifySync = options["VERIFIER"]
            required = options.get("REQUIRED_SCOPE", _BY_METHOD)
            self._required = required if required == _BY_METHOD else checked_scope(required)
            self.permissions = checked_permissions(options.get("REQUIRED_PERMISSIONS", ()))
            self.rules = _http.HttpRules(
                **{name: options[key] for key, name in _OPTIONS.items() if key in options}
            )
        except (TypeError, ValueError) as error:
            raise ImproperlyConfigured(f"the setting LATCHKEY: {error}") from None

    def required_scope(self, request: HttpRequest) -> Scope | None:
        """Return the scope that the middleware requires of a request."""
        if self._required == _BY_METHOD:
            return _http.scope_of_method(request.method or "")
        return cast("Scope | None", self._required)

    def decide(
        self, request: HttpRequest, required: Scope | None, permissions: Collection[str] = ()
    ) -> Decision:
        """Decide about a request. Raises nothing."""
        parts = http_request(request)
        return decide_blocking(
            self.verifier,
            self.rules.authorization(parts),
            required,
            api_keys=self.rules.api_keys(parts),
            client_address=self.rules.client_address(parts),
            permissions=permissions,
            traceparent=parts.header("traceparent"),
        )

    def refusal(
        self, decision: Decision, required: Scope | None, permissions: Collection[str] = ()
    ) -> HttpResponse:
        """Return the answer to a request that is not let in."""
        refusal = self.rules.refusal(decision, required, permissions)
        return HttpResponse(
            refusal.body, status=refusal.status.value, headers=dict(refusal.all_headers)
        )


_guards: list[tuple[object, Guard]] = []


def configured() -> Guard:
    """Return the guard of the current setting LATCHKEY. Raises ImproperlyConfigured."""
    options = getattr(settings, "LATCHKEY", None)
    # Tests override settings, so the object is compared.
    if not _guards or _guards[-1][0] is not options:
        _guards[:] = [(options, Guard(options))]
    return _guards[-1][1]


class GuardMiddleware:
    """Lets a request in if its bearer token is valid for the required scope.

    The setting LATCHKEY is a dict with these options:

    - VERIFIER: a `latchkey.sync.Verifier`.
    - REQUIRED_SCOPE: a Scope for all requests, or None to accept any valid token. By default GET,
      HEAD and OPTIONS need READ, and all other methods WRITE.
    - REQUIRED_PERMISSIONS: permissions of the form `resource:action` for all requests.
    - TRUSTED_PROXIES: as `trusted_proxies` of `latchkey.guards.asgi.GuardMiddleware`.
    - PUBLIC: paths that need no token. PUBLIC_PREFIXES: paths that need none, with all below them,
      compared by whole segments. Paths are those of `request.path_info`.
    - PREFLIGHTS: False to require a token of CORS preflights too. By default other middleware may
      answer them, such as django-cors-headers. They never reach a view.
    - REALM: names your service in the challenge.
    - API_KEY_HEADER: a header, such as "x-api-key", in which clients may send the token instead.

    Other requests are refused with 401 or 403 and WWW-Authenticate. If Latchkey gives no safe
    answer, they are refused with 503 and Retry-After.

    Views find the token with `latchkey.guards.current_token()` and as `request.latchkey_token`.
    """

    sync_capable = True
    # Django runs it in a thread, because the verifier may block.
    async_capable = False

    def __init__(self, get_response: GetResponse) -> None:
        self._get_response = get_response
        configured()  # a mistake in the settings is reported at startup

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        """Serve one request."""
        guard = configured()
        request.latchkey_token = None  # type: ignore[attr-defined]  # ours
        parts = http_request(request)
        if guard.rules.exempts(parts):
            return self._get_response(request)
        required = guard.required_scope(request)
        decision = guard.decide(request, required, guard.permissions)
        if decision.outcome is not Outcome.ALLOWED:
            return guard.refusal(decision, required, guard.permissions)
        request.latchkey_token = decision.token  # type: ignore[attr-defined]  # ours
        reset = token_var.set(decision.token)
        try:
            return self._get_response(request)
        finally:
            token_var.reset(reset)

    def process_view(
        self, request: HttpRequest, _view: object, _args: object, _kwargs: object
    ) -> HttpResponse | None:
        """Answer preflights that no other middleware has answered.

        Many views act on every method, and a preflight presents no token.
        """
        if configured().rules.lets_preflight_pass(http_request(request)):
            return HttpResponse(status=204)
        return None


def require(scope: Scope | None, permissions: Collection[str] = ()) -> Callable[[View], View]:
    """Guard a view: it needs a token with `scope`, or any valid token for None.

    The token also has to have all `permissions`, of the form `resource:action`.

    Uses the setting LATCHKEY (see `GuardMiddleware`), except that no path is public. The middleware
    is not needed. For a class, use `@method_decorator(require(scope), name="dispatch")`. The view
    is exempt from CSRF protection, since browsers send no bearer token by themselves.
    """
    required = (checked_scope(scope), checked_permissions(permissions))

    def decorate(view: View) -> View:
        guarded = (
            _guarded_async(view, required)
            if inspect.iscoroutinefunction(view)
            else (_guarded(view, required))
        )
        guarded.csrf_exempt = True
        return cast("View", guarded)

    return decorate


def _judge(
    request: HttpRequest, required: Scope | None, permissions: tuple[str, ...]
) -> Decision | HttpResponse:
    guard = configured()
    if guard.rules.lets_preflight_pass(http_request(request)):
        return HttpResponse(status=204)
    decision = guard.decide(request, required, permissions)
    if decision.outcome is not Outcome.ALLOWED:
        return guard.refusal(decision, required, permissions)
    request.latchkey_token = decision.token  # type: ignore[attr-defined]  # ours
    return decision


def _guarded(view: Callable[..., Any], required: _Required) -> Any:
    @functools.wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        judged = _judge(request, *required)
        if not isinstance(judged, Decision):
            return judged
        reset = token_var.set(judged.token)
        try:
            return view(request, *args, **kwargs)
        finally:
            token_var.reset(reset)

    return guarded


def _guarded_async(view: Callable[..., Any], required: _Required) -> Any:
    judge = sync_to_async(_judge, thread_sensitive=False)

    @functools.wraps(view)
    async def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        judged = await judge(request, *required)
        if not isinstance(judged, Decision):
            return judged
        reset = token_var.set(judged.token)
        try:
            return await view(request, *args, **kwargs)
        finally:
            token_var.reset(reset)

    return guarded


def http_request(request: HttpRequest) -> _http.HttpRequest:
    """Return the parts of a request that a guard needs."""

    def header(name: str) -> Sequence[str]:
        value = request.META.get(f"HTTP_{name.upper().replace('-', '_')}")
        # Repeated headers are joined with a comma, which occurs in no token.
        return () if value is None else (str(value),)

    target = next((str(request.META[name]) for name in _TARGETS if name in request.META), "")
    if not target:
        # Under ASGI.
        target = (getattr(request, "scope", {}).get("raw_path") or b"").decode("latin-1")
    # "" on a UNIX socket.
    peer = str(request.META.get("REMOTE_ADDR") or "")
    return _http.HttpRequest(request.method or "", request.path_info, target, header, peer)

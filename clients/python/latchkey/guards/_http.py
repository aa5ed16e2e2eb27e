"""What the guards of HTTP share: which requests are exempt, and how the others are refused.

Pure: it knows no framework, and does not verify.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from latchkey.guards._address import TrustedProxies
from latchkey.guards._decision import Decision, Outcome
from latchkey.models import Scope

__all__ = [
    "API_KEY_HEADER",
    "RETRY_AFTER_SECONDS",
    "HttpRequest",
    "HttpRules",
    "Refusal",
    "checked_names",
    "has_prefix",
    "retry_after_seconds",
    "scope_of_method",
]

# RFC 9110 §9.2.1, without TRACE, which services do not use.
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})

# The delay if Latchkey does not request one.
RETRY_AFTER_SECONDS: Final = 1
# The longest period of a limit. Latchkey never requests a longer delay.
RETRY_AFTER_SECONDS_MAX: Final = 3_600
# The name of the policy in the headers of a limited request.
_POLICY: Final = "token"
# The usual name of the header for an API key.
API_KEY_HEADER: Final = "x-api-key"

# RFC 9110 §5.1: a field name is a token.
_FIELD_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", re.ASCII)
_REALM: Final = re.compile(r"[ !#-\[\]-~]+", re.ASCII)

# An encoded slash or backslash. Servers decode it, and then it looks like a boundary of segments.
_ENCODED_SEPARATOR: Final = re.compile(r"%(?:2f|5c)", re.IGNORECASE)
# Some application, proxy or file system reads each of these in its own way: a second level of
# encoding, path parameters, other separators, characters that are cut off.
_AMBIGUOUS: Final = re.compile(r"[%;\\\x00-\x1f\x7f]")

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
    Outcome.RATE_LIMITED: (
        HTTPStatus.TOO_MANY_REQUESTS,
        "The bearer token is used too often. Try again later.",
    ),
    Outcome.UNAVAILABLE: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The bearer token cannot be verified now. Try again later.",
    ),
}


def scope_of_method(method: str) -> Scope:
    """Return READ for GET, HEAD and OPTIONS, and WRITE for every other method."""
    return Scope.READ if method in _SAFE_METHODS else Scope.WRITE


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """The parts of a request that decide whether it is exempt.

    `path` is decoded, as the application routes it. `target` is the undecoded target, or "" if the
    server does not pass it on. `header` returns the values of a header by its lower-case name.
    """

    method: str
    path: str
    target: str
    header: Callable[[str], Sequence[str]]
    peer: str = ""
    """The address at the other end of the connection, or "" if it has none."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to a request that is not let in."""

    status: HTTPStatus
    detail: str
    headers: tuple[tuple[str, str], ...]
    """The headers that do not depend on the body: Cache-Control, which forbids caching, and what
    the client can do, such as WWW-Authenticate or Retry-After."""

    @property
    def body(self) -> bytes:
        """The body, in the form of RFC 9457."""
        problem = {
            "title": self.status.phrase,
            "status": self.status.value,
            "detail": self.detail,
        }
        # People who call with curl see the next prompt on a new line.
        return json.dumps(problem).encode() + b"\n"

    @property
    def all_headers(self) -> tuple[tuple[str, str], ...]:
        """The headers of an answer with `body`."""
        return (
            ("content-type", "application/problem+json"),
            ("content-length", str(len(self.body))),
            *self.headers,
        )


class HttpRules:
    """The options of a guard for HTTP. Raises TypeError or ValueError for a wrong one."""

    def __init__(
        self,
        *,
        public: Collection[str] = (),
        public_prefixes: Collection[str] = (),
        preflights: bool = True,
        realm: str = "latchkey",
        api_key_header: str | None = None,
        trusted_proxies: Collection[str] = (),
    ) -> None:
        self._proxies = TrustedProxies(trusted_proxies)
        self._public = checked_names(public, "public")
        self._prefixes = checked_prefixes(public_prefixes)
        self._preflights = preflights
        if _REALM.fullmatch(realm) is None:
            raise ValueError("realm must be printable ASCII without quotes and backslashes")
        self._realm = realm
        self.api_key_header = checked_api_key_header(api_key_header)

    def exempts(self, request: HttpRequest) -> bool:
        """Return whether `request` needs no token."""
        if request.path in self._public:
            return True
        if has_prefix(request.path, self._prefixes):
            return _ENCODED_SEPARATOR.search(request.target) is None
        return self.lets_preflight_pass(request)

    def authorization(self, request: HttpRequest) -> Sequence[str]:
        """Return the values of the authorization header."""
        return request.header("authorization")

    def api_keys(self, request: HttpRequest) -> Sequence[str]:
        """Return the values of the header for API keys, if this guard accepts one."""
        return () if self.api_key_header is None else request.header(self.api_key_header)

    def client_address(self, request: HttpRequest) -> str:
        """Return the client's address, or "" if it is not known."""
        return self._proxies.client_address(request.peer, request.header("x-forwarded-for"))

    def refusal(
        self, decision: Decision, required: Scope | None, permissions: Collection[str] = ()
    ) -> Refusal:
        """Return the answer to a request that `decision` does not let in (RFC 6750 §3)."""
        status, detail = _REFUSALS[decision.outcome]
        if decision.outcome is Outcome.MISSING and self.api_key_header is not None:
            detail = f"{detail.rstrip('.')} or '{self.api_key_header}: <token>'."
        headers: tuple[tuple[str, str], ...]
        if decision.outcome is Outcome.UNAVAILABLE:
            headers = (("retry-after", str(retry_after_seconds(decision))),)
        elif decision.outcome is Outcome.RATE_LIMITED:
            headers = rate_limit_headers(decision)
        else:
            headers = (
                ("www-authenticate", self.challenge(decision.outcome, required, permissions)),
            )
        return Refusal(status, detail, (("cache-control", "no-store"), *headers))

    def challenge(
        self, outcome: Outcome, required: Scope | None, permissions: Collection[str] = ()
    ) -> str:
        """Return the value of WWW-Authenticate."""
        challenge = f'Bearer realm="{self._realm}"'
        if outcome is Outcome.INVALID:
            challenge += ', error="invalid_token"'
        elif outcome in (Outcome.FORBIDDEN, Outcome.UNPERMITTED):
            challenge += ', error="insufficient_scope"'
            scope = [] if required is None else [required.value]
            if wanted := " ".join([*scope, *permissions]):
                challenge += f', scope="{wanted}"'
        # MISSING has no error code, because the request contained nothing wrong (§3.1). For a wrong
        # address, RFC 6750 has none.
        return challenge

    def lets_preflight_pass(self, request: HttpRequest) -> bool:
        """Return whether a browser asks for permission, which it does without a token.

        Fetch standard, "CORS-preflight fetch": these two headers and no credentials. An OPTIONS
        that differs in any way is judged like other requests.
        """
        return (
            self._preflights
            and request.method == "OPTIONS"
            and len(request.header("origin")) == 1
            and len(request.header("access-control-request-method")) == 1
            and not self.authorization(request)
            and not self.api_keys(request)
        )


def retry_after_seconds(decision: Decision) -> int:
    """Return when a client may try again, in whole seconds."""
    asked = decision.retry_after.total_seconds() if decision.retry_after else 0.0
    return min(max(RETRY_AFTER_SECONDS, math.ceil(asked)), RETRY_AFTER_SECONDS_MAX)


def rate_limit_headers(decision: Decision) -> tuple[tuple[str, str], ...]:
    """Return the headers of an answer to a request whose token is used too often.

    RateLimit and RateLimit-Policy are those of draft-ietf-httpapi-ratelimit-headers-10: a quota (q)
    in a window (w), what remains of it (r), and the seconds until there is more (t).
    """
    seconds = retry_after_seconds(decision)
    headers = (("retry-after", str(seconds)), ("ratelimit", f'"{_POLICY}";r=0;t={seconds}'))
    if decision.limit is None:
        return headers
    window = math.ceil(decision.limit.period.total_seconds())
    return (*headers, ("ratelimit-policy", f'"{_POLICY}";q={decision.limit.count};w={window}'))


def has_prefix(path: str, prefixes: Collection[str]) -> bool:
    """Return whether `path` is one of `prefixes`, or lies below one of them.

    Compares whole segments: the prefix "/static" has "/static/x" below it, and not "/statics". A
    path that anyone could read as another one (".", "..", "//", an encoded character) is below
    none.
    """
    if not any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes):
        return False
    if _AMBIGUOUS.search(path) is not None:
        return False
    first, *segments = path.split("/")
    # The last segment is empty if the path ends with a slash.
    return first == "" and all(
        segment not in ("", ".", "..") or (segment == "" and number == len(segments))
        for number, segment in enumerate(segments, start=1)
    )


def checked_names(names: Collection[str], option: str) -> frozenset[str]:
    """Return `names` as a set. Raises TypeError for a single text, whose characters would match."""
    if isinstance(names, str):
        raise TypeError(f"{option} must be a collection, not a single text")
    return frozenset(names)


def checked_prefixes(prefixes: Collection[str]) -> frozenset[str]:
    """Return `prefixes` without a slash at the end. Raises TypeError or ValueError."""
    found = frozenset(
        prefix.removesuffix("/") for prefix in checked_names(prefixes, "public_prefixes")
    )
    for prefix in found:
        if not prefix:
            raise ValueError("the prefix '/' would make everything public")
        if not has_prefix(prefix, {prefix}):
            raise ValueError(f"a public prefix must be a plain path such as '/static': {prefix!r}")
    return found


def checked_api_key_header(name: str | None) -> str | None:
    """Return the header's name in lower case. Raises ValueError unless it can name a header."""
    if name is None:
        return None
    if _FIELD_NAME.fullmatch(name) is None:
        raise ValueError(f"api_key_header must be the name of a header: {name!r}")
    if name.lower() == "authorization":
        raise ValueError("api_key_header must not be 'authorization', which is read anyway")
    return name.lower()

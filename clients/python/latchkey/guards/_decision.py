"""Decides about a request. All guards only translate the decision into their protocol.

Every unexpected result becomes UNAVAILABLE, which the guards reject: they fail closed. This module
never logs, returns or raises the presented secret.
"""

import enum
import inspect
import logging
import re
from collections.abc import Collection, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Protocol

from latchkey_coherence.verdict import PERMISSION, includes

from latchkey import _tracing
from latchkey._rate_limit import RateLimit
from latchkey.errors import LatchkeyError
from latchkey.models import Scope, Token, Verdict, Verification
from latchkey.secret import Secret
from latchkey.verifier import Verifier

_log = logging.getLogger("latchkey.guards")

# RFC 6750 §2.1: the scheme in any letter case, spaces, and a b64token. Optional white space after a
# value is not part of it (RFC 9110 §5.5), and not every server removes it.
_BEARER: Final = re.compile(r"(?i:bearer) +([A-Za-z0-9\-._~+/]+=*)[ \t]*", re.ASCII)
_API_KEY: Final = re.compile(r"[ \t]*([A-Za-z0-9\-._~+/]+=*)[ \t]*", re.ASCII)
_SCHEME: Final = re.compile(r"(?i:bearer)(?: .*)?", re.ASCII | re.DOTALL)

# The contract's limit for one verify.
PERMISSIONS_MAX: Final = 64

token_var: Final[ContextVar[Token | None]] = ContextVar("latchkey_token", default=None)


def current_token() -> Token:
    """Return the token that the current request presented.

    Raises LookupError if it presented none: the request was exempt, or no guard has seen it.
    """
    token = token_var.get()
    if token is None:
        raise LookupError(
            "no token: no guard has let this request in, or its path is public. "
            "Use current_token_or_none() where that is normal"
        )
    return token


def current_token_or_none() -> Token | None:
    """Return the token that the current request presented. None: the request needed none."""
    return token_var.get()


class SupportsVerify(Protocol):
    """The interface that a guard needs: a `latchkey.Verifier`, or a substitute in tests."""

    async def verify(
        self,
        secret: Secret,
        scope: Scope | None,
        /,
        *,
        client_address: str = "",
        permissions: Collection[str] = (),
        timeout_seconds: float | None = None,
    ) -> Verification:
        """Answer whether `secret` is valid for `scope` and has `permissions`."""
        ...


class SupportsVerifySync(Protocol):
    """The same for threads: a `latchkey.sync.Verifier`, or a substitute in tests."""

    def verify(
        self,
        secret: Secret,
        scope: Scope | None,
        /,
        *,
        client_address: str = "",
        permissions: Collection[str] = (),
        timeout_seconds: float | None = None,
    ) -> Verification:
        """Answer whether `secret` is valid for `scope` and has `permissions`."""
        ...


class Outcome(enum.Enum):
    """The result of a decision."""

    ALLOWED = enum.auto()
    MISSING = enum.auto()
    """The request carries no bearer token."""
    INVALID = enum.auto()
    """The presented value is not a live token."""
    FORBIDDEN = enum.auto()
    """The token is live, but its scope is too small."""
    UNPERMITTED = enum.auto()
    """The token is live, but lacks a required permission."""
    WRONG_ADDRESS = enum.auto()
    """The token is live, but may not be used from the client's address."""
    RATE_LIMITED = enum.auto()
    """The token is live, but its rate limit is used up."""
    UNAVAILABLE = enum.auto()
    """There is no safe answer."""


# The verdicts on a live token. All others are INVALID, so that holders cannot probe.
_REFUSED: Final = {
    Verdict.INSUFFICIENT_SCOPE: Outcome.FORBIDDEN,
    Verdict.INSUFFICIENT_PERMISSIONS: Outcome.UNPERMITTED,
    Verdict.ADDRESS_NOT_ALLOWED: Outcome.WRONG_ADDRESS,
    Verdict.RATE_LIMITED: Outcome.RATE_LIMITED,
}


@dataclass(frozen=True, slots=True)
class Decision:
    """An outcome. `token` is set exactly if the outcome is ALLOWED."""

    outcome: Outcome
    token: Token | None = None
    retry_after: timedelta | None = None
    limit: RateLimit | None = None
    """With RATE_LIMITED: the token's limit, if it is known."""


def checked_scope(scope: object) -> Scope | None:
    """Return `scope`. Raises TypeError or ValueError unless it is READ, WRITE or None."""
    if scope is None:
        return None
    if not isinstance(scope, Scope):
        raise TypeError(f"a required scope must be a latchkey.Scope or None, not {scope!r}")
    if scope is Scope.UNSPECIFIED:
        raise ValueError("Scope.UNSPECIFIED cannot be required; use None to accept any valid token")
    return scope


def checked_permissions(permissions: Collection[str]) -> tuple[str, ...]:
    """Return `permissions`. Raises TypeError or ValueError unless each is `resource:action`.

    No token has a permission of another form, so a typing error would refuse every request.
    """
    if isinstance(permissions, str):
        raise TypeError("required permissions must be a collection of texts, not a single text")
    for permission in permissions:
        if PERMISSION.fullmatch(permission) is None:
            raise ValueError(f"a required permission must be resource:action, not {permission!r}")
    if len(permissions) > PERMISSIONS_MAX:
        raise ValueError(f"at most {PERMISSIONS_MAX} permissions can be required")
    return tuple(permissions)


def check_verifier(verifier: object, *, for_threads: bool) -> None:
    """Raise TypeError if `verifier` is of the kind that the guard cannot use."""
    verify = getattr(verifier, "verify", None)
    if verify is None:
        raise TypeError(f"a guard needs a verifier, not {type(verifier).__name__}")
    if inspect.iscoroutinefunction(verify) is for_threads:
        raise TypeError(
            "this guard blocks its thread, so it needs a latchkey.sync.Verifier"
            if for_threads
            else "this guard runs on an event loop, so it needs a latchkey.Verifier"
        )


async def decide(
    verifier: SupportsVerify,
    authorization: Sequence[str],
    required_scope: Scope | None,
    timeout_seconds: float | None = None,
    *,
    api_keys: Sequence[str] = (),
    client_address: str = "",
    permissions: Collection[str] = (),
    traceparent: Sequence[str] = (),
) -> Decision:
    """Decide about a request from the values of its `authorization` headers.

    `api_keys` contains the values of the header for API keys, if the guard accepts one. There may
    be any number of values, with any content. `client_address` is that of
    `_address.TrustedProxies`, "" if it is not known. The token has to have all `permissions`.
    `traceparent` contains the values of that header, to continue the request's trace. Raises only
    CancelledError.
    """
    presented = _presented(authorization, api_keys)
    if isinstance(presented, Decision):
        return presented
    try:
        with _tracing.continued(traceparent):
            verification = await verifier.verify(
                presented,
                required_scope,
                client_address=client_address,
                permissions=permissions,
                timeout_seconds=timeout_seconds,
            )
        return _judge(verification)
    except Exception as error:  # noqa: BLE001 - no error may let the request in
        return _refused(error)


def decide_blocking(
    verifier: SupportsVerifySync,
    authorization: Sequence[str],
    required_scope: Scope | None,
    timeout_seconds: float | None = None,
    *,
    api_keys: Sequence[str] = (),
    client_address: str = "",
    permissions: Collection[str] = (),
    traceparent: Sequence[str] = (),
) -> Decision:
    """Decide as `decide` does, in a thread. Raises nothing."""
    presented = _presented(authorization, api_keys)
    if isinstance(presented, Decision):
        return presented
    try:
        with _tracing.continued(traceparent):
            verification = verifier.verify(
                presented,
                required_scope,
                client_address=client_address,
                permissions=permissions,
                timeout_seconds=timeout_seconds,
            )
        return _judge(verification)
    except Exception as error:  # noqa: BLE001 - as above
        return _refused(error)


def decide_nowait(
    verifier: SupportsVerify,
    authorization: Sequence[str],
    required_scope: Scope | None,
    *,
    api_keys: Sequence[str] = (),
    client_address: str = "",
    permissions: Collection[str] = (),
) -> Decision | None:
    """Decide as `decide` does if that is possible at once. Otherwise return None.

    Any thread may call it. Raises nothing.
    """
    presented = _presented(authorization, api_keys)
    if isinstance(presented, Decision):
        return presented
    if not isinstance(verifier, Verifier):
        return None  # a substitute may not be safe to call from another thread
    try:
        verification = verifier.verify_nowait(
            presented, required_scope, client_address=client_address, permissions=permissions
        )
        if verification is None:
            return None
        if _tracing.active:
            _tracing.note(verification)
        return _judge(verification)
    except Exception as error:  # noqa: BLE001 - as above
        return _refused(error)


def _presented(authorization: Sequence[str], api_keys: Sequence[str]) -> Secret | Decision:
    """Return the presented secret, or the decision for a request without a usable one."""
    bearer = any(_SCHEME.fullmatch(value) for value in authorization)
    if not bearer and not api_keys:
        # A client that uses another scheme learns which scheme to use (RFC 6750 §3.1).
        return Decision(Outcome.MISSING)
    if bearer and not api_keys and len(authorization) == 1:
        match = _BEARER.fullmatch(authorization[0])
    elif not bearer and len(api_keys) == 1:
        match = _API_KEY.fullmatch(api_keys[0])
    else:
        # Reject repeated headers: another layer may have evaluated the other one.
        match = None
    return Decision(Outcome.INVALID) if match is None else Secret(match[1])


def _refused(error: Exception) -> Decision:
    if isinstance(error, LatchkeyError):
        _log.warning("request rejected: no safe answer: %s", error)
        return Decision(Outcome.UNAVAILABLE, retry_after=error.retry_after)
    # Log only the class: the text of a foreign exception may contain the secret.
    _log.error("request rejected: verify raised %s", type(error).__name__)
    return Decision(Outcome.UNAVAILABLE)


def _judge(verification: Verification) -> Decision:
    """Translate a verification. Only VALID with a token is ALLOWED."""
    if verification.verdict is Verdict.VALID and isinstance(verification.token, Token):
        return Decision(Outcome.ALLOWED, token=verification.token)
    outcome = _REFUSED.get(verification.verdict, Outcome.INVALID)
    if outcome is not Outcome.RATE_LIMITED:
        return Decision(outcome)
    limit = None if verification.token is None else verification.token.rate_limit
    return Decision(outcome, retry_after=verification.retry_after, limit=limit)


def judge_again(
    token: Token, required_scope: Scope | None, permissions: Collection[str]
) -> Decision:
    """Decide about a further requirement of a request whose token was just allowed.

    A verify would count the request twice against the token's rate limit.
    """
    if required_scope is not None and token.scope not in (required_scope, Scope.WRITE):
        return Decision(Outcome.FORBIDDEN)
    if not includes(frozenset(token.permissions), permissions):
        return Decision(Outcome.UNPERMITTED)
    return Decision(Outcome.ALLOWED, token=token)

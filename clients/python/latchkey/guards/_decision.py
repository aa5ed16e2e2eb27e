"""The one place where a guard decides. Both guards translate its outcome, and add none.

Anything unexpected is UNAVAILABLE here and a refusal there: Latchkey is a dependency that fails
closed. Nothing here logs, returns or raises what was presented.
"""

import enum
import logging
import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Protocol

from latchkey.errors import LatchkeyError
from latchkey.models import Scope, Token, Verdict, Verification
from latchkey.secret import Secret
from latchkey.verifier import Verifier

_log = logging.getLogger("latchkey.guards")

# RFC 6750 §2.1: the scheme in any letter case, spaces, b64token.
_BEARER: Final = re.compile(r"(?i:bearer) +([A-Za-z0-9\-._~+/]+=*)", re.ASCII)
_SCHEME: Final = re.compile(r"(?i:bearer)(?: .*)?", re.ASCII | re.DOTALL)

token_var: Final[ContextVar[Token | None]] = ContextVar("latchkey_token", default=None)


def current_token() -> Token | None:
    """Return the token that the request under way was let in with. None: it needed none."""
    return token_var.get()


class SupportsVerify(Protocol):
    """What a guard asks: a `latchkey.Verifier`, or a stand-in for it in tests."""

    async def verify(
        self,
        secret: Secret,
        scope: Scope | None,
        /,
        *,
        timeout_seconds: float | None = None,
    ) -> Verification:
        """Answer whether `secret` may do what needs `scope`."""
        ...


class Outcome(enum.Enum):
    """What becomes of a request."""

    ALLOWED = enum.auto()
    MISSING = enum.auto()
    """No bearer token was presented."""
    INVALID = enum.auto()
    """What was presented is no live token."""
    FORBIDDEN = enum.auto()
    """The token is live, but its scope is too small."""
    UNAVAILABLE = enum.auto()
    """There is no safe answer."""


@dataclass(frozen=True, slots=True)
class Decision:
    """An outcome. `token` is set if and only if it is ALLOWED."""

    outcome: Outcome
    token: Token | None = None
    retry_after: timedelta | None = None


def checked_scope(scope: object) -> Scope | None:
    """Return `scope`. Raises TypeError or ValueError when it is not READ, WRITE or None."""
    if scope is None:
        return None
    if not isinstance(scope, Scope):
        raise TypeError(f"a required scope is a latchkey.Scope or None, not {scope!r}")
    if scope is Scope.UNSPECIFIED:
        raise ValueError("Scope.UNSPECIFIED cannot be required; None accepts any valid token")
    return scope


async def decide(
    verifier: SupportsVerify,
    authorization: Sequence[str],
    required_scope: Scope | None,
    timeout_seconds: float | None = None,
) -> Decision:
    """Decide about a request by the values of its `authorization` header, of any kind and number.

    Raises nothing but CancelledError.
    """
    presented = _presented(authorization)
    if isinstance(presented, Decision):
        return presented
    try:
        verification = await verifier.verify(
            presented, required_scope, timeout_seconds=timeout_seconds
        )
        return _judge(verification)
    except Exception as error:  # noqa: BLE001 - whatever it is, the request does not get in
        return _refused(error)


def decide_nowait(
    verifier: SupportsVerify, authorization: Sequence[str], required_scope: Scope | None
) -> Decision | None:
    """Decide as `decide` does, if that can be done at once; None: it cannot.

    May be called from any thread, and raises nothing.
    """
    presented = _presented(authorization)
    if isinstance(presented, Decision):
        return presented
    if not isinstance(verifier, Verifier):
        return None  # of a stand-in it is not known what may be called from where
    try:
        verification = verifier.verify_nowait(presented, required_scope)
        return None if verification is None else _judge(verification)
    except Exception as error:  # noqa: BLE001 - as above
        return _refused(error)


def _presented(authorization: Sequence[str]) -> Secret | Decision:
    """Return what the header presents, or what becomes of a request that presents nothing."""
    if len(authorization) == 1 and (match := _BEARER.fullmatch(authorization[0])):
        return Secret(match[1])
    if not any(_SCHEME.fullmatch(value) for value in authorization):
        # Other schemes are not ours: to their holder we say which one is (RFC 6750 §3.1).
        return Decision(Outcome.MISSING)
    # Of two values, another layer may have looked at the other one.
    return Decision(Outcome.INVALID)


def _refused(error: Exception) -> Decision:
    if isinstance(error, LatchkeyError):
        _log.warning("request refused, for there is no safe answer: %s", error)
        return Decision(Outcome.UNAVAILABLE, retry_after=error.retry_after)
    # The class alone: the text of a stranger's exception may hold what was presented.
    _log.error("request refused: verify raised %s", type(error).__name__)
    return Decision(Outcome.UNAVAILABLE)


def _judge(verification: Verification) -> Decision:
    """Translate an answer; only VALID with a token lets anybody in."""
    if verification.verdict is Verdict.VALID and isinstance(verification.token, Token):
        return Decision(Outcome.ALLOWED, token=verification.token)
    if verification.verdict is Verdict.INSUFFICIENT_SCOPE:
        return Decision(Outcome.FORBIDDEN)
    return Decision(Outcome.INVALID)

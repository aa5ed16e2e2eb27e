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
    if not any(_SCHEME.fullmatch(value) for value in authorization):
        # Other schemes are not ours: to their holder we say which one is (RFC 6750 §3.1).
        return Decision(Outcome.MISSING)
    match = _BEARER.fullmatch(authorization[0])
    if len(authorization) != 1 or match is None:
        # Of two values, another layer may have looked at the other one.
        return Decision(Outcome.INVALID)
    try:
        verification = await verifier.verify(
            Secret(match[1]), required_scope, timeout_seconds=timeout_seconds
        )
        return _judge(verification)
    except LatchkeyError as error:
        _log.warning("request refused, for there is no safe answer: %s", error)
        return Decision(Outcome.UNAVAILABLE, retry_after=error.retry_after)
    except Exception as error:  # noqa: BLE001 - whatever it is, the request does not get in
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

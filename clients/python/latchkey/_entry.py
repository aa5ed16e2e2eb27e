"""Builds the cache entry of one secret: all answers that it may need, made in advance.

This module decides which answers are worth caching. It also derives the answer for the scope that
the service was not asked about.
"""

from datetime import datetime
from typing import Final

from latchkey_coherence.verdict_cache import Entry

from latchkey.models import Scope, Token, Verdict, Verification

# Not UNKNOWN and MALFORMED. They name no token, so no invalidation would ever end such an entry.
_FINAL: Final = (Verdict.DELETED, Verdict.EXPIRED)
_LIVE: Final = (Verdict.VALID, Verdict.INSUFFICIENT_SCOPE)


class CacheEntry(Entry):
    """The answers for one secret. They are ready to return, so that a verify builds nothing."""

    __slots__ = ("expires_at", "idle", "last_use", "read", "reported", "uses", "write")

    def __init__(
        self,
        token_id: str,
        read: Verification,
        write: Verification,
        expires_at: float | None,
        keep_until: float,
    ) -> None:
        super().__init__(token_id, keep_until)
        self.read = read
        """The answer if READ or no scope is required. Every token has at least READ."""
        self.write = write
        """The answer if WRITE is required. The same object as `read` if the answer is the same."""
        self.expires_at = expires_at
        """POSIX seconds from which the service is asked again. None: never.

        Only one clock, the service's, decides whether a token has expired.
        """
        self.uses = 0
        """How often it has answered VALID or, if it is final, at all. Any thread may count."""
        self.last_use = 0.0
        """When it last did. In seconds of `boottime`."""
        self.idle = True
        """Whether `UseLog` has no note of uses that are not reported yet."""
        self.reported = 0
        """How many of `uses` are reported. For UseLog only."""

    @property
    def final(self) -> bool:
        """Whether every answer is that the token has ended."""
        return self.read.verdict in _FINAL


def cache_entry(answer: Verification, scope: Scope | None, keep_until: float) -> CacheEntry | None:
    """Return the entry for the service's `answer` about `scope`, or None if it is not cacheable.

    The entry is valid until `keep_until`, in seconds of `boottime`.
    """
    token = answer.token
    if token is None:
        return None
    if answer.verdict in _FINAL:
        # Without an expiry: after EXPIRED, this machine's clock must not make it VALID again.
        return CacheEntry(token.id, answer, answer, None, keep_until)
    if answer.verdict not in _LIVE or token.scope is Scope.UNSPECIFIED:
        return None
    read = _answer(Verdict.VALID, token, answer)
    write = read
    if token.scope is Scope.READ:
        write = _answer(Verdict.INSUFFICIENT_SCOPE, token, answer)
    if (write if scope is Scope.WRITE else read).verdict is not answer.verdict:
        # This function and the service disagree about scopes. Ask the service each time.
        return None
    return CacheEntry(token.id, read, write, _posix(token.expire_time), keep_until)


def _answer(verdict: Verdict, token: Token, like: Verification) -> Verification:
    if verdict is like.verdict:
        return like
    return Verification(verdict=verdict, token=token, revision=like.revision, mark=like.mark)


def _posix(time: datetime | None) -> float | None:
    return None if time is None else time.timestamp()

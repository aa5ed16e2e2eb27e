"""What a verifier remembers of one secret: every answer that it may have to give, made in advance.

It owns which answers are worth remembering, and what they say about another scope than the one
that was asked about.
"""

from datetime import datetime
from typing import Final

from latchkey_coherence.memory import Entry

from latchkey.models import Scope, Token, Verdict, Verification

# Not UNKNOWN and MALFORMED: they name no token, so nothing would ever tell that they have changed.
_FINAL: Final = (Verdict.DELETED, Verdict.EXPIRED)
_LIVE: Final = (Verdict.VALID, Verdict.INSUFFICIENT_SCOPE)


class Remembered(Entry):
    """The answers for one secret. A verify that finds it makes nothing and converts nothing."""

    __slots__ = ("expires_at", "read", "write")

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
        """Answers those who need READ, or no scope: each token has at least that."""
        self.write = write
        """Answers those who need WRITE."""
        self.expires_at = expires_at
        """From when on, in POSIX seconds, it answers nobody and the service is asked instead: what
        has expired is for one clock to say. None: never."""


def remembered(answer: Verification, scope: Scope | None, keep_until: float) -> Remembered | None:
    """Return what to remember of the service's `answer` about `scope`; None: nothing.

    `keep_until` is when to ask again, in seconds of `boottime`.
    """
    token = answer.token
    if token is None:
        return None
    if answer.verdict in _FINAL:
        # As it is: once EXPIRED was said, this machine's clock cannot make it VALID again.
        return Remembered(token.id, answer, answer, None, keep_until)
    if answer.verdict not in _LIVE or token.scope is Scope.UNSPECIFIED:
        return None
    read = _answer(Verdict.VALID, token, answer)
    write = read
    if token.scope is Scope.READ:
        write = _answer(Verdict.INSUFFICIENT_SCOPE, token, answer)
    if (write if scope is Scope.WRITE else read).verdict is not answer.verdict:
        # The service and this table disagree about scopes: it will be right, and asked each time.
        return None
    return Remembered(token.id, read, write, _posix(token.expire_time), keep_until)


def _answer(verdict: Verdict, token: Token, like: Verification) -> Verification:
    if verdict is like.verdict:
        return like
    return Verification(verdict=verdict, token=token, revision=like.revision, mark=like.mark)


def _posix(time: datetime | None) -> float | None:
    return None if time is None else time.timestamp()

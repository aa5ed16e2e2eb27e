"""Reviews an account's tokens against good practice. Pure.

NIST SP 800-63B and the OWASP ASVS (5.0, §13.3) ask for credentials that expire, are rotated, have
the least privilege, and are removed once unused. The thresholds are our own.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from latchkey import Scope, Token

__all__ = ["Finding", "Kind", "findings_of", "is_use_recorded", "review"]

# Long enough to replace a token before its program fails.
SOON: Final = timedelta(days=14)
# Twice a year is often enough to keep the rotation practised, and rare enough to be done.
OLD: Final = timedelta(days=180)
# A quarter, so that quarterly jobs have run at least once.
UNUSED: Final = timedelta(days=90)
# Enough time to deploy a new token.
NEVER_USED: Final = timedelta(days=7)


class Kind(enum.Enum):
    """A kind of finding. The value is its name in URLs."""

    EXPIRED = "expired"
    EXPIRES_SOON = "expires-soon"
    NEVER_EXPIRES = "never-expires"
    OLD = "old"
    WRITE = "write"
    UNUSED = "unused"
    NEVER_USED = "never-used"

    @property
    def title(self) -> str:
        """Its title on the page."""
        return _WORDS[self][0]

    @property
    def why(self) -> str:
        """Why it matters and what to do about it."""
        return _WORDS[self][1]


_WORDS: Final = {
    Kind.EXPIRED: (
        "Expired",
        "Already rejected everywhere. Delete expired tokens to keep this list short.",
    ),
    Kind.EXPIRES_SOON: (
        "Expiring soon",
        f"Expires within {SOON.days} days. Replace it before its program stops working.",
    ),
    Kind.NEVER_EXPIRES: (
        "No expiry",
        "A leaked copy works until someone notices. Replace it with a token that expires.",
    ),
    Kind.OLD: (
        "Old",
        f"Created over {OLD.days} days ago. Copies spread over time, so replace it.",
    ),
    Kind.WRITE: (
        "Can write",
        "Anyone who holds it can change things. If reading is enough, use a Read token.",
    ),
    Kind.UNUSED: (
        "Unused",
        f"Not used for {UNUSED.days} days. If nothing needs it, delete it.",
    ),
    Kind.NEVER_USED: (
        "Never used",
        "Not used since it was created. If nothing needs it, delete it.",
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A kind of finding and the number of tokens that it applies to."""

    kind: Kind
    count: int


def review(tokens: Iterable[Token], now: datetime, *, use_recorded: bool) -> list[Finding]:
    """Return the findings about `tokens`, most urgent first, without kinds that have none."""
    counts = dict.fromkeys(Kind, 0)
    for token in tokens:
        for kind in findings_of(token, now, use_recorded=use_recorded):
            counts[kind] += 1
    return [Finding(kind, count) for kind, count in counts.items() if count]


def findings_of(token: Token, now: datetime, *, use_recorded: bool) -> list[Kind]:
    """Return the kinds of findings about one token.

    An expired token is harmless, so it has no other finding.
    """
    if token.expire_time is not None and token.expire_time <= now:
        return [Kind.EXPIRED]
    found = []
    if token.expire_time is None:
        found.append(Kind.NEVER_EXPIRES)
    elif token.expire_time - now <= SOON:
        found.append(Kind.EXPIRES_SOON)
    age = now - token.create_time
    if age > OLD:
        found.append(Kind.OLD)
    if token.scope is not Scope.READ:  # an unknown scope may allow anything
        found.append(Kind.WRITE)
    if token.last_used_time is not None:
        if now - token.last_used_time > UNUSED:
            found.append(Kind.UNUSED)
    elif use_recorded and age > NEVER_USED:
        found.append(Kind.NEVER_USED)
    return found


def is_use_recorded(tokens: Iterable[Token]) -> bool:
    """Return whether this service records use: if it does not, no token has a last use."""
    return any(token.last_used_time is not None for token in tokens)

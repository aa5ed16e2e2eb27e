"""What good practice would point out about an account's tokens. Pure.

NIST SP 800-63B and the OWASP ASVS (5.0, §13.3) ask for credentials that end, that are rotated, that
may do no more than they need, and that go once nobody uses them. The numbers are ours.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from latchkey import Scope, Token

__all__ = ["Finding", "Kind", "findings_of", "is_use_recorded", "review"]

# Long enough to replace a token before what uses it stops.
SOON: Final = timedelta(days=14)
# Twice a year is often enough to be practised, and seldom enough to be done.
OLD: Final = timedelta(days=180)
# A quarter: what runs at the end of each one has run.
UNUSED: Final = timedelta(days=90)
# Time to put a new token to use.
NEVER_USED: Final = timedelta(days=7)


class Kind(enum.Enum):
    """One thing to point out. The value is its name in addresses."""

    EXPIRED = "expired"
    EXPIRES_SOON = "expires-soon"
    NEVER_EXPIRES = "never-expires"
    OLD = "old"
    WRITE = "write"
    UNUSED = "unused"
    NEVER_USED = "never-used"

    @property
    def title(self) -> str:
        """What it is called on the page."""
        return _WORDS[self][0]

    @property
    def why(self) -> str:
        """Why it is pointed out, and what to do about it."""
        return _WORDS[self][1]


_WORDS: Final = {
    Kind.EXPIRED: (
        "Expired",
        "Refused everywhere already. Delete what has ended, so that the list shows what counts.",
    ),
    Kind.EXPIRES_SOON: (
        "Expiring soon",
        f"Stops working within {SOON.days} days. Replace it before what uses it fails.",
    ),
    Kind.NEVER_EXPIRES: (
        "Without expiry",
        "A copy that leaks works until someone notices. Replace it with a token that ends.",
    ),
    Kind.OLD: (
        "Old",
        f"Made more than {OLD.days} days ago. With time, more places hold a copy: replace it.",
    ),
    Kind.WRITE: (
        "Can write",
        "Whoever holds one can change things. Where reading is enough, use a Read token.",
    ),
    Kind.UNUSED: (
        "Unused",
        f"Not used for {UNUSED.days} days. If nothing needs it, delete it.",
    ),
    Kind.NEVER_USED: (
        "Never used",
        "No use was ever seen. If nothing needs it, delete it.",
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A kind, and how many of the account's tokens it is about."""

    kind: Kind
    count: int


def review(tokens: Iterable[Token], now: datetime, *, use_recorded: bool) -> list[Finding]:
    """Return what there is to point out, the most pressing first; nothing of what is in order."""
    counts = dict.fromkeys(Kind, 0)
    for token in tokens:
        for kind in findings_of(token, now, use_recorded=use_recorded):
            counts[kind] += 1
    return [Finding(kind, count) for kind, count in counts.items() if count]


def findings_of(token: Token, now: datetime, *, use_recorded: bool) -> list[Kind]:
    """Return what there is to point out about one token.

    An expired one is no danger any more, so nothing else is said of it.
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
    if token.scope is not Scope.READ:  # a level that is not known may be anything
        found.append(Kind.WRITE)
    if token.last_used_time is not None:
        if now - token.last_used_time > UNUSED:
            found.append(Kind.UNUSED)
    elif use_recorded and age > NEVER_USED:
        found.append(Kind.NEVER_USED)
    return found


def is_use_recorded(tokens: Iterable[Token]) -> bool:
    """Tell whether this service records use: a service that does not says so of no token."""
    return any(token.last_used_time is not None for token in tokens)

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

__all__ = ["Finding", "Kind", "findings_of", "review"]

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

    @property
    def remedy(self) -> tuple[str, str]:
        """The page that mends it, and the words of the link, which the token's name follows."""
        return _REMEDIES.get(self, ("replace", "Replace"))


_WORDS: Final = {
    Kind.EXPIRED: (
        "Expired",
        "Already refused everywhere. Delete expired tokens to keep this list short.",
    ),
    Kind.EXPIRES_SOON: (
        "Expiring soon",
        f"Expires within {SOON.days} days. Replace it and set a later expiry in time.",
    ),
    Kind.NEVER_EXPIRES: (
        "No expiry",
        "A leaked copy works until someone notices. Replace it and set an expiry.",
    ),
    Kind.OLD: (
        "Old",
        f"Its secret is over {OLD.days} days old. Copies spread over time, so replace it.",
    ),
    Kind.WRITE: (
        "Can write",
        "Anyone who holds it can change things. If reading is enough, reduce it to Read.",
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
# For the other kinds, a new secret is the remedy.
_REMEDIES: Final = {
    Kind.EXPIRED: ("delete", "Delete"),
    Kind.WRITE: ("edit", "Edit"),
    Kind.UNUSED: ("delete", "Delete"),
    Kind.NEVER_USED: ("delete", "Delete"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A kind of finding, the number of tokens that it applies to, and the most urgent of them."""

    kind: Kind
    count: int
    first: Token


def review(tokens: Iterable[Token], now: datetime, *, use_recorded: bool) -> list[Finding]:
    """Return the findings about `tokens`, most urgent first, without kinds that have none."""
    found: dict[Kind, list[Token]] = {kind: [] for kind in Kind}
    for token in tokens:
        for kind in findings_of(token, now, use_recorded=use_recorded):
            found[kind].append(token)
    return [
        Finding(kind, len(those), min(those, key=_urgency))
        for kind, those in found.items()
        if those
    ]


def secret_time(token: Token) -> datetime:
    """Return when the newest secret was created: a Replace makes a token young again."""
    return token.secrets[0].create_time if token.secrets else token.create_time


def _urgency(token: Token) -> tuple[float, float]:
    """Order tokens by expiry, the earliest first, then by the age of the secret."""
    expires = token.expire_time.timestamp() if token.expire_time else float("inf")
    return expires, secret_time(token).timestamp()


def findings_of(token: Token, now: datetime, *, use_recorded: bool) -> list[Kind]:
    """Return the kinds of findings about one token.

    An expired or disabled token is harmless, so it has no other finding.
    """
    if token.expire_time is not None and token.expire_time <= now:
        return [Kind.EXPIRED]
    if token.disable_time is not None:
        return []
    found = []
    if token.expire_time is None:
        found.append(Kind.NEVER_EXPIRES)
    elif token.expire_time - now <= SOON:
        found.append(Kind.EXPIRES_SOON)
    if now - secret_time(token) > OLD:
        found.append(Kind.OLD)
    if token.scope is not Scope.READ:  # an unknown scope may allow anything
        found.append(Kind.WRITE)
    if token.last_used_time is not None:
        if now - token.last_used_time > UNUSED:
            found.append(Kind.UNUSED)
    elif use_recorded and now - token.create_time > NEVER_USED:
        found.append(Kind.NEVER_USED)
    return found

"""Reviews an account's tokens against good practice. Pure.

NIST SP 800-63B and the OWASP ASVS (5.0, §13.3) ask for credentials that expire, are rotated, have
the least privilege, and are removed once unused. The thresholds are our own.
"""

import enum
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from latchkey import Scope, Token, TokenFilter, TokenOrder, TokenState

__all__ = ["Finding", "Kind", "findings_of"]

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

    LEAKED = "leaked"
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
    def order(self) -> TokenOrder:
        """The order that begins with the most urgent tokens."""
        if self is Kind.LEAKED:
            return TokenOrder.NEWEST
        return TokenOrder.LAST_USE if self in _BY_USE else TokenOrder.EXPIRY

    def selects(self, now: datetime) -> TokenFilter:
        """Return the filter for the tokens with this finding, as `findings_of` decides."""
        match self:
            case Kind.LEAKED:
                return TokenFilter(state=TokenState.ACTIVE, leaked=True)
            case Kind.EXPIRED:
                # Disabled ones too.
                return TokenFilter(expires_before=now)
            case Kind.EXPIRES_SOON:
                return TokenFilter(state=TokenState.ACTIVE, expires_before=now + SOON)
            case Kind.NEVER_EXPIRES:
                return TokenFilter(state=TokenState.ACTIVE, never_expires=True)
            case Kind.OLD:
                return TokenFilter(state=TokenState.ACTIVE, secret_created_before=now - OLD)
            case Kind.WRITE:
                return TokenFilter(can_write=True)
            case Kind.UNUSED:
                return TokenFilter(
                    state=TokenState.ACTIVE, unused_since=now - UNUSED, never_used=False
                )
            case Kind.NEVER_USED:
                return TokenFilter(
                    state=TokenState.ACTIVE, unused_since=now - NEVER_USED, never_used=True
                )

    @property
    def remedies(self) -> tuple[tuple[str, str], ...]:
        """The pages that fix it, each with the text of its link.

        The token's name follows the text of the first link.
        """
        return _REMEDIES.get(self, (_REPLACE,))


_WORDS: Final = {
    Kind.LEAKED: (
        "Leaked",
        "A secret was found where others can read it. Replace it at once, or delete the token.",
    ),
    Kind.EXPIRED: (
        "Expired",
        "Refused everywhere. Delete it to keep this list short.",
    ),
    Kind.EXPIRES_SOON: (
        "Expiring soon",
        f"Expires within {SOON.days} days. If a program still needs it, replace it in time.",
    ),
    Kind.NEVER_EXPIRES: (
        "No expiry",
        "If a copy leaks, it works until someone notices. Set an expiry.",
    ),
    Kind.OLD: (
        "Old",
        f"The secret is over {OLD.days} days old. Copies spread over time, so replace it.",
    ),
    Kind.WRITE: (
        "Can write",
        "Whoever has the secret can change data. If reading is enough, change it to Read.",
    ),
    Kind.UNUSED: (
        "Unused",
        f"Not used for over {UNUSED.days} days. If nothing needs it, delete it.",
    ),
    Kind.NEVER_USED: (
        "Never used",
        "Not used since it was created. If nothing needs it, delete it.",
    ),
}
_BY_USE: Final = frozenset({Kind.UNUSED, Kind.NEVER_USED})
_REPLACE: Final = ("replace", "Replace")
_DELETE: Final = ("delete", "Delete")
_EDIT: Final = ("edit", "Edit")
# For the other kinds, a new secret is the remedy. Its form suggests a later expiry if the current
# one is near.
_REMEDIES: Final = {
    Kind.LEAKED: (_REPLACE, _DELETE),
    Kind.EXPIRED: (_DELETE,),
    Kind.NEVER_EXPIRES: (_EDIT,),
    Kind.WRITE: (_EDIT,),
    Kind.UNUSED: (_DELETE,),
    Kind.NEVER_USED: (_DELETE,),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A kind of finding, the number of tokens that it applies to, and the most urgent of them."""

    kind: Kind
    count: int
    first: Token
    capped: bool = False
    """Whether there may be more tokens than `count`."""


def secret_time(token: Token) -> datetime:
    """Return when the newest secret was created: a Replace makes a token young again."""
    return token.secrets[0].create_time if token.secrets else token.create_time


def findings_of(token: Token, now: datetime, *, use_recorded: bool) -> list[Kind]:
    """Return the kinds of findings about one token.

    An expired or disabled token is harmless, so it has no other finding.
    """
    if token.expire_time is not None and token.expire_time <= now:
        return [Kind.EXPIRED]
    if token.disable_time is not None:
        return []
    found = []
    if token.leak_report_time is not None:
        found.append(Kind.LEAKED)
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

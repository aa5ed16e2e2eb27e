"""What is known of a token, and the decision whether it may do what is asked. Pure."""

import enum
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple

from latchkey_coherence.memory import Entry

__all__ = ["CachedToken", "Scope", "TokenRecord", "Verdict", "decide"]


class Scope(enum.IntEnum):
    """Access level, numbered as in the contract. WRITE includes READ."""

    UNSPECIFIED = 0
    READ = 1
    WRITE = 2


class Verdict(enum.IntEnum):
    """Answer to "may this secret do this?", numbered as in the contract."""

    VALID = 1
    MALFORMED = 2
    UNKNOWN = 3
    DELETED = 4
    EXPIRED = 5
    INSUFFICIENT_SCOPE = 6


class TokenRecord(NamedTuple):
    """A token as stored. Times are UTC-aware; `expire_time` None never expires.

    A named tuple and not a frozen dataclass, as are the others on Verify's way: made for every
    answer, it takes a quarter of the time.
    """

    id: str
    account_id: str
    name: str
    scope: Scope
    create_time: datetime
    expire_time: datetime | None
    hint: str
    labels: Mapping[str, str] = MappingProxyType({})
    last_used_time: datetime | None = None
    delete_time: datetime | None = None


class CachedToken(Entry):
    """What is kept of a token to answer verifies. A million of them may be in memory."""

    __slots__ = ("deleted", "expires", "scope", "token")

    def __init__(
        self,
        token_id: str,
        scope: int,
        expires: float,
        token: bytes,
        *,
        deleted: bool,
        keep_until: float,
    ) -> None:
        super().__init__(token_id, keep_until)
        self.scope = scope
        self.expires = expires
        """When it expires, in seconds of Unix time; infinite for never."""
        self.token = token
        """The token as the answer has it, encoded."""
        self.deleted = deleted


def decide(record: CachedToken | None, required_scope: int, now: float) -> Verdict:
    """Return the verdict on a well-formed secret whose token is `record`, at the moment `now`.

    `required_scope` is a number of the contract's enum, perhaps one that this release does not
    know: then no token includes it, so a newer caller is refused and never let in by mistake.
    """
    if record is None:
        return Verdict.UNKNOWN
    if record.deleted:
        return Verdict.DELETED
    if record.expires <= now:
        return Verdict.EXPIRED
    # Levels are ordered, and each includes those below. A negative number is no level at all.
    if not 0 <= required_scope <= record.scope:
        return Verdict.INSUFFICIENT_SCOPE
    return Verdict.VALID

"""Decides whether a token may do what a caller asks. Pure; owns the types of tokens and verdicts.

Does not find the token (`batched_lookup.py`) or check the lease (`verifier.py`).
"""

import enum
from collections.abc import Mapping
from datetime import datetime
from sys import intern
from types import MappingProxyType
from typing import Any, NamedTuple

from latchkey_coherence.verdict_cache import Entry

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
    """A token as stored. Times are UTC-aware; without an `expire_time` it never expires.

    A named tuple, like the other types on the path of Verify: creating one takes a quarter of the
    time of a frozen dataclass.
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
    last_used_by: str = ""


class CachedToken(Entry):
    """The part of a token that the cache keeps. A cache may hold a million of them."""

    __slots__ = ("account_id", "deleted", "expires", "scope", "token", "use")

    def __init__(
        self,
        token_id: str,
        account_id: str,
        scope: int,
        expires: float,
        token: bytes,
        *,
        deleted: bool,
        keep_until: float,
    ) -> None:
        super().__init__(token_id, keep_until)
        # An account has many tokens: interned, their entries share one string.
        self.account_id = intern(account_id)
        self.scope = scope
        self.expires = expires
        """Expiry in seconds of Unix time; infinite if the token never expires."""
        self.token = token
        """The encoded token, as part of a VerifyResponse."""
        self.deleted = deleted
        self.use: Any = None
        """The entry of `usage.PendingUses` that counts the token's uses, if there is one."""


def decide(record: CachedToken | None, required_scope: int, now: float) -> Verdict:
    """Return the verdict at the time `now` on a well-formed secret whose token is `record`.

    `required_scope` is a number of the contract's enum. No token includes a number that this
    release does not know, so a newer caller is rejected and never admitted by mistake.
    """
    if record is None:
        return Verdict.UNKNOWN
    if record.deleted:
        return Verdict.DELETED
    if record.expires <= now:
        return Verdict.EXPIRED
    # Levels are ordered, and each includes all lower ones. Negative numbers are not levels.
    if not 0 <= required_scope <= record.scope:
        return Verdict.INSUFFICIENT_SCOPE
    return Verdict.VALID

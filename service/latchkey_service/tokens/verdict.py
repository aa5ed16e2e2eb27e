"""The types of tokens, secrets and verdicts.

The decision itself is shared with the client library (`latchkey_coherence.verdict`). Does not find
the token (`batched_lookup.py`) or check the lease (`verifier.py`).
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from latchkey_coherence.rate import RateLimit, Share
from latchkey_coherence.verdict import Networks, Verdict, decide
from latchkey_coherence.verdict_cache import Entry

__all__ = [
    "CachedToken",
    "Scope",
    "SecretRecord",
    "TokenRecord",
    "TokenSecret",
    "Verdict",
    "decide",
]


class Scope(enum.IntEnum):
    """Access level, numbered as in the contract. WRITE includes READ."""

    UNSPECIFIED = 0
    READ = 1
    WRITE = 2


class TokenSecret(NamedTuple):
    """A secret of a token, as its owner sees it."""

    hint: str
    create_time: datetime
    expire_time: datetime | None
    """When it stops or stopped working. None: it works as long as the token."""
    retire_on_first_use: bool = False
    last_used_time: datetime | None = None
    leak_report_time: datetime | None = None


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
    disable_time: datetime | None = None
    allowed_networks: tuple[str, ...] = ()
    permissions: tuple[str, ...] = ()
    description: str = ""
    secrets: tuple[TokenSecret, ...] = ()
    """Newest first."""
    last_used_by: str = ""
    """This and the two before are empty in look-ups of Verify, as is `last_used_time`."""
    rate_limit: RateLimit | None = None
    """How often it may be used. None: any number of times."""


class SecretRecord(NamedTuple):
    """A secret as stored."""

    digest: bytes
    pepper_id: str
    expire_time: datetime | None
    """End of the grace after a rotation."""
    retire_time: datetime | None
    """Set: it has ended, whatever any clock says."""
    retire_on_first_use: bool
    seal: bytes | None
    """None: not sealed yet. Empty: it or its token has ended."""
    ordinal: int = 0
    """Numbers the secrets of a token in the order in which they were made, from 0."""
    older: bool = False
    """Whether the token has older secrets that are not retired. Only in look-ups of Verify."""


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class CachedToken(Entry):
    """The part of a token and secret that the cache keeps. A cache may hold a million of them."""

    account_id: str
    """Interned: an account has many tokens, whose entries share one string."""
    scope: int
    expires: float
    """When the secret stops working, in seconds of Unix time. Infinite: never; minus infinite: it
    was retired."""
    token: bytes
    """The encoded token, as part of a VerifyResponse."""
    deleted: bool
    disabled: bool = False
    networks: Networks | None = None
    permissions: frozenset[str] | None = None
    share: Share | None = None
    """The calls that this process may accept. None: the token has no rate limit."""
    retires_older: bytes | None = None
    """The digest of the secret, if its first use ends older secrets and has not been seen."""
    use: Any = field(default=None, init=False)
    """The entry of `usage.PendingUses` that counts the secret's uses, if there is one."""

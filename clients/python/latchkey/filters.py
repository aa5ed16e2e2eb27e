"""What selects and orders the tokens of an account, for `Client.list` and `Client.delete_all`."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from latchkey.models import Scope

__all__ = ["TokenFilter", "TokenOrder", "TokenState"]


@enum.unique
class TokenState(enum.Enum):
    """State of a token that is not deleted."""

    ACTIVE = "active"
    """Neither disabled nor expired."""
    DISABLED = "disabled"
    """Disabled, whether expired or not."""
    EXPIRED = "expired"
    """Expired, but not disabled."""


@enum.unique
class TokenOrder(enum.Enum):
    """Order of a list."""

    NEWEST = "newest"
    """The latest creation first."""
    EXPIRY = "expiry"
    """The earliest expiry first. Tokens that never expire come last."""
    LAST_USE = "last-use"
    """The earliest last use first, to within a minute. Tokens that were never used come first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFilter:
    """Selects live tokens that match every given field. Without fields, it selects all."""

    scope: Scope | None = None
    """Tokens with exactly this scope."""
    name_contains: str = ""
    """Tokens whose name contains this text, ignoring letter case."""
    # A dict is not hashable.
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Tokens that have all of these labels, with these values."""
    state: TokenState | None = None
    expires_before: datetime | None = None
    """Tokens that expire, or have expired, before this time."""
    unused_since: datetime | None = None
    """Tokens that were created before this time and have no recorded use since."""
    can_write: bool | None = None
    """True: active tokens with WRITE. False: all others."""
    ids: tuple[str, ...] | None = None
    """Tokens with one of these ids: 1 to 1,000."""
    search: str = ""
    """Tokens with this text in their name, or in the last four characters of a working secret."""
    never_used: bool | None = None
    """True: tokens without a recorded use. False: tokens with one."""
    never_expires: bool | None = None
    """True: tokens without an expire_time. False: tokens with one."""
    secret_created_before: datetime | None = None
    """Tokens whose newest secret was created before this time."""
    leaked: bool | None = None
    """True: tokens with one of `Token.secrets` reported as leaked. False: all others."""

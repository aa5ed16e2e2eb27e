"""The values that the library takes and gives: plain, immutable, without protobuf.

All datetimes are timezone-aware, in UTC.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from latchkey.secret import Secret


@enum.unique
class Scope(enum.Enum):
    """Access level of a token. `WRITE` includes `READ`."""

    READ = "read"
    WRITE = "write"
    UNSPECIFIED = "unspecified"
    """A level that this version of the library does not know. Seen on a token, never asked for."""


@enum.unique
class Verdict(enum.Enum):
    """Answer to "may this secret do this?". Anything but `VALID` means no."""

    VALID = "valid"
    MALFORMED = "malformed"
    """Not a secret of Latchkey: wrong shape or checksum."""
    UNKNOWN = "unknown"
    """The right shape, but no token has this secret."""
    DELETED = "deleted"
    EXPIRED = "expired"
    INSUFFICIENT_SCOPE = "insufficient_scope"
    """A live token that does not include the required scope."""
    UNSPECIFIED = "unspecified"
    """An answer that this version of the library does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """An API token of an account. It never contains the secret."""

    id: str
    account_id: str
    name: str
    scope: Scope
    create_time: datetime
    expire_time: datetime | None = None
    """When the token stops being valid. None: never."""
    last_used_time: datetime | None = None
    """When a verify last accepted the token, roughly. None: not recorded."""
    hint: str = ""
    """The secret's prefix and last four characters, for people to recognise it."""
    # A dict has no hash; two tokens that differ in labels alone may share theirs.
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedToken:
    """A new token and its secret, which is never shown again."""

    token: Token
    secret: Secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some of an account's live tokens, newest first."""

    tokens: tuple[Token, ...]
    next_page_token: str
    """Opaque; asks for the page after this one. Empty: this is the last page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Proof of a deletion, the same on every retry."""

    commit_time: datetime
    effective_time: datetime
    """From when on the token was dead everywhere."""
    revision: int
    verifiers_acknowledged: int
    verifiers_outwaited: int
    """How many did not confirm and were waited out until they could no longer say VALID."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Answer to a verify. Ask `allowed`; `verdict` says why not."""

    verdict: Verdict
    token: Token | None = None
    """The token that the secret belongs to, whatever the verdict. None: it belongs to none."""
    revision: int = 0
    """The revision that the answer was read at. 0 when nothing had to be read."""

    @property
    def allowed(self) -> bool:
        """Whether the holder may do what was asked about."""
        return self.verdict is Verdict.VALID

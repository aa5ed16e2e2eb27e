"""The values that the library accepts and returns: plain, immutable, without protobuf.

All datetimes are timezone-aware, in UTC.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from latchkey.secret import Secret


@enum.unique
class Scope(enum.Enum):
    """Access level of a token. `WRITE` includes `READ`."""

    READ = "read"
    WRITE = "write"
    UNSPECIFIED = "unspecified"
    """A level that this version of the library does not know. Appears on tokens only."""


@enum.unique
class Verdict(enum.Enum):
    """The answer to a verify. Every verdict except `VALID` means no."""

    VALID = "valid"
    MALFORMED = "malformed"
    """Not a Latchkey secret: wrong format or checksum."""
    UNKNOWN = "unknown"
    """The format is right, but no token has this secret."""
    DELETED = "deleted"
    EXPIRED = "expired"
    INSUFFICIENT_SCOPE = "insufficient_scope"
    """The token is live but does not include the required scope."""
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
    """Approximately when a verify last accepted the token. None: not recorded."""
    hint: str = ""
    """The secret's prefix and last four characters, so that people recognise the token."""
    # A dict is not hashable. Tokens that differ only in labels may share a hash.
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedToken:
    """A new token and its secret, which is never shown again."""

    token: Token
    secret: Secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page of an account's live tokens, newest first."""

    tokens: tuple[Token, ...]
    next_page_token: str
    """Opaque; requests the next page. Empty on the last page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Proof of a deletion. Once confirmed, every retry returns the same receipt."""

    commit_time: datetime
    effective_time: datetime | None
    """When the token became dead everywhere. None: not confirmed yet (`no_wait`)."""
    revision: int
    verifiers_acknowledged: int
    """How many server processes confirmed that they evicted the token."""
    verifiers_outwaited: int
    """How many server processes did not confirm, so that the Delete outwaited their leases."""
    mark: int = 0
    """Distinguishes equal revisions of different histories, after a failover or a restore."""
    clients_acknowledged: int = 0
    """How many client libraries confirmed that they evicted the token."""
    clients_outwaited: int = 0
    """How many client libraries did not confirm, so that the Delete outwaited their leases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The answer to a verify. Check `allowed`; `verdict` gives the cause."""

    verdict: Verdict
    token: Token | None = None
    """The token that the secret belongs to, for every verdict. None: the secret is not known."""
    revision: int = 0
    """The revision at which the answer was read. 0 if nothing was read."""
    mark: int = 0
    """The mark of `revision`. Together they are a position in one history of the database."""

    @property
    def allowed(self) -> bool:
        """Whether the secret is valid for the required scope."""
        return self.verdict is Verdict.VALID


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierStats:
    """The state of one `Verifier`. Counters start with the verifier and only increase."""

    watching: bool
    """Whether it holds a lease, and so may answer from its cache."""
    fallback_reason: str | None
    """Why it asks the service each time; None if it does not, or has not been used yet."""
    lease_remaining_seconds: float
    """How long it may answer from its cache without a further grant. 0: it may not."""
    applied_revision: int
    """Every change up to this revision is applied to the cache. 0: no revision received yet."""
    entries: int
    """Secrets whose answers are cached."""
    hits: int
    """Verifies answered from the cache. Slightly too low if many threads share the verifier."""
    misses: int
    """Verifies that the service had to answer."""
    batches: int
    """Calls that combined several such verifies."""
    invalidations: int
    """Messages that named tokens to evict."""
    resets: int
    """How often the whole cache was emptied."""
    reconnects: int
    """How often a new stream replaced one that broke, fell silent, or whose server stopped."""


@enum.unique
class Notifications(enum.Enum):
    """Whether a server process receives deletions at once, or up to a second later."""

    UNSPECIFIED = "unspecified"
    """Not known yet."""
    ARRIVE = "arrive"
    SILENT = "silent"
    """The subscription succeeds, but notifications are lost in a pooler or a dead connection."""
    OFF = "off"
    """Switched off, or not supported by the database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierStatus:
    """A server process that may answer verifies. Deletes wait for every such process."""

    id: str
    """Opaque; changes with each start of the process."""
    host: str
    process_id: int
    version: str
    start_time: datetime
    acknowledged_revision: int
    """The revision up to which the process and all of its clients have applied every change."""
    lag: int
    """How many revisions `acked_revision` is behind the newest."""
    lease_duration: timedelta
    lease_remaining: timedelta
    """The rest of its lease, by the database's clock. 0: the lease has ended, for example because
    the process hangs or is cut off from the database."""
    clients: int
    """How many clients held a grant when the process last renewed its lease."""
    notifications: Notifications
    answering: bool
    """Whether this process answered the status call."""
    waiting_for: tuple[str, ...] = ()
    """Clients that delayed a deletion by more than half a second, by caller and address."""
    pepper_ids: tuple[str, ...] = ()
    """Ids of its peppers, newest first. Empty: its release does not report them."""
    database_host: str = ""
    """The database host that last renewed its lease. Empty: not renewed yet."""
    system_identifier: str = ""
    """Postgres' system_identifier of that server. Empty: the engine does not report it."""
    timeline: str = ""
    """The timeline of that server, which changes with each promotion. Empty: not reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of all server processes, as stored in the database."""

    head_revision: int
    """The newest revision."""
    verifiers: tuple[VerifierStatus, ...]
    """The oldest first."""
    head_mark: int = 0
    """The mark of `head_revision`."""
    warnings: tuple[str, ...] = ()
    """Faults that a person should repair. Each text names the fault and its remedy."""

"""The values that the library accepts and returns: plain, immutable, without protobuf.

All datetimes are timezone-aware, in UTC.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Final

from latchkey._rate_limit import RateLimit
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
    DISABLED = "disabled"
    ADDRESS_NOT_ALLOWED = "address_not_allowed"
    """The token is limited to networks, and the client's address is unknown or in none of them."""
    INSUFFICIENT_PERMISSIONS = "insufficient_permissions"
    """The token is live but lacks a required permission."""
    RATE_LIMITED = "rate_limited"
    """The token's rate limit is used up. `Verification.retry_after` says when to try again."""
    UNSPECIFIED = "unspecified"
    """An answer that this version of the library does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSecret:
    """A secret of a token, without the secret itself."""

    hint: str
    """Prefix and last four characters, so that people recognise it."""
    create_time: datetime
    expire_time: datetime | None = None
    """When it stops or stopped working, apart from the token's expiry. None: with the token."""
    last_used_time: datetime | None = None
    """When a verify last called it valid, at most 15 seconds behind. None: not recorded."""
    retire_on_first_use: bool = False
    """Whether the first use of this secret ends the older ones."""
    leak_report_time: datetime | None = None
    """When it was first reported as leaked. None: never."""


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
    """When a verify last called the token valid, at most 15 seconds behind. Set by get and list."""
    last_used_by: str = ""
    """The name of the caller whose verify that was. Empty: not recorded, or no policy."""
    hint: str = ""
    """The newest secret's prefix and last four characters, so that people recognise the token."""
    # A dict is not hashable. Tokens that differ only in labels may share a hash.
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    disable_time: datetime | None = None
    """When the token was disabled. None: it is not disabled."""
    allowed_networks: tuple[str, ...] = ()
    """The networks from which it may be used, in CIDR notation. Empty: any address."""
    permissions: tuple[str, ...] = ()
    """What it may do, within its scope: `resource:action`. Empty: it has no permissions."""
    description: str = ""
    """Text given by the owner. Empty in a verification."""
    secrets: tuple[TokenSecret, ...] = ()
    """Those that still work, and the newest one in any case, newest first. Empty in a
    verification."""
    rate_limit: RateLimit | None = None
    """How often it may be used. None: any number of times."""

    @property
    def leak_report_time(self) -> datetime | None:
        """When one of `secrets` was first reported as leaked. None: never."""
        times = [secret.leak_report_time for secret in self.secrets]
        return min((time for time in times if time is not None), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallerUsage:
    """The uses of a token by one caller."""

    caller: str
    """The caller's name in the policy. Empty: no policy."""
    first_used_time: datetime
    last_used_time: datetime
    # A dict is not hashable.
    days: Mapping[date, int] = field(default_factory=dict, hash=False)
    """The number of uses on each day in UTC, newest first. The last 90 days."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedToken:
    """A new token and its secret, which is never shown again."""

    token: Token
    secret: Secret
    receipt: "Receipt | None" = None
    """Proof that the secret of an earlier attempt no longer works. None: the first one succeeded.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class RotatedToken:
    """A token and its new secret, which is never shown again."""

    token: Token
    secret: Secret
    receipt: "Receipt | None" = None
    """Proof that the end of the older secrets, now or after the grace, is known everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A token after a change."""

    token: Token
    receipt: "Receipt | None" = None
    """Proof that the change is in effect everywhere. None: it took nothing away."""


class Unchanged(enum.Enum):
    """The type of `UNCHANGED`."""

    UNCHANGED = "unchanged"


UNCHANGED: Final = Unchanged.UNCHANGED
"""Stands for a field that `Client.update` does not change. None would clear it."""


@enum.unique
class SecretOutcome(enum.Enum):
    """What `Client.revoke_secrets` or `Client.report_secrets` did with a secret."""

    ENDED = "ended"
    """This call ended it."""
    ENDED_BEFORE = "ended_before"
    """It belongs to a token, but did not work any more."""
    UNKNOWN = "unknown"
    """The format is right, but no token has this secret."""
    MALFORMED = "malformed"
    """Not a Latchkey secret: wrong format or checksum."""
    REPORTED = "reported"
    """Only from `report_secrets`: it works, and is marked as leaked."""
    UNSPECIFIED = "unspecified"
    """An outcome that this version of the library does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """What `Client.revoke_secrets` did."""

    outcomes: tuple[SecretOutcome, ...]
    """One for each secret, in the same order."""
    receipt: "Receipt | None" = None
    """Proof that the secrets that belong to tokens are dead everywhere, apart from those whose
    grace ended by the clock. None: no secret belongs to a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletions:
    """What `Client.delete_all` deleted or, with `dry_run`, would delete."""

    count: int
    """How many tokens this call deleted. With `dry_run`: how many match.

    The library repeats a call that the service cannot confirm. This is the number of the last
    attempt, so it may lack tokens that an earlier attempt deleted. The receipt covers these too."""
    tokens: tuple[Token, ...] = ()
    """With `dry_run`: the first 500 of them, the oldest first."""
    receipt: "Receipt | None" = None
    """Proof of these and of earlier deletions of the account. None with `dry_run`."""
    more: bool = False
    """Whether more tokens match than this call deleted. If so, call it again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits for the tokens of an account that a caller creates or changes."""

    max_ttl: timedelta | None = None
    """The longest time from a `create` or `update` until the expiry that it sets, and the longest
    grace of a `rotate`. None: no limit."""
    require_expiry: bool = False
    """Whether each token needs an expiry. True whenever `max_ttl` is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page of an account's live tokens. It can be empty without being the last one."""

    tokens: tuple[Token, ...]
    next_page_token: str
    """Opaque; requests the next page. Empty on the last page."""
    total_size: int | None = None
    """How many tokens all pages have together, or at least so many if `total_size_capped`. None
    unless requested."""
    total_size_capped: bool = False
    """Whether there may be more tokens than `total_size`: the service counts among 10,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundToken:
    """A token of any account. It may be deleted."""

    token: Token
    delete_time: datetime | None
    """When it was deleted, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPage:
    """A page of tokens of all accounts. It can be empty without being the last one."""

    tokens: tuple[FoundToken, ...]
    callers: tuple[CallerUsage, ...]
    """If the search was for an id: who used that token, the most recent caller first."""
    next_page_token: str
    """Opaque; requests the next page. Empty on the last page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Proof that a change that takes something away, such as a deletion, is in effect.

    Every retry of a confirmed Delete returns the same receipt.
    """

    commit_time: datetime
    effective_time: datetime | None
    """When the change was in effect everywhere. None: not confirmed yet (`no_wait`)."""
    revision: int
    verifiers_acknowledged: int
    """How many server processes confirmed that they evicted the tokens."""
    verifiers_outwaited: int
    """How many server processes did not confirm, so that the call outwaited their leases."""
    mark: int = 0
    """Distinguishes equal revisions of different histories, after a failover or a restore."""
    clients_acknowledged: int = 0
    """How many client libraries confirmed that they evicted the tokens."""
    clients_outwaited: int = 0
    """How many client libraries did not confirm, so that the call outwaited their leases."""


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
    details_omitted: bool = False
    """Whether `token` lacks its labels, networks and permissions. Only in answers of
    `batch_verify`; the verdict takes them into account."""
    retry_after: timedelta | None = None
    """With RATE_LIMITED: how long to wait before the token may be allowed again."""

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
    schema_version: int = 0
    """Number of the database's newest migration. 0: the server does not report it."""

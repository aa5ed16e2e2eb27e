"""The values that the library takes and gives: plain, immutable, without protobuf.

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
    """Proof of a deletion, the same on every retry once it is confirmed."""

    commit_time: datetime
    effective_time: datetime | None
    """From when on the token was dead everywhere. None: not confirmed yet (`no_wait`)."""
    revision: int
    verifiers_acknowledged: int
    """How many server processes confirmed that they dropped the token."""
    verifiers_outwaited: int
    """How many did not confirm and were waited out until they could no longer say VALID."""
    mark: int = 0
    """Tells apart revisions of the same number, which a failover or a restore can cause."""
    clients_acknowledged: int = 0
    """How many client libraries confirmed that they dropped the token."""
    clients_outwaited: int = 0
    """How many client libraries were waited out until their leases had ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Answer to a verify. Ask `allowed`; `verdict` says why not."""

    verdict: Verdict
    token: Token | None = None
    """The token that the secret belongs to, whatever the verdict. None: it belongs to none."""
    revision: int = 0
    """The revision that the answer was read at. 0 when nothing had to be read."""
    mark: int = 0
    """The mark of `revision`. Both together name a place in one history of the database."""

    @property
    def allowed(self) -> bool:
        """Whether the holder may do what was asked about."""
        return self.verdict is Verdict.VALID


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierStats:
    """How a `Verifier` of this process is doing. Counters begin with the verifier and only rise."""

    watching: bool
    """Whether it may answer from memory now: it holds a lease."""
    fallback_reason: str | None
    """Why it asks the service about each secret instead. None: it need not, or was not used yet."""
    lease_remaining_seconds: float
    """How long it may answer from memory if nothing more is heard of the service. 0: not at all."""
    applied_revision: int
    """It remembers nothing that a change up to this revision has ended. 0: it has heard of none."""
    entries: int
    """Secrets that it remembers the answer for."""
    hits: int
    """Verifies that were answered from memory; a few less when many threads share the verifier."""
    misses: int
    """Verifies that the service was asked about."""
    batches: int
    """Calls that asked about several of them at once."""
    invalidations: int
    """Messages that named tokens to forget."""
    resets: int
    """Times that everything had to be forgotten."""
    reconnects: int
    """Times that watching began anew after the first: the stream broke, fell silent, or its
    server stopped."""


@enum.unique
class Notifications(enum.Enum):
    """Whether a server process hears of deletions as they happen, or up to a second later."""

    UNSPECIFIED = "unspecified"
    """Not known yet."""
    ARRIVE = "arrive"
    SILENT = "silent"
    """They are accepted and do not arrive: a pooler swallows them, or a connection was lost."""
    OFF = "off"
    """Switched off, or not supported by the database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierStatus:
    """A server process that may answer verifies. Deletes wait for each of them."""

    id: str
    """Opaque; another one each time that the process starts."""
    host: str
    process_id: int
    version: str
    start_time: datetime
    acknowledged_revision: int
    """Up to here it and all clients attached to it have confirmed to answer with no dead token."""
    lag: int
    """How many revisions that is behind the newest."""
    lease_duration: timedelta
    lease_remaining: timedelta
    """How long its lease lasts if it is not renewed, by the database's clock. 0: it has run out,
    as it does when the process hangs or is cut off from the database."""
    clients: int
    """How many clients answered from memory under its lease when it last renewed that."""
    notifications: Notifications
    answering: bool
    """Whether this process gave the answer."""
    waiting_for: tuple[str, ...] = ()
    """Clients that have kept a deletion waiting for over half a second, by caller and address."""
    pepper_ids: tuple[str, ...] = ()
    """Ids of the peppers that it reads, the newest first. Empty: its release reports none."""
    database_host: str = ""
    """The host of the database URL that it last renewed its lease on. Empty: not renewed yet."""
    system_identifier: str = ""
    """Postgres' system_identifier of that server. Empty: the engine does not report it."""
    timeline: str = ""
    """The timeline of that server, another one after each promotion. Empty: not reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of all server processes, as the database has it."""

    head_revision: int
    """The newest revision: how many times tokens have been made invalid."""
    verifiers: tuple[VerifierStatus, ...]
    """The oldest first."""
    head_mark: int = 0
    """The mark of `head_revision`."""
    warnings: tuple[str, ...] = ()
    """Faults that a person should repair: texts that name the fault and its remedy."""

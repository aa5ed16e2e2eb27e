"""Creates, gets, lists and deletes tokens.

Owns the rules of the contract: validation, ids and the wait of a Delete. It contains
neither protobuf (`rpc/token_service.py`) nor SQL (`token_store.py`).
"""

import asyncio
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from latchkey_service.audit.audit_log import AuditContext
from latchkey_service.coherence.ack_rules import NO_ACKNOWLEDGEMENTS
from latchkey_service.coherence.ack_waiter import AckWaiter
from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.errors import (
    AlreadyExists,
    FieldViolation,
    InvalidArgument,
    NotConfirmed,
    NotFound,
)
from latchkey_service.identifiers import ACCOUNT_ID, TOKEN_ID
from latchkey_service.secret_format import Keyring, Secret, contains_secret
from latchkey_service.tokens import page_tokens
from latchkey_service.tokens.names import is_visible, name_key
from latchkey_service.tokens.token_store import Deletion, PageStart, TokenStore
from latchkey_service.tokens.verdict import Scope, TokenRecord

__all__ = ["Created", "NewToken", "Page", "Tokens"]

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 500
NAME_LENGTH_MAX = 64
LABELS_MAX = 16
LABEL_KEY_LENGTH_MAX = 63
LABEL_VALUE_LENGTH_MAX = 255
ID_LENGTH_MAX = 64
# The last whole second that a Timestamp can hold. asyncpg converts the last microsecond of datetime
# to infinity.
_END_OF_TIME = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
# Longer texts are rejected for their length.
SCANNED_LENGTH_MAX = 1_000
# Receipts written at once. Each takes a connection of the pool (`connections.POOL_SIZE_MAX`).
CONFIRMING_MAX = 4
# A label key that an error message may repeat.
_PLAIN_KEY = re.compile(r"[A-Za-z0-9._/-]{1,32}")
# Crockford's base 32, in ASCII order, so that ids sort like the numbers that they encode.
_BASE32 = "0123456789abcdefghjkmnpqrstvwxyz"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class NewToken:
    """A request to create a token, not validated. At most one of `expire_time`, `ttl` is set."""

    account_id: str
    name: str
    scope: int
    expire_time: datetime | None
    ttl: timedelta | None
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Created:
    """A new token and its secret, which is stored nowhere."""

    record: TokenRecord
    secret: Secret


@dataclass(frozen=True, slots=True)
class Page:
    """Tokens, newest first, and the token of the next page, which is empty on the last page."""

    records: list[TokenRecord]
    next_page_token: str


class Tokens:
    """Manages tokens under this process's lease: trusts only reads from the lease's history.

    Deadlines are seconds on the process's clock. Every method raises InvalidArgument, Overloaded,
    Unavailable and StoreUnavailable.
    """

    def __init__(
        self,
        store: TokenStore,
        keyring: Keyring,
        ack_waiter: AckWaiter,
        reads: LeasedReads,
        secret_prefix: str,
        now: Callable[[], datetime],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._store = store
        self._keyring = keyring
        self._ack_waiter = ack_waiter
        self._reads = reads
        self._confirming = asyncio.Semaphore(CONFIRMING_MAX)
        self._secret_prefix = secret_prefix
        self._now = now
        self._random_bytes = random_bytes

    async def create(self, new: NewToken, audit_context: AuditContext, deadline: float) -> Created:
        """Create a token. Not idempotent. Raises AlreadyExists."""
        now = self._now()
        name = new.name.strip()
        violations = [
            *_account_violations(new.account_id),
            *_name_violations(name),
            *_label_violations(new.labels),
        ]
        # The service stores and shows all of these as they are. Too many labels are not searched.
        labels = (*new.labels.keys(), *new.labels.values()) if len(new.labels) <= LABELS_MAX else ()
        for field, texts in (
            ("account_id", [new.account_id]),
            ("name", [name]),
            ("labels", labels),
        ):
            if any(contains_secret(text[:SCANNED_LENGTH_MAX]) for text in texts):
                violations.append(FieldViolation(field, "must not contain a secret"))
        if new.scope not in (Scope.READ, Scope.WRITE):
            violations.append(FieldViolation("scope", "must be SCOPE_READ or SCOPE_WRITE"))
        expire_time = _expiry(new, now, violations)
        if violations:
            raise InvalidArgument(*violations)
        began = await self._reads.begin(deadline)
        minted = self._keyring.mint(self._secret_prefix, self._random_bytes)
        record = TokenRecord(
            _new_id(now, self._random_bytes),
            new.account_id,
            name,
            Scope(new.scope),
            now,
            expire_time,
            minted.hint,
            dict(new.labels),
        )
        try:
            await self._store.insert_token(record, name_key(name), minted.digest, audit_context)
        except AlreadyExists:
            # A deposed primary may still have a token of this name that is deleted by now.
            _, snapshot = await self._store.get_token(new.account_id, record.id)
            await self._reads.accept(snapshot, began, deadline)
            raise
        return Created(record, minted.secret)

    async def get(self, account_id: str, token_id: str, deadline: float) -> TokenRecord:
        """Return a live token. Raises NotFound."""
        _check(*_account_violations(account_id), *_id_violations(token_id))
        began = await self._reads.begin(deadline)
        record, snapshot = await self._store.get_token(account_id, token_id)
        await self._reads.accept(snapshot, began, deadline)
        if record is None:
            raise NotFound("The account has no live token with this id.")
        return record

    async def list(self, account_id: str, page_size: int, page_token: str, deadline: float) -> Page:
        """Return a page of live tokens, newest first (AIP-158)."""
        violations = _account_violations(account_id)
        if page_size < 0:
            violations.append(FieldViolation("page_size", "must not be negative"))
        _check(*violations)
        after = None
        if page_token:
            after = PageStart(*page_tokens.decode(account_id, page_token, TOKEN_ID))
        size = min(page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        # One token more than requested shows whether there is a next page.
        began = await self._reads.begin(deadline)
        records, snapshot = await self._store.list_tokens(account_id, after, size + 1)
        await self._reads.accept(snapshot, began, deadline)
        if len(records) <= size:
            return Page(records, "")
        last = records[size - 1]
        return Page(records[:size], page_tokens.encode(account_id, last.create_time, last.id))

    async def delete(
        self,
        account_id: str,
        token_id: str,
        wait_until: float | None,
        audit_context: AuditContext,
        deadline: float,
        *,
        on_commit: Callable[[], None] = lambda: None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Deletion:
        """Delete a token permanently and return the receipt. Idempotent.

        Returns when no verifier can still answer VALID (coherence rule 8), or at once if
        `wait_until` is None. Calls `on_commit` when this call has committed the deletion, with its
        audit entry, and `on_wait` when only the wait and the receipt remain. Raises NotFound.
        Raises NotConfirmed at `wait_until` (seconds on the process's clock): the deletion stands,
        and deleting the token again returns the receipt.
        """
        _check(*_account_violations(account_id), *_id_violations(token_id))
        began = await self._reads.begin(deadline)
        deletion = await self._store.delete_token(account_id, token_id, audit_context)
        if deletion is not None:
            on_commit()
            position = deletion.position
        else:
            # A deposed primary must not report that a leaked token never existed.
            deletion, snapshot = await self._store.get_deletion(account_id, token_id)
            await self._reads.accept(snapshot, began, deadline)
            # Not the position of the deletion, which the log may no longer have. A verifier that
            # has applied this later position has applied that one too.
            position = snapshot.position
        if deletion is None:
            raise NotFound(
                "The account has no token with this id, live or deleted. It never had one, or the "
                "record of its deletion has been purged."
            )
        if deletion.effective_time is not None:
            # Confirmed before, but that call may have failed before a standby had the receipt.
            return await self._store.confirm_deletion(
                token_id, deletion.position, NO_ACKNOWLEDGEMENTS
            )
        self._ack_waiter.announce(position.revision)
        if wait_until is None:
            return deletion
        on_wait()
        acknowledgements = await self._ack_waiter.wait(position, wait_until)
        # All Deletes that waited for the same hung verifier arrive here at once.
        async with self._confirming:
            return await self._store.confirm_deletion(token_id, deletion.position, acknowledgements)

    async def invalidate_all(
        self,
        wait_until: float,
        audit_context: AuditContext,
        deadline: float,
        *,
        on_commit: Callable[[], None] = lambda: None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Deletion:
        """Clear the cache of every verifier and return a receipt. Changes no token.

        Returns when every verifier has cleared its cache or can no longer answer from it. Calls
        `on_commit` when the change is committed, and `on_wait` when only that wait remains. Raises
        NotConfirmed at `wait_until` (seconds on the process's clock).
        """
        await self._reads.begin(deadline)
        position, commit_time = await self._store.invalidate_all(audit_context)
        on_commit()
        self._ack_waiter.announce(position.revision)
        on_wait()
        try:
            acknowledgements = await self._ack_waiter.wait(position, wait_until)
        except NotConfirmed:
            raise NotConfirmed(
                "Not every verifier has confirmed yet that its cache is empty; call again."
            ) from None
        return Deletion(position, commit_time, max(commit_time, self._now()), *acknowledgements)


def _new_id(now: datetime, random_bytes: Callable[[int], bytes]) -> str:
    """Return a new id: 48 bits of milliseconds and 80 random bits, like UUIDv7 and ULID."""
    milliseconds = (now - _EPOCH) // timedelta(milliseconds=1)
    number = (milliseconds << 80) | int.from_bytes(random_bytes(10))
    return "tok_" + "".join(_BASE32[number >> shift & 31] for shift in range(125, -1, -5))


def _expiry(new: NewToken, now: datetime, violations: list[FieldViolation]) -> datetime | None:
    """Return the expiry of the new token, None for never. Adds to `violations` if invalid."""
    if new.ttl is None:
        if new.expire_time is not None and not now < new.expire_time <= _END_OF_TIME:
            violations.append(
                FieldViolation("expire_time", "must be in the future and before the year 10000")
            )
        return new.expire_time
    # Checked before the addition, which raises OverflowError outside the calendar.
    if new.ttl <= timedelta(0):
        violations.append(FieldViolation("ttl", "must be greater than zero"))
    elif new.ttl > _END_OF_TIME - now:
        violations.append(FieldViolation("ttl", "must end before the year 10000"))
    else:
        return now + new.ttl
    return None


def _check(*violations: FieldViolation) -> None:
    if violations:
        raise InvalidArgument(*violations)


def _account_violations(account_id: str) -> list[FieldViolation]:
    if not account_id:
        return [FieldViolation("account_id", "is required")]
    if not ACCOUNT_ID.fullmatch(account_id):
        return [FieldViolation("account_id", "must be 1-64 characters of A-Za-z0-9._:-")]
    return []


def _id_violations(token_id: str) -> list[FieldViolation]:
    if not token_id:
        return [FieldViolation("id", "is required")]
    if len(token_id) > ID_LENGTH_MAX or _has_control_characters(token_id):
        return [FieldViolation("id", "is not a valid token id")]
    return []


def _name_violations(name: str) -> list[FieldViolation]:
    if not name:
        return [FieldViolation("name", "is required")]
    if len(name) > NAME_LENGTH_MAX:
        return [FieldViolation("name", f"must have at most {NAME_LENGTH_MAX} characters")]
    if _has_control_characters(name):
        return [FieldViolation("name", "must not contain control characters")]
    if not is_visible(name):
        return [FieldViolation("name", "must contain a visible character")]
    return []


def _label_violations(labels: Mapping[str, str]) -> list[FieldViolation]:
    violations = []
    if len(labels) > LABELS_MAX:
        violations.append(FieldViolation("labels", f"must have at most {LABELS_MAX} pairs"))
        return violations
    for key, value in labels.items():
        # The error goes into headers, so it repeats the key only if that is short and plain. Other
        # keys could contain anything, even a secret.
        field = f'labels["{key}"]' if _PLAIN_KEY.fullmatch(key) else "labels"
        # Lengths first: searching 4 MiB for control characters would block the event loop.
        if not 1 <= len(key) <= LABEL_KEY_LENGTH_MAX:
            problem = f"its key must have 1-{LABEL_KEY_LENGTH_MAX} characters"
        elif len(value) > LABEL_VALUE_LENGTH_MAX:
            problem = f"must have at most {LABEL_VALUE_LENGTH_MAX} characters"
        elif _has_control_characters(key) or _has_control_characters(value):
            problem = "must not contain control characters"
        else:
            continue
        violations.append(FieldViolation(field, problem))
    return violations


def _has_control_characters(text: str) -> bool:
    """Return whether `text` has control characters, lone surrogates or line separators."""
    return any(unicodedata.category(character) in _CONTROL for character in text)


_CONTROL = frozenset({"Cc", "Cs", "Zl", "Zp"})

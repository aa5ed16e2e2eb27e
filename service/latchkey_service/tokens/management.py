"""Creates, gets and deletes tokens.

Owns the rules of the contract: ids and the wait of a Delete. It contains neither protobuf
(`rpc/token_service.py`), nor SQL (`token_store.py`), nor lists (`listing.py`), nor the later
changes to a token (`lifecycle.py`).
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from latchkey_service.audit.audit_log import AuditContext
from latchkey_service.coherence.ack_rules import NO_ACKNOWLEDGEMENTS
from latchkey_service.coherence.ack_waiter import AckWaiter
from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.errors import (
    AlreadyExists,
    NotConfirmed,
    NotFound,
)
from latchkey_service.lifetime import UNLIMITED, Lifetime
from latchkey_service.secret_format import Keyring, Secret
from latchkey_service.tokens.names import name_key
from latchkey_service.tokens.receipt_table import Deletion
from latchkey_service.tokens.seal import Sealer
from latchkey_service.tokens.token_store import Request, TokenStore
from latchkey_service.tokens.usage_table import CallerUsage, UsageTable
from latchkey_service.tokens.validation import (
    account_violations,
    check,
    expire_time_violations,
    id_violations,
    lifetime_violations,
    networks_in,
    new_token_violations,
    permissions_in,
    rate_limit_in,
    ttl_violations,
)
from latchkey_service.tokens.verdict import Scope, SecretRecord, TokenRecord, TokenSecret

__all__ = ["Created", "NewToken", "Tokens", "new_id"]

# Receipts written at once. Each takes a connection of the pool (`connections.POOL_SIZE_MAX`).
CONFIRMING_MAX = 4
# Crockford's base 32, in ASCII order, so that ids sort like the numbers that they encode.
_BASE32 = "0123456789abcdefghjkmnpqrstvwxyz"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NOT_LIVE = "The account has no live token with this id."


@dataclass(frozen=True, slots=True)
class NewToken:
    """A request to create a token, not validated. At most one of `expire_time`, `ttl` is set."""

    account_id: str
    name: str
    scope: int
    expire_time: datetime | None
    ttl: timedelta | None
    labels: Mapping[str, str]
    description: str = ""
    allowed_networks: Sequence[str] = ()
    permissions: Sequence[str] = ()
    request_id: str = ""
    rate_limit: tuple[int, timedelta, int] | None = None
    """Count, period and burst."""


@dataclass(frozen=True, slots=True)
class Created:
    """A new token, or a new secret of a token. The secret is stored nowhere."""

    record: TokenRecord
    secret: Secret
    receipt: Deletion | None = None
    """None: the call ended no other secret."""


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
        self._sealer = Sealer(keyring.peppers)
        self._ack_waiter = ack_waiter
        self._reads = reads
        self.confirming = asyncio.Semaphore(CONFIRMING_MAX)
        """Hold it while you write receipts. DeleteAll does so too."""
        self._secret_prefix = secret_prefix
        self._now = now
        self._random_bytes = random_bytes

    async def create(self, new: NewToken, audit_context: AuditContext, deadline: float) -> Created:
        """Create a token. Not idempotent. Raises AlreadyExists."""
        created = await self.create_once(new, None, audit_context, deadline)
        assert created is not None, "there is no request id"  # noqa: S101 - for the type checker
        return created

    async def create_once(
        self,
        new: NewToken,
        request: Request | None,
        audit_context: AuditContext,
        deadline: float,
        lifetime: Lifetime = UNLIMITED,
    ) -> Created | None:
        """Create a token; return None if the account has used the request's id.

        Raises AlreadyExists.
        """
        now = self._now()
        name = new.name.strip()
        violations = new_token_violations(
            new.account_id, name, new.scope, new.labels, new.description
        )
        bad_expiry = expire_time_violations(new.expire_time, now)
        expire_time = new.expire_time
        if new.ttl is not None:
            bad_expiry += ttl_violations(new.ttl, now)
            expire_time = None if bad_expiry else now + new.ttl
        field = "expire_time" if new.ttl is None else "ttl"
        violations += bad_expiry or lifetime_violations(field, expire_time, lifetime, now)
        networks = networks_in(new.allowed_networks, violations)
        permissions = permissions_in(new.permissions, violations)
        rate_limit = rate_limit_in(new.rate_limit, violations)
        check(*violations)
        began = await self._reads.begin(deadline)
        minted = self._keyring.mint(self._secret_prefix, self._random_bytes)
        record = TokenRecord(
            new_id(now, self._random_bytes),
            new.account_id,
            name,
            Scope(new.scope),
            now,
            expire_time,
            minted.hint,
            dict(new.labels),
            allowed_networks=networks,
            permissions=permissions,
            description=new.description,
            secrets=(TokenSecret(minted.hint, now, None),),
            rate_limit=rate_limit,
        )
        digest = minted.digest
        secret = SecretRecord(digest.value, digest.pepper_id, None, None, False, None)  # noqa: FBT003 - by position
        try:
            inserted = await self._store.insert_token(
                record,
                name_key(name),
                digest,
                audit_context,
                self._sealer.seal(record, secret),
                self._sealer.seal_token(record, [digest.pepper_id]).seal,
                request,
            )
        except AlreadyExists:
            # A deposed primary may still have a token of this name that is deleted by now.
            _, snapshot = await self._store.get_token(new.account_id, record.id)
            await self._reads.accept(snapshot, began, deadline)
            raise
        return Created(record, minted.secret) if inserted else None

    async def get(self, account_id: str, token_id: str, deadline: float) -> TokenRecord:
        """Return a live token. Raises NotFound."""
        check(*account_violations(account_id), *id_violations(token_id))
        began = await self._reads.begin(deadline)
        record, snapshot = await self._store.get_token(account_id, token_id)
        await self._reads.accept(snapshot, began, deadline)
        if record is None:
            raise NotFound(_NOT_LIVE)
        return record

    async def usage(
        self, table: UsageTable, account_id: str, token_id: str, today: date, deadline: float
    ) -> list[CallerUsage]:
        """Return who used a live token. Raises NotFound."""
        check(*account_violations(account_id), *id_violations(token_id))
        began = await self._reads.begin(deadline)
        callers, snapshot = await table.by_caller(account_id, token_id, today)
        await self._reads.accept(snapshot, began, deadline)
        if callers is None:
            raise NotFound(_NOT_LIVE)
        return callers

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
        Raises NotConfirmed at `wait_until` (seconds on the process's clock): the deletion is
        committed, and deleting the token again returns the receipt.
        """
        check(*account_violations(account_id), *id_violations(token_id))
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
        async with self.confirming:
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


def new_id(now: datetime, random_bytes: Callable[[int], bytes]) -> str:
    """Return a new id: 48 bits of milliseconds and 80 random bits, like UUIDv7 and ULID."""
    milliseconds = (now - _EPOCH) // timedelta(milliseconds=1)
    number = (milliseconds << 80) | int.from_bytes(random_bytes(10))
    return "tok_" + "".join(_BASE32[number >> shift & 31] for shift in range(125, -1, -5))

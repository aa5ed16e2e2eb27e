"""Changes single tokens: Update, Disable, Enable, Rotate, RetireSecrets, and Create with an id.

Owns the rules of these changes. Each one reads the token, computes the new state with new seals
(`changes.py`, `seal.py`), and writes it if nothing has changed meanwhile (`lifecycle_store.py`). A
change that narrows waits as Delete does. Contains neither protobuf nor SQL.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
    NotFound,
    StoreConflict,
)
from latchkey_service.secret_format import Keyring
from latchkey_service.tokens.changes import (
    DECIDING,
    NewValues,
    decides_alike,
    narrows,
    require_new_rules,
    secrets_after,
    updated,
    values_violations,
)
from latchkey_service.tokens.confirmation import Call, Confirmations
from latchkey_service.tokens.lifecycle_store import (
    Change,
    Changed,
    LifecycleStore,
    TokenState,
)
from latchkey_service.tokens.management import Created, NewToken, Tokens
from latchkey_service.tokens.receipt_table import Deletion
from latchkey_service.tokens.seal import Sealer
from latchkey_service.tokens.seal_guard import SealGuard
from latchkey_service.tokens.token_store import Request
from latchkey_service.tokens.validation import (
    account_violations,
    check,
    id_violations,
    name_key,
    request_id_in,
)
from latchkey_service.tokens.verdict import SecretRecord, TokenRecord

__all__ = [
    "GRACE_MAX",
    "REQUEST_AGE_MAX",
    "SECRETS_MAX",
    "Lifecycle",
    "Rotation",
]

SECRETS_MAX = 5
"""Secrets of a token that work at the same time."""
GRACE_MAX = timedelta(days=365)
# A retry of a request with an id counts as one for this long.
REQUEST_AGE_MAX = timedelta(days=1)
# Attempts at a change whose token others change at the same time. Each loser's rival has won, so
# this many other changes of one token have to come in between.
ATTEMPTS_MAX = 20


@dataclass(frozen=True, slots=True)
class Rotation:
    """A request to rotate, not validated."""

    account_id: str
    token_id: str
    grace: timedelta | None
    retire_on_first_use: bool
    request_id: str


class Lifecycle:
    """Changes tokens under this process's lease.

    Every method raises InvalidArgument, NotFound, FailedPrecondition, Overloaded, Unavailable and
    StoreUnavailable. Those that wait raise ChangeNotConfirmed: the change stands.
    """

    def __init__(
        self,
        store: LifecycleStore,
        tokens: Tokens,
        keyring: Keyring,
        guard: SealGuard,
        confirmations: Confirmations,
        reads: LeasedReads,
        secret_prefix: str,
        now: Callable[[], datetime],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._store = store
        self._tokens = tokens
        self._keyring = keyring
        self._sealer: Sealer = guard.sealer
        self._guard = guard
        self._confirmations = confirmations
        self._reads = reads
        self._secret_prefix = secret_prefix
        self._now = now
        self._random_bytes = random_bytes

    async def create(self, new: NewToken, call: Call) -> Created:
        """Create a token. With a request id, a retry replaces the secret of the first attempt.

        Raises AlreadyExists if the name is taken, or if the id was used for another request.
        """
        violations: list[FieldViolation] = []
        request = self._request(new.request_id, "Create", _body(new), violations)
        check(*violations)
        if new.allowed_networks or new.permissions:
            require_new_rules(old_verifiers=await self._store.has_old_verifiers())
        try:
            created = await self._tokens.create_once(
                new, request, call.audit_context, call.deadline
            )
        except AlreadyExists:
            freed = await self._store.free_expired_name(
                new.account_id, name_key(new.name.strip()), self._now()
            )
            if not freed:
                raise
            created = await self._tokens.create_once(
                new, request, call.audit_context, call.deadline
            )
        if created is not None:
            return created
        assert request is not None, "only a request's id can be taken"  # noqa: S101 - for the type checker
        earlier = await self._earlier(new.account_id, request, call)
        if earlier is None:
            # Its token was purged, or a day has passed, since the insertion.
            raise StoreConflict("The request id has just become free; try again.")
        return await self._replace_secret(new.account_id, earlier, request, call)

    async def update(
        self, account_id: str, token_id: str, new: NewValues, call: Call
    ) -> tuple[TokenRecord, Deletion | None]:
        """Set fields of a token. Returns a receipt if that may have narrowed it.

        Raises AlreadyExists if another live token has the new name.
        """
        check(
            *account_violations(account_id),
            *id_violations(token_id),
            *values_violations(new, self._now()),
        )

        def change(state: TokenState) -> Change | None:
            record = updated(state.record, new)
            if record == state.record:
                return None
            if record.allowed_networks or record.permissions:
                require_new_rules(old_verifiers=state.old_verifiers)
            # An expired token may have lost its name, and gets it back.
            names[:] = [name_key(record.name)] if naming else []
            return self._keeping_secrets(state, record, *names)

        naming = not {"name", "expire_time"}.isdisjoint(new.paths)
        names: list[str] = []
        try:
            done = await self._change(account_id, token_id, change, call)
        except AlreadyExists:
            if not await self._store.free_expired_name(account_id, names[0], self._now()):
                raise
            done = await self._change(account_id, token_id, change, call)
        before, after = done.before.record, done.record
        widens = not decides_alike(before, after) and not narrows(before, after)
        if widens or DECIDING.isdisjoint(new.paths):
            self._confirmations.announce(done.changed.position)
            return after, None
        return after, await self._receipt(done, call)

    async def disable(
        self, account_id: str, token_id: str, call: Call
    ) -> tuple[TokenRecord, Deletion]:
        """Refuse all secrets of a token until `enable`. Idempotent."""
        check(*account_violations(account_id), *id_violations(token_id))

        def change(state: TokenState) -> Change | None:
            if state.record.disable_time is not None:
                return None
            require_new_rules(old_verifiers=state.old_verifiers)
            return self._keeping_secrets(state, state.record._replace(disable_time=self._now()))

        done = await self._change(account_id, token_id, change, call)
        return done.record, await self._receipt(done, call)

    async def enable(self, account_id: str, token_id: str, call: Call) -> TokenRecord:
        """End a `disable`. Idempotent; does not wait."""
        check(*account_violations(account_id), *id_violations(token_id))

        def change(state: TokenState) -> Change | None:
            if state.record.disable_time is None:
                return None
            return self._keeping_secrets(state, state.record._replace(disable_time=None))

        done = await self._change(account_id, token_id, change, call)
        self._confirmations.announce(done.changed.position)
        return done.record

    async def rotate(self, rotation: Rotation, call: Call) -> Created:
        """Give a token a new secret, and end the older ones now, after a grace, or on first use.

        With a request id, a retry replaces the secret of the first attempt. Raises AlreadyExists if
        the id was used for another request.
        """
        violations = [*account_violations(rotation.account_id), *id_violations(rotation.token_id)]
        if rotation.grace is not None and not timedelta(0) <= rotation.grace <= GRACE_MAX:
            violations.append(FieldViolation("grace", f"must be 0 to {GRACE_MAX.days} days"))
        request = self._request(rotation.request_id, "Rotate", _body(rotation), violations)
        check(*violations)
        if request is not None:
            earlier = await self._earlier(rotation.account_id, request, call)
            if earlier is not None:
                return await self._replace_secret(rotation.account_id, earlier, request, call)
        grace = rotation.grace
        if grace is None and not rotation.retire_on_first_use:
            grace = timedelta(0)

        def limited(secret: SecretRecord, now: datetime) -> SecretRecord:
            if grace is None:
                return secret
            end = now + grace
            if secret.expire_time is not None:
                end = min(end, secret.expire_time)
            return secret._replace(expire_time=end)

        def change(state: TokenState) -> Change | None:
            require_new_rules(old_verifiers=state.old_verifiers)
            now = self._now()
            older = [limited(secret.record, now) for secret in state.secrets]
            kept = [s for s in older if s.expire_time is None or s.expire_time > now]
            if len(kept) >= SECRETS_MAX:
                raise FailedPrecondition(
                    f"The token would have more than {SECRETS_MAX} secrets that work. Retire some "
                    "first.",
                    "TOO_MANY_SECRETS",
                )
            retired = [s.digest for s in older if s not in kept]
            return self._minting(
                state, kept, retired, request, retire_on_first_use=rotation.retire_on_first_use
            )

        try:
            done = await self._change(rotation.account_id, rotation.token_id, change, call)
        except StoreConflict:
            # A concurrent call with the same request id may be what came in between.
            if request is None:
                raise
            earlier = await self._earlier(rotation.account_id, request, call)
            if earlier is None:
                raise
            return await self._replace_secret(rotation.account_id, earlier, request, call)
        return await self._minted(done, call)

    async def retire_secrets(
        self, account_id: str, token_id: str, call: Call
    ) -> tuple[TokenRecord, Deletion]:
        """End all secrets of a token except the newest. Idempotent."""
        check(*account_violations(account_id), *id_violations(token_id))

        def change(state: TokenState) -> Change | None:
            return self._retiring(state, state.newest_ordinal)

        done = await self._change(account_id, token_id, change, call)
        return done.record, await self._receipt(done, call)

    async def retire_older(self, account_id: str, token_id: str, digest: bytes, call: Call) -> None:
        """End the secrets that are older than the one with this digest, without waiting."""

        def change(state: TokenState) -> Change | None:
            ordinals = [s.ordinal for s in state.secrets if s.record.digest == digest]
            # It may have been retired meanwhile.
            return self._retiring(state, ordinals[0]) if ordinals else None

        done = await self._change(account_id, token_id, change, call)
        self._confirmations.announce(done.changed.position)

    async def _replace_secret(
        self, account_id: str, token_id: str, request: Request, call: Call
    ) -> Created:
        """Answer a repeated request: end the secret that it made before, and make another one."""

        def change(state: TokenState) -> Change | None:
            require_new_rules(old_verifiers=state.old_verifiers)
            lost = [s.record for s in state.secrets if s.request_id == request.id]
            kept = [s.record for s in state.secrets if s.request_id != request.id]
            return self._minting(
                state,
                kept,
                [secret.digest for secret in lost],
                request,
                retire_on_first_use=any(secret.retire_on_first_use for secret in lost),
            )

        return await self._minted(await self._change(account_id, token_id, change, call), call)

    async def _minted(self, done: "_Done", call: Call) -> Created:
        assert done.change is not None, "a secret was made"  # noqa: S101 - for the type checker
        assert done.change.text is not None, "a secret was made"  # noqa: S101 - for the type checker
        return Created(done.record, done.change.text, await self._receipt(done, call))

    async def _change(
        self,
        account_id: str,
        token_id: str,
        change: Callable[[TokenState], Change | None],
        call: Call,
    ) -> "_Done":
        """Make a change. `change` computes it from the present state, or returns None.

        None: there is nothing to do. What is returned then has the position of the read that shows
        it, which covers all earlier changes.
        """
        for _ in range(ATTEMPTS_MAX):
            began = await self._reads.begin(call.deadline)
            state, snapshot = await self._store.read_state(account_id, token_id)
            await self._reads.accept(snapshot, began, call.deadline)
            if state is None:
                raise NotFound("The account has no live token with this id.")
            wanted = change(state)
            if wanted is None:
                return _Done(
                    state, None, Changed(snapshot.position, self._now(), None), state.record
                )
            changed = await self._store.change(wanted, call.audit_context)
            if changed is not None and changed.record is not None:
                secrets = secrets_after(state, wanted, changed.moment)
                return _Done(state, wanted, changed, changed.record._replace(secrets=secrets))
        raise StoreConflict("Others keep changing this token; try again shortly.")

    async def _receipt(self, done: "_Done", call: Call) -> Deletion:
        changed = done.changed
        return await self._confirmations.receipt(changed.position, changed.moment, call)

    def _request(
        self, request_id: str, method: str, body: bytes, violations: list[FieldViolation]
    ) -> Request | None:
        """Return the request, or None without an id. Adds to `violations`."""
        number = request_id_in(request_id, violations)
        now = self._now()
        return None if number is None else Request(number, method, body, now, now - REQUEST_AGE_MAX)

    async def _earlier(self, account_id: str, request: Request, call: Call) -> str | None:
        """Return the id of the token that an earlier attempt of a request concerned, or None.

        Raises AlreadyExists if the id was used for another request.
        """
        began = await self._reads.begin(call.deadline)
        stored, snapshot = await self._store.get_request(account_id, request)
        await self._reads.accept(snapshot, began, call.deadline)
        if stored is None:
            return None
        if (stored.method, stored.body) != (request.method, request.body):
            raise AlreadyExists(
                "The account has used this request id for another request.", "REQUEST_ID_REUSED"
            )
        return stored.token_id

    def _keeping_secrets(
        self, state: TokenState, record: TokenRecord, key: str | None = None
    ) -> Change:
        """Return the change to `record`, with new seals for all secrets."""
        return Change(
            record,
            key,
            state.version,
            self._resealed(state, record, [secret.record for secret in state.secrets]),
        )

    def _retiring(self, state: TokenState, ordinal: int) -> Change | None:
        """Return the change that ends the secrets older than that with `ordinal`."""
        older = [s.record.digest for s in state.secrets if s.ordinal < ordinal]
        if not older:
            return None
        require_new_rules(old_verifiers=state.old_verifiers)
        return Change(state.record, None, state.version, (), older)

    def _minting(
        self,
        state: TokenState,
        kept: Sequence[SecretRecord],
        retired: Sequence[bytes],
        request: Request | None,
        *,
        retire_on_first_use: bool,
    ) -> Change:
        """Return the change that makes a new secret and ends those in `retired`."""
        minted = self._keyring.mint(self._secret_prefix, self._random_bytes)
        digest, record = minted.digest, state.record
        secret = SecretRecord(digest.value, digest.pepper_id, None, None, retire_on_first_use, None)
        return Change(
            record,
            None,
            state.version,
            self._resealed(state, record, kept),
            retired,
            secret._replace(seal=self._sealer.seal(record, secret)),
            minted.hint,
            self._now(),
            state.newest_ordinal + 1,
            request,
            minted.secret,
        )

    def _resealed(
        self, state: TokenState, record: TokenRecord, secrets: Sequence[SecretRecord]
    ) -> list[SecretRecord]:
        """Return the secrets with seals for `record`.

        Raises FailedPrecondition if a present seal is wrong: a new one would make genuine what
        somebody else has written into the row.
        """
        if not all(self._guard.trusts(state.record, stored.record) for stored in state.secrets):
            raise FailedPrecondition(
                "The token's row was changed outside of Latchkey, or this server lacks its pepper. "
                "Delete the token and create another one.",
                "TOKEN_SEAL_INVALID",
            )
        return [secret._replace(seal=self._sealer.seal(record, secret)) for secret in secrets]


class _Done(NamedTuple):
    """A change that was made, or was not necessary."""

    before: TokenState
    change: Change | None
    changed: Changed
    record: TokenRecord
    """The token afterwards."""


def _body(request: NewToken | Rotation) -> bytes:
    """Return a hash of a request's fields except its id."""
    fields = asdict(request) | {"request_id": None}
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

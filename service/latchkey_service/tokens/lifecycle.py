"""Changes single tokens: Update, Disable, Enable, Rotate, RetireSecrets, and Create with an id.

Owns the rules of these changes. Each one reads the token, computes the new state with new seals
(`changes.py`, `seal.py`), and writes it if nothing has changed meanwhile (`lifecycle_store.py`). A
change that narrows waits as Delete does. Contains neither protobuf nor SQL.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta

from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.coherence.verifier_table import RATE_RULES
from latchkey_service.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
)
from latchkey_service.lifetime import UNLIMITED, Lifetime
from latchkey_service.secret_format import Keyring
from latchkey_service.tokens.changes import (
    DECIDING,
    NewValues,
    decides_alike,
    narrows,
    require_new_rules,
    updated,
    values_violations,
)
from latchkey_service.tokens.confirmation import Call, Confirmations
from latchkey_service.tokens.lifecycle_store import (
    Change,
    LifecycleStore,
    TokenState,
)
from latchkey_service.tokens.management import Created, NewToken, Tokens
from latchkey_service.tokens.names import name_key
from latchkey_service.tokens.receipt_table import Deletion
from latchkey_service.tokens.seal import SealGuard
from latchkey_service.tokens.token_changer import ATTEMPTS_MAX, Done, TokenChanger, conflict
from latchkey_service.tokens.token_store import Request
from latchkey_service.tokens.validation import (
    account_violations,
    check,
    grace_violations,
    id_violations,
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
# More labels, networks or permissions than any valid request has.
LISTED_MAX = 100
# A retry of a request with an id counts as one for this long.
REQUEST_AGE_MAX = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Rotation:
    """A request to rotate, not validated."""

    account_id: str
    token_id: str
    grace: timedelta | None
    retire_on_first_use: bool
    request_id: str


class Lifecycle(TokenChanger):
    """Changes tokens under this process's lease.

    Every method raises InvalidArgument, NotFound, FailedPrecondition, Overloaded, Unavailable and
    StoreUnavailable. Those that wait raise ChangeNotConfirmed: the change is committed.
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
        lifetime: Lifetime = UNLIMITED,
    ) -> None:
        super().__init__(
            store, keyring, guard, confirmations, reads, secret_prefix, now, random_bytes
        )
        self._tokens = tokens
        self._lifetime = lifetime

    def lifetime(self, account_id: str, call: Call) -> Lifetime:
        """Return the limit for tokens of an account: the stricter of settings and policy."""
        check(*account_violations(account_id))
        return self._lifetime.stricter(call.lifetime)

    async def create(self, new: NewToken, call: Call) -> Created:
        """Create a token. With a request id, a retry replaces the secret of the first attempt.

        Raises AlreadyExists if the name is taken, or if the id was used for another request.
        """
        violations: list[FieldViolation] = []
        request = self._request(new, "Create", violations)
        check(*violations)
        if new.allowed_networks or new.permissions:
            require_new_rules(old_verifiers=await self._store.has_old_verifiers())
        await self._require_rate_rules(new.rate_limit)
        lifetime = self._lifetime.stricter(call.lifetime)
        try:
            created = await self._tokens.create_once(
                new, request, call.audit_context, call.deadline, lifetime
            )
        except AlreadyExists:
            freed = await self._store.free_expired_name(
                new.account_id, name_key(new.name.strip()), self._now(), call.audit_context
            )
            if not freed:
                raise
            created = await self._tokens.create_once(
                new, request, call.audit_context, call.deadline, lifetime
            )
        if created is not None:
            call.on_commit(created.record.id)
            return created
        assert request is not None, "only a request's id can be taken"  # noqa: S101 - for the type checker
        earlier = await self._earlier(new.account_id, request, call)
        if earlier is None:
            # Its token was purged, or a day has passed, since the insertion.
            raise conflict()
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
            *values_violations(new, self._now(), self._lifetime.stricter(call.lifetime)),
        )
        if "rate_limit" in new.paths:
            await self._require_rate_rules(new.rate_limit)

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
            if not await self._store.free_expired_name(
                account_id, names[0], self._now(), call.audit_context
            ):
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
        elif rotation.grace is not None:
            violations += grace_violations(rotation.grace, self._lifetime.stricter(call.lifetime))
        request = self._request(rotation, "Rotate", violations)
        check(*violations)
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
            _require_room(kept, now)
            retired = [s.digest for s in older if s not in kept]
            return self._minting(
                state, kept, retired, request, retire_on_first_use=rotation.retire_on_first_use
            )

        for _ in range(ATTEMPTS_MAX):
            # Each time: a concurrent call with the same id may be what came in between.
            if request is not None and (
                earlier := await self._earlier(rotation.account_id, request, call)
            ):
                return await self._replace_secret(rotation.account_id, earlier, request, call)
            done = await self._attempt(rotation.account_id, rotation.token_id, change, call)
            if done is not None:
                return await self._minted(done, call)
        raise conflict()

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
            ordinals = [s.record.ordinal for s in state.secrets if s.record.digest == digest]
            # It may have been retired meanwhile.
            return self._retiring(state, ordinals[0]) if ordinals else None

        done = await self._change(account_id, token_id, change, call)
        self._confirmations.announce(done.changed.position)

    async def _require_rate_rules(self, asked: object) -> None:
        """Raise FailedPrecondition if a verifier would not respect the rate limit that is asked."""
        if asked is not None:
            old_verifiers = await self._store.has_old_verifiers(RATE_RULES)
            require_new_rules(old_verifiers=old_verifiers)

    async def _replace_secret(
        self, account_id: str, token_id: str, request: Request, call: Call
    ) -> Created:
        """Answer a repeated request: end the secret that it made before, and make another one."""

        def change(state: TokenState) -> Change | None:
            require_new_rules(old_verifiers=state.old_verifiers)
            lost = [s.record for s in state.secrets if s.request_id == request.id]
            kept = [s.record for s in state.secrets if s.request_id != request.id]
            # The lost secret may have been retired meanwhile, and then makes no room.
            _require_room(kept, self._now())
            made = self._minting(
                state,
                kept,
                [secret.digest for secret in lost],
                request,
                retire_on_first_use=any(secret.retire_on_first_use for secret in lost),
            )
            return replace(made, repeats=True)

        return await self._minted(await self._change(account_id, token_id, change, call), call)

    async def _minted(self, done: "Done", call: Call) -> Created:
        assert done.change is not None, "a secret was made"  # noqa: S101 - for the type checker
        assert done.change.text is not None, "a secret was made"  # noqa: S101 - for the type checker
        return Created(done.record, done.change.text, await self._receipt(done, call))

    def _request(
        self, fields: NewToken | Rotation, method: str, violations: list[FieldViolation]
    ) -> Request | None:
        """Return the request, or None without an id. Adds to `violations`."""
        request_id = request_id_in(fields.request_id, violations)
        if request_id is None:
            return None
        now = self._now()
        return Request(request_id, method, _body(fields), now, now - REQUEST_AGE_MAX)

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


def _body(request: NewToken | Rotation) -> bytes:
    """Return a hash of a request's fields except its id."""
    if isinstance(request, NewToken) and (
        max(map(len, (request.labels, request.allowed_networks, request.permissions))) > LISTED_MAX
    ):
        # Too many to be valid, and too many to copy. The request is refused later.
        return b""
    fields = asdict(request) | {"request_id": None}
    if fields.get("rate_limit") is None:
        # A retry may reach a server of an earlier release, whose requests lack this field.
        fields.pop("rate_limit", None)
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _require_room(kept: Sequence[SecretRecord], now: datetime) -> None:
    """Raise FailedPrecondition if another secret would be one too many."""
    working = [s for s in kept if s.expire_time is None or s.expire_time > now]
    if len(working) >= SECRETS_MAX:
        raise FailedPrecondition(
            f"The token would have more than {SECRETS_MAX} secrets that work. Retire some first.",
            "TOO_MANY_SECRETS",
        )

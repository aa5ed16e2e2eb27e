"""Changes one token: reads it, seals its new state, and writes that if nothing changed meanwhile.

The rules of each change are in `lifecycle.py`, the statements in `lifecycle_store.py`.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import NamedTuple

from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.errors import FailedPrecondition, NotFound, StoreConflict
from latchkey_service.secret_format import Keyring
from latchkey_service.tokens.changes import require_new_rules, secrets_after
from latchkey_service.tokens.confirmation import Call, Confirmations
from latchkey_service.tokens.lifecycle_store import Change, Changed, LifecycleStore, TokenState
from latchkey_service.tokens.receipt_table import Deletion
from latchkey_service.tokens.seal import Sealer, SealGuard, TokenSeal
from latchkey_service.tokens.token_store import Request
from latchkey_service.tokens.verdict import SecretRecord, TokenRecord

__all__ = ["ATTEMPTS_MAX", "Done", "TokenChanger", "conflict"]

# Attempts at a change whose token others change at the same time. Each loser's rival has won, so
# this many other changes of one token have to come in between.
ATTEMPTS_MAX = 20


class Done(NamedTuple):
    """A change that was made, or was not necessary."""

    before: TokenState
    change: Change | None
    changed: Changed
    record: TokenRecord
    """The token afterwards."""


class TokenChanger:
    """Changes tokens under this process's lease, one at a time."""

    def __init__(
        self,
        store: LifecycleStore,
        keyring: Keyring,
        guard: SealGuard,
        confirmations: Confirmations,
        reads: LeasedReads,
        secret_prefix: str,
        now: Callable[[], datetime],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._store = store
        self._keyring = keyring
        self._sealer: Sealer = guard.sealer
        self._guard = guard
        self._confirmations = confirmations
        self._reads = reads
        self._secret_prefix = secret_prefix
        self._now = now
        self._random_bytes = random_bytes

    async def _change(
        self,
        account_id: str,
        token_id: str,
        change: Callable[[TokenState], Change | None],
        call: Call,
    ) -> "Done":
        """Make a change, again if others change the token meanwhile. See `_attempt`."""
        for _ in range(ATTEMPTS_MAX):
            if (done := await self._attempt(account_id, token_id, change, call)) is not None:
                return done
        raise conflict()

    async def _attempt(
        self,
        account_id: str,
        token_id: str,
        change: Callable[[TokenState], Change | None],
        call: Call,
    ) -> "Done | None":
        """Make a change; return None if others have changed the token meanwhile.

        `change` computes it from the present state, or returns None if there is nothing to do. What
        is returned then carries the position of the read that shows it, which covers all earlier
        changes.
        """
        began = await self._reads.begin(call.deadline)
        state, snapshot = await self._store.read_state(account_id, token_id)
        await self._reads.accept(snapshot, began, call.deadline)
        if state is None:
            raise NotFound("The account has no live token with this id.")
        wanted = change(state)
        if wanted is None:
            # An earlier call may have made the change, and failed because no standby has it.
            await self._confirmations.settle(snapshot.position)
            unchanged = Changed(snapshot.position, self._now(), None)
            return Done(state, None, unchanged, state.record)
        changed = await self._store.change(wanted, call.audit_context)
        if changed is None or changed.record is None:
            return None
        call.on_commit(token_id)
        record = changed.record._replace(
            secrets=secrets_after(state, wanted, changed.moment),
            last_used_time=state.record.last_used_time,
            last_used_by=state.record.last_used_by,
        )
        return Done(state, wanted, changed, record)

    async def _receipt(self, done: "Done", call: Call) -> Deletion:
        changed = done.changed
        return await self._confirmations.receipt(changed.position, changed.moment, call)

    def _keeping_secrets(
        self, state: TokenState, record: TokenRecord, key: str | None = None
    ) -> Change:
        """Return the change to `record`, with new seals for the token and all secrets."""
        kept = self._resealed(state, record, [secret.record for secret in state.secrets])
        return Change(record, key, state.version, self._token_seal(state, record), kept)

    def _retiring(self, state: TokenState, ordinal: int) -> Change | None:
        """Return the change that ends the secrets older than the one with `ordinal`.

        Raises FailedPrecondition like `_require_genuine`.
        """
        # Otherwise, someone who swaps the ordinals of two secrets could make the wrong one end.
        self._require_genuine(state)
        older = [s.record.digest for s in state.secrets if s.record.ordinal < ordinal]
        if not older:
            return None
        require_new_rules(old_verifiers=state.old_verifiers)
        return Change(state.record, None, state.version, None, (), older)

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
        ordinal = state.newest_ordinal + 1
        secret = SecretRecord(
            digest.value, digest.pepper_id, None, None, retire_on_first_use, None, ordinal
        )
        return Change(
            record,
            None,
            state.version,
            self._token_seal(state, record, digest.pepper_id),
            self._resealed(state, record, kept),
            retired,
            secret._replace(seal=self._sealer.seal(record, secret)),
            minted.hint,
            self._now(),
            request,
            text=minted.secret,
        )

    def _resealed(
        self, state: TokenState, record: TokenRecord, secrets: Sequence[SecretRecord]
    ) -> list[SecretRecord]:
        """Return the secrets with seals for `record`. Raises FailedPrecondition.

        Checks the old seals first. Otherwise, the new seals would also cover changes that someone
        else has written into the row.
        """
        self._require_genuine(state)
        return [secret._replace(seal=self._sealer.seal(record, secret)) for secret in secrets]

    def _require_genuine(self, state: TokenState) -> None:
        """Raise FailedPrecondition if a seal of the token or of a secret is wrong or missing."""
        present = [stored.record for stored in state.secrets]
        if not self._guard.trusts_token(state.record, state.seal, present):
            raise FailedPrecondition(
                "The token's row was changed outside of Latchkey, or this server lacks its pepper. "
                "Delete the token and create another one.",
                "TOKEN_SEAL_INVALID",
            )

    def _token_seal(
        self, state: TokenState, record: TokenRecord, minted_pepper_id: str | None = None
    ) -> TokenSeal:
        """Return the seal of the token's row, with the pepper of its newest secret if possible.

        So a host that may drop a pepper, because no secret of a live token needs it, can still
        check the seal.
        """
        peppers = [stored.record.pepper_id for stored in state.secrets]
        newest = minted_pepper_id or state.newest_pepper_id
        return self._sealer.seal_token(record, [newest, *peppers, *self._guard.pepper_ids])


def conflict() -> StoreConflict:
    """Return the error for a token that others keep changing."""
    return StoreConflict("Others keep changing this token; try again shortly.")

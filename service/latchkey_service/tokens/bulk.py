"""Ends many tokens or secrets at once: RevokeSecret and DeleteAll.

Owns the rules of these calls. Contains neither protobuf nor SQL (`bulk_store.py`).
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.errors import FieldViolation
from latchkey_service.secret_format import SECRET_LENGTH_MAX, Keyring, Malformed
from latchkey_service.tokens.bulk_store import BulkStore
from latchkey_service.tokens.changes import require_new_rules
from latchkey_service.tokens.confirmation import Call, Confirmations
from latchkey_service.tokens.filters import Filter, filter_violations, folded
from latchkey_service.tokens.lifecycle_store import LifecycleStore
from latchkey_service.tokens.receipt_table import Deletion
from latchkey_service.tokens.validation import account_violations, check
from latchkey_service.tokens.verdict import TokenRecord

__all__ = ["DELETED_MAX", "LISTED_MAX", "REVOKED_MAX", "Bulk", "Deletions", "Outcome"]

REVOKED_MAX = 1_000
"""Secrets in a call of RevokeSecret."""
DELETED_MAX = 1_000
"""Tokens that one call of DeleteAll deletes. Other Deletes wait meanwhile, some 0.3 s."""
LISTED_MAX = 500
"""Tokens that a dry run lists, as many as a page of List."""


class Outcome(enum.IntEnum):
    """What RevokeSecret did with a secret, numbered as in the contract."""

    ENDED = 1
    ENDED_BEFORE = 2
    UNKNOWN = 3
    MALFORMED = 4


@dataclass(frozen=True, slots=True)
class Deletions:
    """What DeleteAll has deleted, or would delete."""

    count: int
    records: Sequence[TokenRecord]
    """Of a dry run."""
    receipt: Deletion | None
    more: bool


class Bulk:
    """Changes many tokens under this process's lease.

    Every method raises InvalidArgument, Overloaded, Unavailable and StoreUnavailable. Those that
    wait raise ChangeNotConfirmed: the change stands.
    """

    def __init__(
        self,
        store: BulkStore,
        lifecycle_store: LifecycleStore,
        keyring: Keyring,
        confirmations: Confirmations,
        reads: LeasedReads,
        now: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._lifecycle_store = lifecycle_store
        self._keyring = keyring
        self._confirmations = confirmations
        self._reads = reads
        self._now = now

    async def revoke_secrets(
        self, secrets: Sequence[str], call: Call
    ) -> tuple[list[Outcome], Deletion | None]:
        """End secrets by possession, under one revision. Idempotent.

        Returns the outcomes in order, and a receipt if any secret belongs to a token. Raises
        FailedPrecondition while a server of an earlier release runs.
        """
        if not 1 <= len(secrets) <= REVOKED_MAX:
            check(FieldViolation("secrets", f"must have 1-{REVOKED_MAX} entries"))
        parsed = [self._parse(secret) for secret in secrets]
        digests = list(dict.fromkeys(digest for digest in parsed if isinstance(digest, bytes)))
        if not digests:
            return [one for one in parsed if isinstance(one, Outcome)], None
        require_new_rules(old_verifiers=await self._lifecycle_store.has_old_verifiers())
        began = await self._reads.begin(call.deadline)
        changed, ended, audited = await self._store.revoke_secrets(
            digests, self._now(), call.audit_context
        )
        if audited:
            call.on_commit("")
        if changed is None or len(ended) < len(digests):
            # A deposed primary must not report that a leaked secret never existed, or has ended.
            known, snapshot = await self._store.find_secrets(digests)
            await self._reads.accept(snapshot, began, call.deadline)
            ended = dict.fromkeys(known, False) | ended
            position, moment = snapshot.position, self._now()
        else:
            position, moment = changed.position, changed.moment
        outcomes = [
            one
            if isinstance(one, Outcome)
            else Outcome.UNKNOWN
            if one not in ended
            else Outcome.ENDED
            if ended[one]
            else Outcome.ENDED_BEFORE
            for one in parsed
        ]
        if not ended:
            return outcomes, None
        return outcomes, await self._confirmations.receipt(position, moment, call)

    async def delete_all(
        self, account_id: str, selected: Filter, call: Call, *, dry_run: bool
    ) -> Deletions:
        """Delete the oldest live tokens that match, up to `DELETED_MAX`, under one revision.

        Idempotent. With `dry_run`, returns what would be deleted.
        """
        check(*account_violations(account_id), *filter_violations(selected))
        selected = folded(selected)
        began = await self._reads.begin(call.deadline)
        now = self._now()
        if dry_run:
            count, records, snapshot = await self._store.count_matching(
                account_id, selected, now, LISTED_MAX
            )
            await self._reads.accept(snapshot, began, call.deadline)
            return Deletions(count, records, None, more=count > DELETED_MAX)
        changed, ids = await self._store.delete_matching(
            account_id, selected, now, DELETED_MAX, call.audit_context
        )
        if changed is None:
            # Covers the deletions of an earlier attempt whose response was lost.
            snapshot = await self._store.position()
            await self._reads.accept(snapshot, began, call.deadline)
            receipt = await self._confirmations.receipt(snapshot.position, now, call)
            return Deletions(0, (), receipt, more=False)
        call.on_commit("")
        acknowledgements = await self._confirmations.wait(changed.position, call)
        if acknowledgements is None:
            receipt = Deletion(changed.position, changed.moment, None, 0, 0, 0, 0)
        else:
            receipt = await self._store.confirm_deletions(ids, changed.position, acknowledgements)
        return Deletions(len(ids), (), receipt, more=len(ids) == DELETED_MAX)

    def _parse(self, secret: str) -> bytes | Outcome:
        # Longer texts are not secrets, and searching them would take time.
        if len(secret) > SECRET_LENGTH_MAX:
            return Outcome.MALFORMED
        try:
            digest = self._keyring.digest_of(secret)
        except Malformed:
            return Outcome.MALFORMED
        return Outcome.UNKNOWN if digest is None else digest

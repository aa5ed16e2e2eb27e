"""Ends or marks many tokens or secrets at once: RevokeSecret, ReportSecret and DeleteAll.

Owns the rules of these calls. Contains neither protobuf nor SQL (`bulk_store.py`).
"""

import asyncio
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.errors import FieldViolation
from latchkey_service.secret_format import IMPORTED_LENGTH_MAX, Keyring, Malformed
from latchkey_service.tokens.answer_size import fitting
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
"""Secrets in a call of RevokeSecret or ReportSecret."""
DELETED_MAX = 1_000
"""Tokens that one call of DeleteAll deletes. Other Deletes wait meanwhile, about 0.3 s."""
LISTED_MAX = 500
"""Tokens that a dry run lists, as many as a page of List."""


class Outcome(enum.IntEnum):
    """What RevokeSecret or ReportSecret did with a secret, numbered as in the contract."""

    ENDED = 1
    ENDED_BEFORE = 2
    UNKNOWN = 3
    MALFORMED = 4
    REPORTED = 5


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
    wait raise ChangeNotConfirmed: the change is committed.
    """

    def __init__(
        self,
        store: BulkStore,
        lifecycle_store: LifecycleStore,
        keyring: Keyring,
        confirmations: Confirmations,
        reads: LeasedReads,
        now: Callable[[], datetime],
        confirming: asyncio.Semaphore,
    ) -> None:
        self._store = store
        self._lifecycle_store = lifecycle_store
        self._keyring = keyring
        self._confirmations = confirmations
        self._reads = reads
        self._now = now
        # Shared with Delete: its receipts need the same connections.
        self._confirming = confirming

    async def revoke_secrets(
        self, secrets: Sequence[str], call: Call
    ) -> tuple[list[Outcome], Deletion | None]:
        """End secrets by possession, under one revision. Idempotent.

        Returns the outcomes in order, and a receipt if any secret belongs to a token. Raises
        FailedPrecondition while a server of an earlier release runs.
        """
        parsed, digests = self._digests_of(secrets)
        if not digests:
            return _outcomes(parsed, {}, Outcome.ENDED), None
        require_new_rules(old_verifiers=await self._lifecycle_store.has_old_verifiers())
        began = await self._reads.begin(call.deadline)
        changed, ended, audited = await self._store.revoke_secrets(
            digests, self._now(), call.audit_context
        )
        if audited:
            call.on_commit("")
        if changed is None or not all(
            isinstance(one, Outcome) or any(d in ended for d in one) for one in parsed
        ):
            # A deposed primary must not report that a leaked secret never existed, or has ended.
            known, snapshot = await self._store.find_secrets(digests)
            await self._reads.accept(snapshot, began, call.deadline)
            ended = dict.fromkeys(known, False) | ended
            if ended:
                await self._confirmations.settle(snapshot.position)
            position, moment = snapshot.position, self._now()
        else:
            position, moment = changed.position, changed.moment
        outcomes = _outcomes(parsed, ended, Outcome.ENDED)
        if not ended:
            return outcomes, None
        return outcomes, await self._confirmations.receipt(position, moment, call)

    async def report_secrets(self, secrets: Sequence[str], call: Call) -> list[Outcome]:
        """Mark secrets as leaked, without ending them; return the outcomes in order. Idempotent."""
        parsed, digests = self._digests_of(secrets)
        found: dict[bytes, bool] = {}
        if digests:
            began = await self._reads.begin(call.deadline)
            found, audited, snapshot = await self._store.report_secrets(
                digests, self._now(), call.audit_context
            )
            if audited:
                call.on_commit("")
            await self._reads.accept(snapshot, began, call.deadline)
            if False in found.values():
                # Nobody looks again for a leaked secret that has ended.
                await self._confirmations.settle(snapshot.position)
        return _outcomes(parsed, found, Outcome.REPORTED)

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
            count, ids = await self._find(account_id, selected, now, LISTED_MAX, call, whole=True)
            records, snapshot = await self._store.get_tokens(account_id, ids)
            await self._reads.accept(snapshot, began, call.deadline)
            listed = records[: fitting(records)]
            return Deletions(count, listed, None, more=count > DELETED_MAX)
        _, found = await self._find(account_id, selected, now, DELETED_MAX, call)
        changed, ids = await self._store.delete_matching(
            account_id, selected, now, found, call.audit_context
        )
        if changed is None:
            # Covers the deletions of an earlier attempt whose response was lost.
            snapshot = await self._store.position()
            await self._reads.accept(snapshot, began, call.deadline)
            await self._confirmations.settle(snapshot.position)
            receipt = await self._confirmations.receipt(snapshot.position, now, call)
            return Deletions(0, (), receipt, more=False)
        call.on_commit("")
        acknowledgements = await self._confirmations.wait(changed.position, call)
        if acknowledgements is None:
            receipt = Deletion(changed.position, changed.moment, None, 0, 0, 0, 0)
        else:
            async with self._confirming:
                receipt = await self._store.confirm_deletions(
                    ids, changed.position, acknowledgements
                )
        return Deletions(len(ids), (), receipt, more=len(found) == DELETED_MAX)

    async def _find(
        self,
        account_id: str,
        selected: Filter,
        now: datetime,
        limit: int,
        call: Call,
        *,
        whole: bool = False,
    ) -> tuple[int, list[str]]:
        """Return the ids of the oldest `limit` tokens that match, and how many match.

        Stops once it has found `limit` tokens, unless it counts the `whole` account. Reads the
        account in steps, so that no statement takes long. Raises Unavailable at the deadline.
        """
        count, ids, after = 0, list[str](), None
        while True:
            began = await self._reads.begin(call.deadline)
            scan, snapshot = await self._store.scan(
                account_id, selected, now, after, limit - len(ids)
            )
            await self._reads.accept(snapshot, began, call.deadline)
            count += scan.matching
            ids += scan.ids
            after = scan.next
            if after is None or (len(ids) == limit and not whole):
                return count, ids

    def _digests_of(
        self, secrets: Sequence[str]
    ) -> tuple[list[tuple[bytes, ...] | Outcome], list[bytes]]:
        """Return the possible digests of each text, or why it has none, and the distinct ones."""
        if not 1 <= len(secrets) <= REVOKED_MAX:
            check(FieldViolation("secrets", f"must have 1-{REVOKED_MAX} entries"))
        parsed = [self._parse(secret) for secret in secrets]
        return parsed, list(
            dict.fromkeys(d for one in parsed if isinstance(one, tuple) for d in one)
        )

    def _parse(self, secret: str) -> tuple[bytes, ...] | Outcome:
        """Return the possible digests of a secret, or what is wrong with it."""
        # Longer texts are not secrets, and searching them would take time.
        if len(secret) > IMPORTED_LENGTH_MAX:
            return Outcome.MALFORMED
        try:
            digest = self._keyring.digest_of(secret)
        except Malformed:
            return self._keyring.imported_digests_of(secret) or Outcome.MALFORMED
        return Outcome.UNKNOWN if digest is None else (digest,)


def _outcomes(
    parsed: Sequence[Outcome | Sequence[bytes]], known: Mapping[bytes, bool], done: Outcome
) -> list[Outcome]:
    """Return the outcomes of secrets, in order. `known`: whether each known digest worked before.

    `done` is the outcome of a secret that worked.
    """
    return [
        one
        if isinstance(one, Outcome)
        else _outcome([known[digest] for digest in one if digest in known], done)
        for one in parsed
    ]


def _outcome(working: Sequence[bool], done: Outcome) -> Outcome:
    """Return the outcome for a secret, given for each of its digests whether it worked before.

    `done` is the outcome if it worked.
    """
    if not working:
        return Outcome.UNKNOWN
    return done if any(working) else Outcome.ENDED_BEFORE

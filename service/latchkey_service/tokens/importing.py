"""Imports tokens for existing secrets, by the hashes of these secrets.

Owns the rules of Import. The statements are in `import_store.py`, and the digests of imported
secrets in `secret_format.py`. Contains neither protobuf nor SQL.
"""

import asyncio
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.coherence.verifier_table import LIFECYCLE_RULES, RATE_RULES
from latchkey_service.errors import FieldViolation
from latchkey_service.lifetime import Lifetime
from latchkey_service.secret_format import Keyring
from latchkey_service.tokens.changes import require_new_rules
from latchkey_service.tokens.confirmation import Call, Confirmations
from latchkey_service.tokens.import_store import ROWS_AT_ONCE, ImportStore, NewRow, Present
from latchkey_service.tokens.lifecycle_store import LifecycleStore
from latchkey_service.tokens.management import new_id
from latchkey_service.tokens.names import name_key
from latchkey_service.tokens.seal import SealGuard
from latchkey_service.tokens.token_changer import ATTEMPTS_MAX, conflict
from latchkey_service.tokens.validation import (
    check,
    expire_time_violations,
    lifetime_violations,
    networks_in,
    new_token_violations,
    permissions_in,
    printable,
    rate_limit_in,
    secret_violations,
)
from latchkey_service.tokens.verdict import Scope, SecretRecord, TokenRecord

__all__ = ["IMPORTED_MAX", "Importer", "Outcome", "Result", "Row"]

IMPORTED_MAX = 1_000
"""Tokens in a call of Import."""
HINT_LENGTH_MAX = 16
"""As long as the longest hint of other secrets, and as short as the shortest imported secret."""
HASH_BYTES = 32
# A hint that shows nothing.
NO_HINT = "…"
# Older systems than this have no keys.
_CREATED_MIN = datetime(2000, 1, 1, tzinfo=UTC)


class Outcome(enum.IntEnum):
    """What Import did with a row, numbered as in the contract."""

    IMPORTED = 1
    EXISTS = 2
    OTHER_ACCOUNT = 3
    NAME_TAKEN = 4
    INVALID = 5


@dataclass(frozen=True, slots=True)
class Row:
    """A token to import, not validated."""

    account_id: str
    name: str
    scope: int
    expire_time: datetime | None
    labels: Mapping[str, str]
    description: str
    allowed_networks: Sequence[str]
    permissions: Sequence[str]
    secret_sha256: bytes
    hint: str
    create_time: datetime | None
    disabled: bool
    rate_limit: tuple[int, timedelta, int] | None = None
    violations: tuple[FieldViolation, ...] = ()
    """What is wrong with times that cannot be represented here."""


@dataclass(frozen=True, slots=True)
class Result:
    """What Import did with a row. `token_id` is empty if there is no token."""

    outcome: Outcome
    token_id: str = ""
    violations: tuple[FieldViolation, ...] = ()


class Importer:
    """Imports tokens under this process's lease."""

    def __init__(
        self,
        store: ImportStore,
        lifecycle_store: LifecycleStore,
        keyring: Keyring,
        guard: SealGuard,
        confirmations: Confirmations,
        reads: LeasedReads,
        now: Callable[[], datetime],
        random_bytes: Callable[[int], bytes],
        lifetime: Lifetime,
    ) -> None:
        self._store = store
        self._lifecycle_store = lifecycle_store
        self._keyring = keyring
        self._sealer = guard.sealer
        self._confirmations = confirmations
        self._reads = reads
        self._now = now
        self._random_bytes = random_bytes
        self._lifetime = lifetime

    async def import_tokens(
        self,
        rows: Sequence[Row],
        call: Call,
        limit_of: Callable[[str], Lifetime],
        *,
        validate_only: bool,
    ) -> list[Result]:
        """Create the tokens of up to `IMPORTED_MAX` rows; return a result for each, in order.

        Idempotent: a secret that the database has is not imported again. `limit_of` returns the
        caller's limit for tokens of an account. Raises InvalidArgument, FailedPrecondition,
        Overloaded, Unavailable and StoreUnavailable.
        """
        if not 1 <= len(rows) <= IMPORTED_MAX:
            check(FieldViolation("tokens", f"must have 1-{IMPORTED_MAX} entries"))
        results, new = await self._judge(rows, limit_of)
        await self._require_rules([row.record for row in new.values()])
        for _ in range(ATTEMPTS_MAX):
            began = await self._reads.begin(call.deadline)
            present, snapshot = await self._store.find(
                [n.digests for n in new.values()],
                [(n.record.account_id, n.name_key) for n in new.values()],
                self._now(),
            )
            await self._reads.accept(snapshot, began, call.deadline)
            answers, wanted = _compare(new, present)
            if not validate_only and present.tokens:
                # An earlier call may have imported them, and failed because no standby has them.
                await self._confirmations.settle(snapshot.position)
            if validate_only or not wanted:
                return _merged(results, answers)
            inserted = await self._store.insert(
                list(wanted.values()), self._now(), call.audit_context
            )
            if inserted is not None:
                break
            # Another call has imported one of the secrets since the read.
        else:
            raise conflict()
        if inserted.position is not None:
            call.on_commit("")
            self._confirmations.announce(inserted.position)
        for number, row in wanted.items():
            if row.record.id not in inserted.token_ids:
                # Another call has taken the name since the read.
                answers[number] = Result(Outcome.NAME_TAKEN)
        return _merged(results, answers)

    async def _require_rules(self, records: Sequence[TokenRecord]) -> None:
        """Raise FailedPrecondition if a verifier would not respect one of these tokens."""
        rules = 0
        if any(r.disable_time or r.allowed_networks or r.permissions for r in records):
            rules = LIFECYCLE_RULES
        if any(r.rate_limit is not None for r in records):
            rules = RATE_RULES
        if rules:
            old_verifiers = await self._lifecycle_store.has_old_verifiers(rules)
            require_new_rules(old_verifiers=old_verifiers)

    async def _judge(
        self, rows: Sequence[Row], limit_of: Callable[[str], Lifetime]
    ) -> tuple[dict[int, Result], dict[int, NewRow]]:
        """Return the results of invalid rows, and the sealed tokens of the others, by number."""
        results, new = dict[int, Result](), dict[int, NewRow]()
        now = self._now()
        for number, row in enumerate(rows):
            if number % ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)
            made = self._checked(row, now, self._lifetime.stricter(limit_of(row.account_id)))
            if isinstance(made, NewRow):
                new[number] = made
            else:
                results[number] = made
        return results, new

    def _checked(self, row: Row, now: datetime, lifetime: Lifetime) -> NewRow | Result:
        name, hint = row.name.strip(), row.hint or NO_HINT
        violations = [
            *row.violations,
            *new_token_violations(row.account_id, name, row.scope, row.labels, row.description),
            *(
                expire_time_violations(row.expire_time, now)
                or lifetime_violations("expire_time", row.expire_time, lifetime, now)
            ),
            *secret_violations([("hint", hint)]),
        ]
        if len(row.secret_sha256) != HASH_BYTES:
            problem = f"must be a SHA-256 hash of {HASH_BYTES} bytes"
            violations.append(FieldViolation("secret_sha256", problem))
        if len(hint) > HINT_LENGTH_MAX or not printable(hint):
            problem = f"must have at most {HINT_LENGTH_MAX} characters, and no control characters"
            violations.append(FieldViolation("hint", problem))
        created = row.create_time or now
        if not _CREATED_MIN <= created <= now:
            violations.append(FieldViolation("create_time", "must be in the past, since 2000"))
        networks = networks_in(row.allowed_networks, violations)
        permissions = permissions_in(row.permissions, violations)
        rate_limit = rate_limit_in(row.rate_limit, violations)
        if violations:
            return Result(Outcome.INVALID, violations=tuple(violations))
        record = TokenRecord(
            new_id(now, self._random_bytes),
            row.account_id,
            name,
            Scope(row.scope),
            created,
            row.expire_time,
            hint,
            dict(row.labels),
            disable_time=now if row.disabled else None,
            allowed_networks=networks,
            permissions=permissions,
            description=row.description,
            rate_limit=rate_limit,
        )
        digests = self._keyring.imported_digests(row.secret_sha256)
        pepper_id = self._keyring.peppers[0].id
        secret = SecretRecord(digests[0], pepper_id, None, None, False, None)  # noqa: FBT003 - by position
        return NewRow(
            record,
            name_key(name),
            digests,
            secret._replace(seal=self._sealer.seal(record, secret)),
            self._sealer.seal_token(record, [pepper_id]),
        )


def _compare(
    new: Mapping[int, NewRow], present: Present
) -> tuple[dict[int, Result], dict[int, NewRow]]:
    """Return the results of rows, and those to insert, by number.

    Those to insert have their results as well: they hold if the insertion succeeds.
    """
    answers, wanted = dict[int, Result](), dict[int, NewRow]()
    tokens = dict(present.tokens)
    names = set(present.names)
    for number, row in new.items():
        owner = next((tokens[digest] for digest in row.digests if digest in tokens), None)
        name = (row.record.account_id, row.name_key)
        if owner is not None:
            token_id, account_id = owner
            answers[number] = (
                Result(Outcome.EXISTS, token_id)
                if account_id == row.record.account_id
                else Result(Outcome.OTHER_ACCOUNT)
            )
        elif name in names:
            answers[number] = Result(Outcome.NAME_TAKEN)
        else:
            answers[number] = Result(Outcome.IMPORTED, row.record.id)
            wanted[number] = row
            # For later rows of this call.
            names.add(name)
            tokens[row.digests[0]] = (row.record.id, row.record.account_id)
    return answers, wanted


def _merged(results: Mapping[int, Result], answers: Mapping[int, Result]) -> list[Result]:
    both = {**results, **answers}
    return [both[number] for number in sorted(both)]

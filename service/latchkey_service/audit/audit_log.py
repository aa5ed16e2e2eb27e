"""The audit log: each management call becomes an entry of the audit table.

The statement that makes a change also writes its entry (`token_store.py`, from an `AuditContext`).
Calls that change nothing, reads and failures, are recorded here and written in batches shortly
after: no caller waits for that. If a process is killed, its log still has the calls that it had not
written.

Failures are sampled, because otherwise a denied caller could fill the table. In each minute, the
first few failures of a kind have their own entries; one entry counts all others.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

import grpc

from latchkey_service.audit.audit_table import AuditTable, NewEntry
from latchkey_service.errors import StoreUnavailable
from latchkey_service.identifiers import ACCOUNT_ID, TOKEN_ID
from latchkey_service.secret_format import CREDENTIAL_LENGTH, contains_secret
from latchkey_service.settings.logs import logger

__all__ = ["AuditContext", "AuditLog"]

FLUSH_SECONDS: Final = 0.2
# Limit of unwritten entries: a thousand calls a second for ten seconds without a database. Further
# calls are only counted.
WAITING_MAX: Final = 10_000
BATCH_MAX: Final = 1_000
SAMPLE_SECONDS: Final = 60.0
SAMPLE_MAX: Final = 10
CLOSE_SECONDS: Final = 1.0
_PEER_LENGTH_MAX: Final = 200


@dataclass(frozen=True, slots=True)
class AuditContext:
    """The caller of a call, its address, and the account and token that the call concerns."""

    caller: str
    method: str
    peer: str
    request_id: str
    account_id: str
    token_id: str

    @classmethod
    def of(
        cls,
        caller: str,
        method: str,
        peer: str,
        request_id: str,
        account_id: str,
        token_id: str,
    ) -> "AuditContext":
        """Build the context; drop ids from the caller that do not have the expected form."""
        if not ACCOUNT_ID.fullmatch(account_id) or (
            # A credential is shorter than the secret of any token.
            len(account_id) >= CREDENTIAL_LENGTH and contains_secret(account_id)
        ):
            account_id = ""
        if not TOKEN_ID.fullmatch(token_id):
            token_id = ""
        return cls(caller, method, peer[:_PEER_LENGTH_MAX], request_id, account_id, token_id)

    def fields(self) -> dict[str, str]:
        """Return the fields for the log, except method and peer."""
        fields = {"caller": self.caller, "account_id": self.account_id, "token_id": self.token_id}
        return {name: value for name, value in fields.items() if value}


class _Kind(NamedTuple):
    caller: str
    method: str
    code: str
    reason: str


class _Sample:
    """Calls of one kind since `since`, and how many of them have no entry."""

    __slots__ = ("calls", "since", "without_entry")

    def __init__(self, since: float) -> None:
        self.since = since
        self.calls = 0
        self.without_entry = 0


class AuditLog:
    """The entries not written yet. Event loop only."""

    def __init__(
        self,
        table: AuditTable,
        monotonic: Callable[[], float],
        now: Callable[[], datetime],
    ) -> None:
        self._table = table
        self._monotonic = monotonic
        self._now = now
        self._waiting: list[NewEntry] = []
        self._samples: dict[_Kind, _Sample] = {}
        # For methods without entries, where only log lines are sampled.
        self._logged: dict[_Kind, _Sample] = {}
        self._failing = False
        self.written = self.lost = self.aggregated = 0
        """Entries of calls without a change: written, and lost; and calls that share an entry with
        others like them. These only increase."""
        self._log = logger()

    @property
    def waiting(self) -> int:
        """How many entries wait to be written."""
        return len(self._waiting)

    def should_record(self, caller: str, method: str, code: str, reason: str) -> bool:
        """Return whether to record a call that changed nothing; if not, it is counted here."""
        sample = self._samples.get(_Kind(caller, method, code, reason))
        if sample is None or self._has_room(sample, code):
            return True
        sample.calls += 1
        sample.without_entry += 1
        self.aggregated += 1
        return False

    def would_record(self, caller: str, method: str, code: str, reason: str) -> bool:
        """Return what `should_record` would, without counting the call."""
        sample = self._samples.get(_Kind(caller, method, code, reason))
        return sample is None or self._has_room(sample, code)

    def record(self, audit_context: AuditContext, code: str, reason: str) -> bool:
        """Record a call that changed nothing. Return whether it got its own entry."""
        kind = _Kind(audit_context.caller, audit_context.method, code, reason)
        sample = self._sample(self._samples, kind)
        has_room = self._has_room(sample, code)
        sample.calls += 1
        if not has_room:
            sample.without_entry += 1
            self.aggregated += 1
            return False
        self._waiting.append(
            NewEntry(
                self._now(),
                audit_context.caller,
                audit_context.method,
                audit_context.account_id,
                audit_context.token_id,
                audit_context.peer,
                audit_context.request_id,
                _number(code),
                reason,
                1,
            )
        )
        return True

    def should_log(self, caller: str, method: str, reason: str) -> bool:
        """Return whether to log a failed call without an entry, and count it."""
        kind = _Kind(caller, method, "", reason)
        sample = self._sample(self._logged, kind)
        sample.calls += 1
        if sample.calls > SAMPLE_MAX:
            sample.without_entry += 1
            return False
        return True

    async def run(self) -> None:
        """Write entries until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            self._close_samples(self._monotonic() - SAMPLE_SECONDS)
            await self._flush()

    async def close(self) -> None:
        """Write the remaining entries, for a limited time."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                # Counters may be waiting until there is room for their entries.
                self._close_samples(self._monotonic())
                while self._waiting and await self._flush():
                    self._close_samples(self._monotonic())
        except TimeoutError:
            pass
        if self._waiting:
            self.lost += len(self._waiting)
            without_entry = sum(sample.without_entry for sample in self._samples.values())
            self._log.error(
                "audit entries not written", entries=len(self._waiting), calls_without=without_entry
            )

    def _has_room(self, sample: "_Sample", code: str) -> bool:
        """Return whether one more call of this kind gets its own entry."""
        full = len(self._waiting) >= WAITING_MAX
        return not full and (code == "OK" or sample.calls < SAMPLE_MAX)

    def _sample(self, samples: dict[_Kind, _Sample], kind: _Kind) -> _Sample:
        sample = samples.get(kind)
        if sample is None:
            sample = samples[kind] = _Sample(self._monotonic())
        return sample

    def _close_samples(self, before: float) -> None:
        """Write the counters of samples that began up to `before`, and start new samples."""
        for kind, sample in [item for item in self._samples.items() if item[1].since <= before]:
            if sample.without_entry and len(self._waiting) >= WAITING_MAX:
                # Keep counting; the entry is written when the database is back.
                continue
            del self._samples[kind]
            if sample.without_entry:
                self._waiting.append(
                    NewEntry(
                        self._now(),
                        kind.caller,
                        kind.method,
                        "",
                        "",
                        "",
                        "",
                        _number(kind.code),
                        kind.reason,
                        sample.without_entry,
                    )
                )
                self._log_aggregated(kind, sample)
        for kind, sample in [item for item in self._logged.items() if item[1].since <= before]:
            del self._logged[kind]
            if sample.without_entry:
                self._log_aggregated(kind, sample)

    def _log_aggregated(self, kind: _Kind, sample: _Sample) -> None:
        self._log.warning(
            "calls aggregated",
            method=kind.method,
            reason=kind.reason,
            caller=kind.caller,
            calls=sample.without_entry,
        )

    async def _flush(self) -> bool:
        """Write a batch. Return False if the database is unavailable; the batch is then kept."""
        batch = self._waiting[:BATCH_MAX]
        if not batch:
            return True
        try:
            await self._table.insert(batch)
        except StoreUnavailable as error:
            # After a time-out, the batch may have been committed. Two entries are better than none.
            if not self._failing:
                self._log.warning("audit entries delayed", error=type(error).__name__)
            self._failing = True
            return False
        except Exception as error:  # noqa: BLE001 - one bad batch must not hold up the others
            self._log.error("audit entries lost", entries=len(batch), error=type(error).__name__)
            self.lost += len(batch)
        else:
            self.written += len(batch)
        self._failing = False
        del self._waiting[: len(batch)]
        return True


def _number(code: str) -> int:
    number: int = grpc.StatusCode[code].value[0]
    return number

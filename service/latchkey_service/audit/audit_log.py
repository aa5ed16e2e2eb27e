"""The audit log: each management call becomes an entry of the audit table.

The statement that makes a change also writes its entry (`token_store.py`, from an `AuditContext`).
Calls that change nothing, reads and failures, are recorded here and written in batches shortly
after: no caller waits for that. If a process is killed, its log still contains the calls that it
had not written.

Those are sampled (`sampling.py`), because otherwise a caller could fill the table.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

import grpc

from latchkey_service.audit.audit_table import (
    NO_DETAILS,
    POLICY_IN_FORCE,
    AuditTable,
    Details,
    NewEntry,
)
from latchkey_service.audit.sampling import Sample
from latchkey_service.errors import StoreUnavailable
from latchkey_service.settings.logs import logger

__all__ = ["AuditContext", "AuditLog"]

FLUSH_SECONDS: Final = 0.2
# Limit of unwritten entries: a thousand calls a second for ten seconds without a database. Further
# calls are only counted.
WAITING_MAX: Final = 10_000
BATCH_MAX: Final = 1_000
SAMPLE_SECONDS: Final = 60.0
CLOSE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class AuditContext:
    """The caller of a call, its address, and the account and token that the call concerns."""

    caller: str
    method: str
    peer: str
    request_id: str
    """The caller's own id, if it sent one."""
    account_id: str
    token_id: str
    details: Details = NO_DETAILS


class _Kind(NamedTuple):
    caller: str
    method: str
    code: str
    reason: str


class AuditLog:
    """The entries not written yet. Event loop only."""

    def __init__(
        self,
        table: AuditTable,
        monotonic: Callable[[], float],
        now: Callable[[], datetime],
        randrange: Callable[[int], int] = random.randrange,
    ) -> None:
        self._table = table
        self._randrange = randrange
        self._monotonic = monotonic
        self._now = now
        self._waiting: list[NewEntry] = []
        self._samples: dict[_Kind, Sample[NewEntry]] = {}
        # For methods without entries, where only log lines are sampled.
        self._logged: dict[_Kind, Sample[NewEntry]] = {}
        self._failing = False
        self.written = self.lost = self.aggregated = 0
        """Entries of calls that changed nothing: written and lost. `aggregated`: calls that share
        an entry with similar ones. These only increase."""
        self._log = logger()

    @property
    def waiting(self) -> int:
        """How many entries wait to be written."""
        return len(self._waiting)

    def should_record(self, caller: str, method: str, code: str, reason: str) -> bool:
        """Return whether to describe and record a call that changed nothing.

        If not, it is counted here. Otherwise, the next call must be `record`.
        """
        sample = self._sample(self._samples, _Kind(caller, method, code, reason))
        if not self._full and sample.is_wanted():
            return True
        sample.count()
        self.aggregated += 1
        return False

    def would_record(self, caller: str, method: str, code: str, reason: str) -> bool:
        """Return whether `should_record` is certain to return True. Counts nothing."""
        sample = self._samples.get(_Kind(caller, method, code, reason))
        return not self._full and (sample is None or sample.has_room)

    def record(self, audit_context: AuditContext, code: str, reason: str) -> bool:
        """Record a call that changed nothing. Return whether it got its own entry."""
        kind = _Kind(audit_context.caller, audit_context.method, code, reason)
        sample = self._sample(self._samples, kind)
        if self._full:
            sample.count()
            self.aggregated += 1
            return False
        target = (audit_context.account_id, audit_context.token_id)
        if not sample.takes(target):
            if sample.is_chosen():
                sample.keep(self._entry(audit_context, code, reason))
            self.aggregated += 1
            return False
        self._waiting.append(self._entry(audit_context, code, reason))
        return True

    def policy_in_force(self, digest: str, process: str) -> None:
        """Record that a process has put a policy in force. `digest`: SHA-256 of its text."""
        if self._full:
            self.lost += 1
            return
        context = AuditContext("", POLICY_IN_FORCE, process, "", "", "")
        self._waiting.append(self._entry(context, "OK", f"sha256:{digest}"))

    def should_log(self, caller: str, method: str, reason: str) -> bool:
        """Return whether to log a failed call without an entry, and count it."""
        kind = _Kind(caller, method, "", reason)
        return self._sample(self._logged, kind).takes(None)

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

    async def _insert_singly(self, batch: list[NewEntry]) -> tuple[list[NewEntry], int]:
        """Write the entries of a refused batch one by one.

        Return the entries that are done, and how many of these are lost. If the database becomes
        unavailable, the rest is kept.
        """
        done = lost = 0
        for entry in batch:
            try:
                await self._table.insert([entry])
            except StoreUnavailable:
                break
            except Exception:  # noqa: BLE001 - the caller logs the first error of the batch
                lost += 1
            done += 1
        self.lost += lost
        self.written += done - lost
        return batch[:done], lost

    @property
    def _full(self) -> bool:
        return len(self._waiting) >= WAITING_MAX

    def _sample(self, samples: "dict[_Kind, Sample[NewEntry]]", kind: _Kind) -> "Sample[NewEntry]":
        sample = samples.get(kind)
        if sample is None:
            sample = samples[kind] = Sample(self._monotonic(), self._randrange)
        return sample

    def _entry(self, audit_context: AuditContext, code: str, reason: str) -> NewEntry:
        return NewEntry(
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
            *audit_context.details,
        )

    def _close_samples(self, before: float) -> None:
        """Write the counters of samples that began up to `before`, and start new samples."""
        for kind, sample in [item for item in self._samples.items() if item[1].since <= before]:
            if sample.without_entry and self._full:
                # Keep counting; the entry is written when the database is back.
                continue
            del self._samples[kind]
            # One place is reserved for the count.
            kept = sample.kept[: max(0, WAITING_MAX - len(self._waiting) - 1)]
            self._waiting += kept
            if sample.without_entry > len(kept):
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
                        sample.without_entry - len(kept),
                    )
                )
                self._log_aggregated(kind, sample)
        for kind, sample in [item for item in self._logged.items() if item[1].since <= before]:
            del self._logged[kind]
            if sample.without_entry:
                self._log_aggregated(kind, sample)

    def _log_aggregated(self, kind: _Kind, sample: Sample[NewEntry]) -> None:
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
            batch, lost = await self._insert_singly(batch)
            self._log.error("audit entries lost", entries=lost, error=type(error).__name__)
        else:
            self.written += len(batch)
        self._failing = False
        del self._waiting[: len(batch)]
        return True


def _number(code: str) -> int:
    number: int = grpc.StatusCode[code].value[0]
    return number

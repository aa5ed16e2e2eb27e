"""Checks the chain of the audit log, and describes what is wrong with it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from latchkey_service.audit.audit_chain import NO_BATCH, Batch, ChainKeys, Head, batch_digest
from latchkey_service.audit.chain_table import ChainReader

__all__ = ["Report", "check"]

# Batches in a read: up to 100,000 entries.
BATCHES_IN_READ: Final = 100
# As many ids as a person can read.
NAMED_MAX: Final = 10
# Workers seal entries every few seconds.
UNSEALED_MAX: Final = timedelta(minutes=10)


@dataclass(slots=True)
class Report:
    """The result of a check."""

    problems: list[str] = field(default_factory=list)
    """What is wrong. Empty: nothing."""
    batches: int = 0
    entries: int = 0
    """How many entries these batches contain."""
    unsealed: int = 0
    """How many entries no batch covers yet."""
    start: Head = NO_BATCH
    """The last batch whose entries retention has removed."""
    head: Head = NO_BATCH
    """The newest batch."""


async def check(
    reader: ChainReader, keys: ChainKeys, now: datetime, noted: Head | None = None
) -> Report:
    """Check the whole chain. `noted` is a batch that was the newest one earlier."""
    return await _Check(reader, keys, noted).run(now)


class _Check:
    def __init__(self, reader: ChainReader, keys: ChainKeys, noted: Head | None) -> None:
        self._reader = reader
        self._keys = keys
        self._noted = noted
        self._noted_found = noted is None
        # The last batch with a valid seal. It proves all batches before it.
        self._proven = 0
        self._report = Report()

    async def run(self, now: datetime) -> Report:
        report, reader = self._report, self._reader
        await self._check_start()
        while batches := await reader.batches(report.head.number, BATCHES_IN_READ):
            for batch in batches:
                await self._check_batch(batch)
        if self._proven < report.head.number and report.batches:
            report.problems.append(
                f"no seal of a pepper in the pepper file proves the batches after {self._proven}"
            )
        if self._noted is not None and not self._noted_found:
            removed = self._noted.number < report.start.number
            report.problems.append(
                f"batch {self._noted.number}, which was noted, "
                + ("has been removed by retention" if removed else "is gone")
            )
        for ids, fault in (
            (await reader.outside(NAMED_MAX), "are in no batch"),
            (await reader.vanished(NAMED_MAX), "were removed before they were sealed"),
        ):
            if ids:
                report.problems.append(f"these entries {fault}: {_listed(ids)}")
        report.unsealed, oldest = await reader.unsealed()
        if oldest is not None and now - oldest > UNSEALED_MAX:
            report.problems.append(
                f"{report.unsealed} entries are not sealed, the oldest of {oldest:%Y-%m-%d %H:%M}"
                " UTC; is the service running?"
            )
        return report

    async def _check_start(self) -> None:
        """Find where the kept part of the chain begins."""
        report = self._report
        start = await self._reader.start()
        if start.number == 0:
            return
        kept = await self._reader.batches(start.number - 1, 1)
        report.start = report.head = Head(start.number, kept[0].digest if kept else bytes(32))
        if not kept or kept[0].number != start.number:
            report.problems.append(f"batch {start.number}, where the chain begins, is gone")
        elif not self._keys.knows(start.pepper_id):
            report.problems.append("the beginning was sealed with a pepper that is not in the file")
        elif not self._keys.is_genuine_start(start, report.start):
            report.problems.append("entries at the beginning were removed, but not by the service")
        else:
            self._proven = start.number
        self._compare(report.start)

    async def _check_batch(self, batch: Batch) -> None:
        report = self._report
        before, report.head = report.head, batch.head
        report.batches += 1
        report.entries += len(batch.entry_ids)
        self._compare(batch.head)
        if batch.number != before.number + 1:
            report.problems.append(
                f"the batches {before.number + 1} to {batch.number - 1} and their entries are gone"
            )
            return
        entries = await self._reader.entries(batch.entry_ids)
        if batch_digest(before, entries) != batch.digest:
            missing = sorted(set(batch.entry_ids) - {entry.id for entry in entries})
            report.problems.append(
                f"batch {batch.number}: "
                + (
                    f"these entries are gone: {_listed(missing)}"
                    if missing
                    else f"its entries ({_listed(batch.entry_ids)}) or those before were changed"
                )
            )
        if self._keys.knows(batch.pepper_id):
            if self._keys.is_genuine(batch):
                self._proven = batch.number
            else:
                report.problems.append(f"batch {batch.number}: its seal is wrong")

    def _compare(self, head: Head) -> None:
        """Compare a batch with the noted one if it has the same number."""
        if self._noted is not None and head.number == self._noted.number:
            self._noted_found = True
            if head.digest != self._noted.digest:
                self._report.problems.append(
                    f"batch {head.number} differs from the one that was noted"
                )


def _listed(ids: Sequence[int]) -> str:
    text = ", ".join(str(number) for number in ids[:NAMED_MAX])
    return f"{text} and {len(ids) - NAMED_MAX} more" if len(ids) > NAMED_MAX else text

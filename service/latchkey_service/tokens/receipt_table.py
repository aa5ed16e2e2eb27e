"""The receipts of changes that narrow tokens, and the columns that store those of deletions."""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from latchkey_coherence.memory import Position

from latchkey_service.coherence.snapshot import mark_in

if TYPE_CHECKING:
    import asyncpg

__all__ = ["RECEIPT", "Deletion", "deletion_of"]

RECEIPT = """d.revision, d.mark, d.commit_time, d.effective_time, d.verifiers_acknowledged,
       d.verifiers_outwaited, d.clients_acknowledged, d.clients_outwaited"""
RECEIPT_COUNT = 8


@dataclass(frozen=True, slots=True)
class Deletion:
    """The receipt of a deletion, or of another change that narrows tokens.

    `effective_time` is None until the change is confirmed.
    """

    position: Position
    commit_time: datetime
    effective_time: datetime | None
    verifiers_acknowledged: int
    verifiers_outwaited: int
    clients_acknowledged: int
    clients_outwaited: int


def deletion_of(row: "asyncpg.Record") -> Deletion:
    """Return the receipt in the last columns of a row, those of `RECEIPT`."""
    revision, mark, *rest = row[-RECEIPT_COUNT:]
    return Deletion(Position(revision, mark_in(mark)), *rest)

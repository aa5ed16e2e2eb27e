"""The receipts of changes that narrow tokens, and the columns that store those of deletions."""

from dataclasses import dataclass
from datetime import datetime

from latchkey_coherence.verdict_cache import Position

__all__ = ["RECEIPT", "RECEIPT_COUNT", "Deletion"]

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

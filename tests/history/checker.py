"""The guarantee, checked on what was seen: no VALID to a verify that began after Delete answered.

Pure: histories in, findings out. A Delete counts once it is confirmed; before that, and for a
verify that overlaps it, either answer is right. A refusal before any Delete began is wrong as well:
a token is good from its Create on.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.history.records import Kind, Outcome, Record

__all__ = ["Findings", "Late", "check"]

# Late accepts that are kept for the report; all are counted.
LATE_KEPT = 1_000


class Late(NamedTuple):
    """A late accept: a verify that began `late_ns` after the Delete had ended told `who` VALID."""

    who: str
    kind: Kind
    token: int
    deleted: int
    began: int
    ended: int

    @property
    def late_ns(self) -> int:
        return self.began - self.deleted


@dataclass
class Findings:
    """What the histories say."""

    calls: Counter[tuple[Kind, Outcome]] = field(default_factory=Counter)
    late_count: int = 0
    late: list[Late] = field(default_factory=list)
    refused_early: int = 0
    """Verifies that were refused and had ended before the first Delete of their token began."""
    deletes: list[Record] = field(default_factory=list)
    """Each call of Delete that was confirmed."""
    deleted: dict[int, int] = field(default_factory=dict)
    """When each token's first confirmed Delete had ended."""
    checked: set[int] = field(default_factory=set)
    """Tokens that a verify was answered about that began after their Delete was confirmed."""
    from_memory: Counter[str] = field(default_factory=Counter)
    """Who answered how many verifies from memory."""
    from_service: int = 0
    """Verifies that the client library asked the service about."""

    def count(self, *kinds: Kind) -> int:
        """Return how many calls of these kinds there were, failed ones included."""
        return sum(number for (kind, _), number in self.calls.items() if kind in kinds)

    def ended(self, kind: Kind, outcome: Outcome) -> int:
        """Return how many calls of a kind ended so."""
        return self.calls[kind, outcome]

    @property
    def operations(self) -> int:
        """How many calls got an answer."""
        return sum(n for (_, outcome), n in self.calls.items() if outcome is not Outcome.FAILED)


def check(histories: Mapping[str, Callable[[], Iterable[Record]]]) -> Findings:
    """Return the findings in the histories of all processes, each by name, each read twice."""
    findings = Findings()
    deleted = findings.deleted
    touched: dict[int, int] = {}
    for history in histories.values():
        for record in history():
            if record.kind != Kind.DELETE:
                continue
            touched[record.token] = min(record.began, touched.get(record.token, record.began))
            if record.outcome == Outcome.CONFIRMED:
                findings.deletes.append(record)
                before = deleted.get(record.token)
                deleted[record.token] = (
                    record.ended if before is None else min(before, record.ended)
                )
    for who, history in histories.items():
        _look_at(who, history(), findings, touched)
    return findings


def _look_at(
    who: str, history: Iterable[Record], findings: Findings, touched: Mapping[int, int]
) -> None:
    # A loop over millions of records: what it needs is in local variables.
    deleted, checked = findings.deleted.get, findings.checked.add
    calls: Counter[tuple[int, int]] = Counter()
    answered = (Outcome.VALID, Outcome.REFUSED)
    counts: dict[int, tuple[int, int]] = {}
    for record in history:
        kind, outcome, token, began, ended = record
        if kind == Kind.COUNTS:
            counts[token] = began, ended
            continue
        calls[kind, outcome] += 1
        if outcome not in answered:
            continue
        dead_since = deleted(token)
        # At the same nanosecond neither came first.
        if dead_since is None or began <= dead_since:
            if outcome == Outcome.REFUSED and ended < touched.get(token, 0):
                findings.refused_early += 1
            continue
        checked(token)
        if outcome == Outcome.VALID:
            findings.late_count += 1
            if len(findings.late) < LATE_KEPT:
                findings.late.append(Late(who, Kind(kind), token, dead_since, began, ended))
    for (kind, outcome), number in calls.items():
        findings.calls[Kind(kind), Outcome(outcome)] += number
    for token, (hits, misses) in counts.items():
        findings.from_memory[f"{who}/{token}"] += hits
        findings.from_service += misses

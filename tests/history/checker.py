"""Checks the guarantee on recorded histories: no verify that began after Delete returned is VALID.

What is said about Delete here applies to every change that ends a token (`records.ENDS`).

A pure function of the histories. A Delete counts once it is confirmed. Before that, and for a
verify that overlaps it, either answer is correct. A rejection before any Delete began is also an
error, because a token is valid from its Create on. So is the answer that a token does not exist, if
its Create returned OK and no Delete of it was sent.

A restored backup undoes everything that it does not contain. A Delete that it lacks does not forbid
VALID after the restore, and a token that it lacks may be rejected from then on. Such a token must
be dead once a Delete has confirmed that, or has returned NOT_FOUND.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.history.records import CREATES, ENDS, Kind, Outcome, Record

__all__ = ["Findings", "Late", "Lost", "Restore", "check"]

# Number of late accepts and lost tokens kept for the report; all are counted.
LATE_KEPT = 1_000


class Restore(NamedTuple):
    """A base backup replaced the database. Times in nanoseconds of the records' clock."""

    taken: int
    """The backup began. The backup contains every change that was answered before this time."""
    began: int
    """The old database stopped. No call that began after this time was answered from the old
    database.
    """
    settled: int
    """By this time, the operator had done the steps that docs/backup.md requires after a
    restore.
    """


class Late(NamedTuple):
    """A late accept: `who` received VALID from a verify that began `late_ns` after the Delete had
    ended."""

    who: str
    kind: Kind
    token: int
    deleted: int
    began: int
    ended: int

    @property
    def late_ns(self) -> int:
        return self.began - self.deleted


class Lost(NamedTuple):
    """A token was reported as missing although its Create had returned and no Delete of it was
    sent."""

    who: str
    record: Record


@dataclass
class Findings:
    """The results of a check."""

    calls: Counter[tuple[Kind, Outcome]] = field(default_factory=Counter)
    late_count: int = 0
    late: list[Late] = field(default_factory=list)
    refused_early: int = 0
    """Rejected verifies that ended before the first Delete of their token began."""
    lost_count: int = 0
    lost: list[Lost] = field(default_factory=list)
    deletes: list[Record] = field(default_factory=list)
    """Each confirmed call of Delete."""
    imported: set[int] = field(default_factory=set)
    """Tokens that were imported."""
    deleted: dict[int, int] = field(default_factory=dict)
    """The end of each token's first confirmed Delete."""
    ended_by: dict[int, Kind] = field(default_factory=dict)
    """The kind of change that ended each token."""
    checked: set[int] = field(default_factory=set)
    """Tokens with an answered verify that began after their Delete was confirmed."""
    from_memory: Counter[str] = field(default_factory=Counter)
    """The number of verifies that each process answered from its cache."""
    from_service: int = 0
    """Verifies that the client library forwarded to the service."""

    def count(self, *kinds: Kind) -> int:
        """Return the number of calls of these kinds, including failed ones."""
        return sum(number for (kind, _), number in self.calls.items() if kind in kinds)

    def ended(self, kind: Kind, outcome: Outcome) -> int:
        """Return how many calls of a kind had this outcome."""
        return self.calls[kind, outcome]

    @property
    def operations(self) -> int:
        """Return how many calls were answered."""
        return sum(n for (_, outcome), n in self.calls.items() if outcome is not Outcome.FAILED)


class _Tokens:
    """The facts about each token that calls to create, read and delete it show."""

    def __init__(self, restores: Sequence[Restore]) -> None:
        self.created: dict[int, Record] = {}
        """Each token's Create that returned OK."""
        self.touched: dict[int, int] = {}
        """The start of each token's first Delete, whatever its outcome."""
        self.deleted: dict[int, int] = {}
        """When each token's first Delete was confirmed, or the service said that the token does
        not exist."""
        self.undone: dict[int, list[tuple[int, int | None]]] = {}
        """For tokens with a Delete that a restore undid: all confirmed Deletes, each with its
        end and the moment from which it no longer forbids VALID.
        """
        self._restores = restores
        self._deletes: defaultdict[int, list[tuple[int, int | None]]] = defaultdict(list)

    def learn(self, record: Record) -> None:
        """Add a Create or a Delete."""
        token, outcome = record.token, record.outcome
        if record.kind in CREATES and outcome == Outcome.DONE:
            self.created[token] = record
        elif record.kind in ENDS:
            self.touched[token] = min(record.began, self.touched.get(token, record.began))
            if outcome == Outcome.CONFIRMED or (
                outcome == Outcome.NOT_FOUND and self._is_settled(record.began)
            ):
                self.deleted[token] = min(record.ended, self.deleted.get(token, record.ended))
                self._deletes[token].append((record.ended, self._undone_at(record)))

    def complete(self) -> None:
        """Finish, after every history was added."""
        self.undone = {
            token: deletes
            for token, deletes in self._deletes.items()
            if any(undone is not None for _, undone in deletes)
        }

    def dead_since(self, token: int, began: int) -> int | None:
        """Return the end of a Delete that forbids VALID at `began`; of a token in `undone`."""
        standing = [
            ended
            for ended, undone in self.undone[token]
            if ended < began and (undone is None or began < undone)
        ]
        return min(standing, default=None)

    def may_be_missing(self, token: int, ended: int) -> bool:
        """Return whether a restore before `ended` may have lost the token."""
        created = self.created.get(token)
        return created is not None and any(
            created.ended > restore.taken and created.began < restore.began < ended
            for restore in self._restores
        )

    def _undone_at(self, record: Record) -> int | None:
        return min(
            (
                restore.began
                for restore in self._restores
                if restore.taken < record.ended and record.began < restore.began
            ),
            default=None,
        )

    def _is_settled(self, moment: int) -> bool:
        """Return whether no restore was in progress: until its end, caches may hold what it
        lost."""
        return not any(restore.began <= moment < restore.settled for restore in self._restores)


def check(
    histories: Mapping[str, Callable[[], Iterable[Record]]], restores: Sequence[Restore] = ()
) -> Findings:
    """Return the findings in the histories of all processes, by name. Each history is read
    twice."""
    findings = Findings()
    tokens = _Tokens(restores)
    for history in histories.values():
        for record in history():
            if record.kind not in CREATES and record.kind not in ENDS:
                continue
            tokens.learn(record)
            if record.kind == Kind.IMPORT and record.outcome == Outcome.DONE:
                findings.imported.add(record.token)
            if record.kind in ENDS and record.outcome == Outcome.CONFIRMED:
                findings.deletes.append(record)
                findings.ended_by[record.token] = Kind(record.kind)
                before = findings.deleted.get(record.token, record.ended)
                findings.deleted[record.token] = min(before, record.ended)
    tokens.complete()
    for who, history in histories.items():
        _look_at(who, history(), findings, tokens)
    return findings


def _look_at(who: str, history: Iterable[Record], findings: Findings, tokens: _Tokens) -> None:
    # A loop over millions of records: it uses local variables for speed.
    deleted, undone, checked = tokens.deleted.get, tokens.undone, findings.checked.add
    calls: Counter[tuple[int, int]] = Counter()
    answered = (Outcome.VALID, Outcome.REFUSED)
    counts: dict[int, tuple[int, int]] = {}
    for record in history:
        kind, outcome, token, began, ended = record
        if kind == Kind.COUNTS:
            counts[token] = began, ended
            continue
        calls[kind, outcome] += 1
        if outcome == Outcome.NOT_FOUND:
            _look_for_loss(who, record, findings, tokens)
        if outcome not in answered:
            continue
        dead_since = tokens.dead_since(token, began) if token in undone else deleted(token)
        # In the same nanosecond, neither is first.
        if dead_since is None or began <= dead_since:
            if (
                outcome == Outcome.REFUSED
                and ended < tokens.touched.get(token, 0)
                and not tokens.may_be_missing(token, ended)
            ):
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


def _look_for_loss(who: str, record: Record, findings: Findings, tokens: _Tokens) -> None:
    """Check an answer that a token does not exist."""
    # A Delete finds the receipt of an earlier one; a Get may overlap the Delete.
    deleted = record.kind == Kind.GET and record.ended > tokens.touched.get(
        record.token, record.ended
    )
    created = tokens.created.get(record.token)
    known = created is not None and created.ended < record.began
    if known and not deleted and not tokens.may_be_missing(record.token, record.ended):
        findings.lost_count += 1
        if len(findings.lost) < LATE_KEPT:
            findings.lost.append(Lost(who, record))

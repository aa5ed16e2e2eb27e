"""A server process left behind with a deposed primary, and one Delete. Rules 3, 4 and 5.

A standby is promoted. The old primary can commit no more, since a commit waits for the standby, but
it goes on answering reads to whoever is still connected to it. The process notices late or never,
and each of its connections by itself. Delete runs wherever the primary is.

What server.py tells apart within one database is one step here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.model.explore import Model, Violation

TICKS = 2

NO_ROW = -1
BEFORE, ANSWERED = -1, -2  # Delete; in between, the ticks still to wait
IDLE = -1

GUARANTEE = "Delete had answered before this verify began, and it answers VALID"


class Lookup(NamedTuple):
    """A read on its way: sent, and then read and not yet back."""

    read: bool = False
    revision: int = 0  # 0: VALID; 1: DELETED
    began: int = 0  # what was applied when the verify that sent it began
    late: bool = False  # Delete had answered before


class State(NamedTuple):
    """Everything there is, at one instant."""

    # The primary, the old one or the new one.
    promoted: bool = False
    delete: int = BEFORE
    row: int = NO_ROW  # acknowledged_revision
    quiet: int = 0  # ticks until the row has gone unrenewed for T
    # The old primary, once deposed.
    old_deleted: bool = False
    old_row: bool = False
    # The process.
    left: bool = False  # its connection for row and log is to the new primary
    reads_left: bool = False  # the one for look-ups is
    applied: int = 0
    memory: bool = False  # holds VALID
    lease: int = 0
    renewal: int = IDLE  # ticks left of the lease that this renewal is for; runs from its t0
    log_read: bool = False
    lookup: Lookup | None = None


@dataclass(frozen=True)
class World:
    """What a run is given."""

    broken: frozenset[str]
    separate: bool


def model(*broken: str, separate: bool = True) -> Model:
    """Return the model. `separate`: look-ups have a connection that may stay behind by itself."""
    return Model(State(), ACTIONS, World(frozenset(broken), separate), NAMES)


def standby_is_promoted(s: State, _: World) -> Iterator[State]:
    """The standby becomes the primary, with all that was committed; the old one is deposed."""
    if not s.promoted:
        yield s._replace(promoted=True, old_deleted=s.delete != BEFORE, old_row=s.row != NO_ROW)


def deletes(s: State, _: World) -> Iterator[State]:
    """Delete commits on the primary, and begins to wait (rule 8)."""
    if s.delete == BEFORE:
        yield s._replace(delete=TICKS)


def answers_by_acknowledgement(s: State, _: World) -> Iterator[State]:
    """Delete answers: every row that is there has acknowledged its revision (rule 8)."""
    if s.delete >= 0 and s.row != 0:
        yield s._replace(delete=ANSWERED)


def answers_by_waiting(s: State, _: World) -> Iterator[State]:
    """Delete answers: T has passed since its commit (rule 8)."""
    if s.delete == 0:
        yield s._replace(delete=ANSWERED)


def removes_row(s: State, _: World) -> Iterator[State]:
    """Someone who has watched the row for T without a renewal removes it (rule 9)."""
    if s.row != NO_ROW and s.quiet == 0:
        yield s._replace(row=NO_ROW)


# ---- The process ----


def reconnects(s: State, w: World) -> Iterator[State]:
    """The process connects to the new primary; what it was doing on the old connection is over."""
    if s.promoted and not s.left:
        moved = s._replace(left=True, reads_left=s.reads_left or not w.separate)
        if "3 log and row on different connections" not in w.broken:
            moved = moved._replace(renewal=IDLE, log_read=False)
        yield moved


def reconnects_for_reads(s: State, _: World) -> Iterator[State]:
    """Its connection for look-ups moves to the new primary."""
    if s.promoted and not s.reads_left:
        yield s._replace(reads_left=True)


def registers(s: State, _: World) -> Iterator[State]:
    """The process registers with the primary, having lost or never had a row (rule 2)."""
    if s.row == NO_ROW and s.lease == 0 and commits(s):
        head = int(s.delete != BEFORE)
        yield s._replace(
            row=head, quiet=TICKS, applied=head, memory=False, renewal=IDLE, log_read=False
        )


def reads_clock(s: State, _: World) -> Iterator[State]:
    """A renewal begins: the process reads its clock, t0 (rule 3)."""
    if s.renewal == IDLE:
        yield s._replace(renewal=TICKS)


def reads_log(s: State, _: World) -> Iterator[State]:
    """The renewal reads the log, wherever it is connected to, and applies it (rule 3)."""
    if s.renewal == IDLE or s.log_read:
        return
    head = int(s.delete != BEFORE) if s.left or not s.promoted else int(s.old_deleted)
    applied = max(s.applied, head)
    yield s._replace(log_read=True, applied=applied, memory=s.memory and applied == s.applied)


def updates_row(s: State, w: World) -> Iterator[State]:
    """The renewal updates the row; the commit is durable, and the lease runs from t0 (rule 3).

    On the deposed primary the commit waits for a standby that is gone, and never returns.
    """
    if s.renewal == IDLE or not s.log_read:
        return
    done = s._replace(renewal=IDLE, log_read=False, lease=max(s.lease, s.renewal))
    if commits(s):
        if s.row != NO_ROW:
            yield done._replace(row=max(s.row, s.applied), quiet=TICKS)
        else:
            yield done._replace(lease=0, memory=False)
    elif s.old_row and "3 renewal committed asynchronously" in w.broken:
        yield done


def commits(s: State) -> bool:
    """Tell whether the process is connected to a database that can commit."""
    return s.left or not s.promoted


# ---- Its answers ----


def answers_from_memory(s: State, _: World) -> Iterator[State | Violation]:
    """A verify is answered from memory, under the lease (rule 5)."""
    if s.memory and s.lease:
        if s.delete == ANSWERED:
            yield Violation(GUARANTEE)
        yield s


def sends_lookup(s: State, w: World) -> Iterator[State]:
    """A verify under a live lease sends a look-up (rule 5)."""
    if s.lookup is None and (s.lease or "5 reads without a lease" in w.broken):
        yield s._replace(lookup=Lookup(began=s.applied, late=s.delete == ANSWERED))


def reads_row(s: State, _: World) -> Iterator[State]:
    """The database that look-ups are connected to answers it."""
    if s.lookup is not None and not s.lookup.read:
        new = s.reads_left or not s.promoted
        revision = int(s.delete != BEFORE) if new else int(s.old_deleted)
        yield s._replace(lookup=s.lookup._replace(read=True, revision=revision))


def takes_answer(s: State, w: World) -> Iterator[State | Violation]:
    """The look-up comes back: answer and memory take it as admitted (rule 4).

    What it answers must hold at what had been applied when the call began. Where reads come from a
    connection of their own, that is what keeps out a primary that was deposed: a live lease says
    that the log has been read, not where the row came from.
    """
    found = s.lookup
    if found is None or not found.read:
        return
    holds = found.revision >= found.began or "4 own answer not checked" in w.broken
    valid = found.revision == 0
    if valid and found.late and holds:
        yield Violation(GUARANTEE)
    yield s._replace(lookup=None, memory=valid and found.revision >= s.applied)


def loses_lookup(s: State, _: World) -> Iterator[State]:
    """The look-up is lost."""
    if s.lookup is not None:
        yield s._replace(lookup=None)


def time_passes(s: State, _: World) -> Iterator[State]:
    """A tick passes."""
    yield s._replace(
        delete=s.delete - (s.delete > 0),
        quiet=s.quiet - (s.quiet > 0),
        lease=s.lease - (s.lease > 0),
        renewal=s.renewal - (s.renewal > 0),
    )


ACTIONS = (
    standby_is_promoted,
    deletes,
    answers_by_acknowledgement,
    answers_by_waiting,
    removes_row,
    reconnects,
    reconnects_for_reads,
    registers,
    reads_clock,
    reads_log,
    updates_row,
    answers_from_memory,
    sends_lookup,
    reads_row,
    takes_answer,
    loses_lookup,
    time_passes,
)

# What everyone does when all is well, for Delete to be answered by acknowledgement.
HEALTHY = (reconnects, registers, reads_clock, reads_log, updates_row, answers_by_acknowledgement)

NAMES = {
    "row": {NO_ROW: "none"},
    "delete": {BEFORE: "not begun", ANSWERED: "answered"},
    "renewal": {IDLE: "idle"},
}

"""Two databases with different histories, one server process, and one change that narrows.

Rules 3, 4, 5, 8, 9 and 12. The change is a Delete, or another one: these differ if the call is
repeated. The old primary may show commits that its standby never received: their wait for the
standby was cancelled, or crash recovery made them visible. The promoted standby continues from what
it received, so the two databases may give one revision to different changes. The old primary stays
up. Every statement of the process and of the deleter may reach either database at any time, so the
model need not track connections.

A log is a string, with a letter for each change: `o` and `O` were made on the old primary, `n` and
`N` on the new one, and the capitals are the deletion. No letter occurs twice in one log. A position
is a prefix of a log: its length is the revision, and its last letter is the mark. A history
contains a position if its log begins with that prefix.

Simplifications. Each allows more orders of events than the service, or is equivalent to it:

- A renewal reads the clock, updates the row and applies the log in one step. An earlier clock
  reading would only shorten the lease. Applying the log later is equivalent to a later renewal
  after one whose answer was lost.
- The cache knows every earlier position of its history.
- An answer to the call that sent a look-up may ignore what was named since the call began.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.model.explore import Action, Model, Violation
from tests.model.histories_state import (
    ANSWERED,
    BEFORE,
    CUT_OFF,
    DELETION,
    FOLLOWING,
    GUARANTEE,
    IDLE,
    NAMES,
    NEW,
    NO_ROW,
    OLD,
    OTHER,
    PROMOTED,
    UNREGISTERED,
    Database,
    Lookup,
    State,
    World,
)


def model(
    *broken: str, ticks: int = 1, others: tuple[str, ...] = OTHER, backup: bool = False
) -> Model:
    """Return the model, with the rules named in `broken` broken."""
    # With another rule broken, repeated calls would only add states.
    repeats = REPEATS if all("repeated" in rule for rule in broken) else ()
    actions = (*ACTIONS, *repeats, *(AGAINST_THE_RULES if broken else ()))
    return Model(State(), actions, World(frozenset(broken), ticks, others, backup), NAMES)


# ---- The databases ----


def standby_is_cut_off(s: State, _: World) -> Iterator[State]:
    """The standby is disconnected: later commits of the old primary are not durable."""
    if s.standby == FOLLOWING:
        yield s._replace(standby=CUT_OFF)


def standby_catches_up(s: State, _: World) -> Iterator[State]:
    """The standby receives everything that the old primary shows, and so makes it durable."""
    if s.standby == CUT_OFF:
        yield s._replace(standby=FOLLOWING, databases=(s.databases[OLD], s.databases[OLD]))


def standby_is_promoted(s: State, w: World) -> Iterator[State]:
    """The standby becomes the primary, with what it has received. The old primary stays up.

    A restored backup is a standby that has received less. The rules do not prevent the loss of a
    deletion. They apply to the next deletion. A backup may lack rows too, so it must not be
    restored before the leases of the old primary have ended.
    """
    early = "12 backup restored before the old leases ended" in w.broken
    if s.standby == PROMOTED or (w.backup and s.lease and not early):
        return
    if w.backup and not deletion(s.databases[NEW].log):
        lookup = s.lookup and s.lookup._replace(late=False, joined=False)
        s = s._replace(delete=BEFORE, lookup=lookup)
    yield s._replace(standby=PROMOTED)


def changes_another(s: State, w: World) -> Iterator[State]:
    """A change of another token commits, or is visible without being durable (rule 1)."""
    for x, letter in enumerate(OTHER):
        log = s.databases[x].log
        if letter in w.others and letter not in log and writable(s, x):
            yield written(s, x, log=log + letter)


def deletes(s: State, w: World) -> Iterator[State]:
    """Delete commits and begins to wait; one that commits but is not durable fails (rule 8).

    When called again for a deleted token, it makes another durable commit in the same statement.
    The other changes read first: see `finds_change`.
    """
    if s.delete == ANSWERED:
        return
    for x, letter in enumerate(DELETION):
        log = s.databases[x].log
        if not writable(s, x):
            continue
        after = s if deletion(log) else written(s, x, log=log + letter)
        again = after is s and "8 a retry trusts a deletion that is not durable" in w.broken
        # From now on, a repeated call that has found the deletion can do no more than this one.
        confirmed = after._replace(delete=w.ticks, found=False)
        yield confirmed if durable(s, x, w) or again else after


def finds_change(s: State, w: World) -> Iterator[State]:
    """A repeated call reads a change that the old primary has made, and not durably (rule 8).

    A durable change stays durable, so reading it first allows nothing that `deletes` does not.
    """
    old = s.databases[OLD].log
    if s.delete == BEFORE and not s.found and deletion(old) and not durable(s, OLD, w):
        confirms = "8 a repeated change is confirmed from what it reads" in w.broken
        yield s._replace(delete=w.ticks) if confirms else s._replace(found=True)


def settles(s: State, w: World) -> Iterator[State]:
    """It makes a durable commit on a history with that change, and begins to wait (rule 8)."""
    if not s.found:
        return
    old = s.databases[OLD].log
    read = old[: old.find("O") + 1]
    for x, database in enumerate(s.databases):
        anywhere = "8 a repeated change is confirmed on any history" in w.broken
        if durable(s, x, w) and (database.log.startswith(read) or anywhere):
            yield s._replace(delete=w.ticks, found=False)


def answers_by_acknowledgement(s: State, w: World) -> Iterator[State]:
    """Delete answers: every row has acknowledged, on a history with the deletion (rules 8, 12)."""
    if s.delete < 0:
        return
    committed = position_of_deletion(s)
    for database in s.databases:
        known = database.log.startswith(committed) or (
            "12 rows read on a history without the deletion" in w.broken
            and len(database.log) >= len(committed)
        )
        if known and not 0 <= database.row < len(committed):
            yield s._replace(delete=ANSWERED)


def answers_by_waiting(s: State, _: World) -> Iterator[State]:
    """Delete answers: T has passed since its commit (rule 8)."""
    if s.delete == 0:
        yield s._replace(delete=ANSWERED)


def removes_row(s: State, _: World) -> Iterator[State]:
    """A watcher that has seen the row for T without a renewal removes it (rule 9)."""
    for x, database in enumerate(s.databases):
        if database.row != NO_ROW and database.quiet == 0 and writable(s, x):
            yield written(s, x, row=NO_ROW)


# ---- The process: its row and its lease ----


def registers(s: State, w: World) -> Iterator[State]:
    """The process registers, with an empty cache and no lease (rule 2)."""
    if s.applied is not UNREGISTERED:
        return
    for x, database in enumerate(s.databases):
        if writable(s, x):
            after = written(s, x, row=len(database.log), quiet=w.ticks)
            yield after._replace(applied=database.log) if durable(s, x, w) else after


def renews(s: State, w: World) -> Iterator[State]:
    """The process renews: one statement checks, acknowledges, renews, reads the log (rules 3, 12).

    The row acknowledges what was applied before. The answer may be lost. If the commit is not
    durable, the row may show it, but the process has not renewed its lease.
    """
    if s.applied is UNREGISTERED or "3 log and row in two statements" in w.broken:
        return
    for x, database in enumerate(s.databases):
        if not writable(s, x):
            continue
        known = knows(database.log, s.applied, w)
        acknowledges = known or "12 acknowledged without a condition" in w.broken
        if database.row == NO_ROW or not acknowledges:
            yield lost(s, w)
            continue
        row = written(s, x, row=len(s.applied), quiet=w.ticks)
        yield row
        if not known:
            yield lost(row, w)
        elif durable(s, x, w) or "3 renewal committed asynchronously" in w.broken:
            yield caught_up(row, x)._replace(lease=w.ticks)


def reads_log(s: State, w: World) -> Iterator[State]:
    """After a wake-up the process reads the log alone, which gives no lease (rules 10, 12)."""
    if s.applied is UNREGISTERED:
        return
    for x, database in enumerate(s.databases):
        if knows(database.log, s.applied, w):
            yield caught_up(s, x)
        else:
            yield lost(s, w)


def dies(s: State, _: World) -> Iterator[State]:
    """The process dies. Its rows are removed at once, which lets Delete answer sooner."""
    old, new = s.databases
    databases = (Database(old.log), Database(new.log))
    yield State(s.standby, databases, s.delete, s.found)


# ---- Against the rules: a renewal in two statements ----


def reads_clock(s: State, w: World) -> Iterator[State]:
    """A renewal in two statements begins: the process reads its clock."""
    if s.applied is not UNREGISTERED and s.renewal == IDLE:
        yield s._replace(renewal=w.ticks)


def reads_log_to_renew(s: State, w: World) -> Iterator[State]:
    """Its first statement reads the log, and checks the position applied before."""
    if s.renewal == IDLE or s.log_read:
        return
    for after in reads_log(s, w):
        known = after.applied is not UNREGISTERED
        yield after._replace(log_read=known, renewal=s.renewal if known else IDLE)


def updates_row(s: State, w: World) -> Iterator[State]:
    """Its second statement updates the row, and checks the position that is now applied."""
    if not s.log_read:
        return
    for x, database in enumerate(s.databases):
        if s.applied is UNREGISTERED or not durable(s, x, w):
            continue
        done = s._replace(renewal=IDLE, log_read=False)
        if database.row == NO_ROW or not database.log.startswith(s.applied):
            yield lost(done, w)
        else:
            row = written(done, x, row=len(s.applied), quiet=w.ticks)
            yield row._replace(lease=max(s.lease, s.renewal))


# ---- The process: its answers ----


def answers_from_memory(s: State, _: World) -> Iterator[State | Violation]:
    """A verify is answered from the cache, under the lease (rule 5)."""
    if s.cache and s.lease:
        if s.delete == ANSWERED:
            yield Violation(GUARANTEE)
        yield s


def sends_lookup(s: State, w: World) -> Iterator[State]:
    """A verify under a live lease sends a look-up (rule 5)."""
    leased = s.lease or "5 reads without a lease" in w.broken
    if s.lookup is None and s.applied is not UNREGISTERED and leased:
        yield s._replace(lookup=Lookup(None, len(s.applied), s.delete == ANSWERED))


def reads_token(s: State, _: World) -> Iterator[State]:
    """A database answers the look-up: the token, and the position of the snapshot (rule 4)."""
    if s.lookup is None or s.lookup.read is not None:
        return
    for database in s.databases:
        # Answers other than VALID may come late.
        if not deletion(database.log):
            yield s._replace(lookup=s.lookup._replace(read=database.log))


def joins_lookup(s: State, _: World) -> Iterator[State]:
    """A verify that begins after Delete's answer, under a live lease, shares the look-up."""
    if s.lookup is not None and s.lease and s.delete == ANSWERED and not s.lookup.late:
        yield s._replace(lookup=s.lookup._replace(joined=True))


def takes_answer(s: State, w: World) -> Iterator[State | Violation]:
    """The look-up returns: call and cache accept it if its position is known (rules 4, 12)."""
    found = s.lookup
    if found is None or found.read is None or s.applied is UNREGISTERED:
        return
    bare = w.broken & {"12 bare numbers", "12 a look-up of any later revision is accepted"}
    position_known = s.applied.startswith(found.read)
    answers = (position_known or bool(bare)) and (
        len(found.read) >= found.began or "4 a call's own answer not checked" in w.broken
    )
    caches = position_known and not deletion(s.applied[len(found.read) :])
    if bare or "12 a verdict of an unknown position is cached" in w.broken:
        caches = caches or not deletion(s.applied[len(found.read) :])
    if (found.late and answers) or (found.joined and caches):
        yield Violation(GUARANTEE)
    if answers or caches:
        yield s._replace(lookup=None, cache=s.cache or caches)


def loses_lookup(s: State, _: World) -> Iterator[State]:
    """The look-up is lost, or rejected."""
    if s.lookup is not None:
        yield s._replace(lookup=None)


def time_passes(s: State, _: World) -> Iterator[State]:
    """A tick passes."""
    old, new = s.databases
    renewal = s.renewal - 1 if s.renewal > 0 else IDLE
    yield s._replace(
        databases=(
            old._replace(quiet=max(old.quiet - 1, 0)),
            new._replace(quiet=max(new.quiet - 1, 0)),
        ),
        delete=s.delete - (s.delete > 0),
        lease=s.lease - (s.lease > 0),
        renewal=renewal or IDLE,
        log_read=s.log_read and renewal > 0,
    )


# ---- Small helpers ----


def writable(s: State, x: int) -> bool:
    """Return whether database `x` accepts writes; a deposed primary does, without making them
    durable.
    """
    return x == OLD or s.standby == PROMOTED


def durable(s: State, x: int, w: World) -> bool:
    """Return whether database `x` reports a commit as durable."""
    if x == NEW or s.standby == PROMOTED:
        return x == NEW and s.standby == PROMOTED
    return w.backup or s.standby == FOLLOWING


def written(s: State, x: int, **changes: Any) -> State:
    """Return `s` with a write to database `x`, which a connected standby receives."""
    database = s.databases[x]._replace(**changes)
    if s.standby == FOLLOWING:
        return s._replace(databases=(database, database))
    return s._replace(
        databases=(database, s.databases[NEW]) if x == OLD else (s.databases[OLD], database)
    )


def deletion(log: str) -> bool:
    """Return whether a log, or a part of one, names the token."""
    return "O" in log or "N" in log


def position_of_deletion(s: State) -> str:
    """Return the position of the deletion that Delete waits for, which is durable."""
    log = s.databases[NEW].log if deletion(s.databases[NEW].log) else s.databases[OLD].log
    return log[: max(log.find("O"), log.find("N")) + 1]


def knows(log: str, applied: str, w: World) -> bool:
    """Return whether a history contains the position applied so far (rule 12)."""
    if "12 bare numbers" in w.broken:
        return len(log) >= len(applied)
    return log.startswith(applied)


def caught_up(s: State, x: int) -> State:
    """Return `s` with the log of database `x` applied."""
    assert s.applied is not UNREGISTERED
    log = s.databases[x].log
    return s._replace(applied=log, cache=s.cache and not deletion(log[len(s.applied) :]))


def lost(s: State, w: World) -> State:
    """Return `s` with row or history lost: empty cache, no lease, registration required (rule
    12)."""
    lease = s.lease if "12 lease kept after the loss of the history" in w.broken else 0
    return s._replace(applied=UNREGISTERED, cache=False, lease=lease)


ACTIONS: tuple[Action, ...] = (
    standby_is_cut_off,
    standby_catches_up,
    standby_is_promoted,
    changes_another,
    deletes,
    answers_by_acknowledgement,
    answers_by_waiting,
    removes_row,
    registers,
    renews,
    reads_log,
    dies,
    answers_from_memory,
    sends_lookup,
    reads_token,
    joins_lookup,
    takes_answer,
    loses_lookup,
    time_passes,
)

# A call that is repeated, and reads first.
REPEATS: tuple[Action, ...] = (finds_change, settles)

# These actions occur only where rules are broken.
AGAINST_THE_RULES = (reads_clock, reads_log_to_renew, updates_row)

# The actions of normal operation, which must be enough for Delete to end by acknowledgement.
HEALTHY = (registers, renews, answers_by_acknowledgement)

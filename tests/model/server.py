"""One server process with its row, cache and look-ups, and one Delete.

Rules 1 to 5 and 8 to 11. The token under test is created and may be deleted, and there may be one
change of another token, before or after that. The process may pause for any time between any two
steps (time passes meanwhile), die and restart, and lose its row; a look-up may be answered after
any time, or never. watch.py models its clients.

Time passes in ticks. A state contains no times, only countdowns: the rest of a lease or of a wait.
That is enough, because the rules never compare clocks with each other. T is TICKS ticks, and
between two ticks, events occur in every order.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.explore import Model, Violation
from tests.model.server_state import (
    AFTER_DELETE,
    ANSWERED,
    APPLIED_HERE,
    BEFORE,
    CREATED,
    DELETED,
    DOWN,
    EARLY,
    GUARANTEE,
    IDLE,
    LEMMA,
    NAMES,
    NO_ROW,
    NOT_WATCHED,
    NOTHING,
    REGISTERING,
    TICKS,
    UNKNOWN,
    UP,
    VALID,
    Lookup,
    State,
    World,
)


def model(*broken: str, other_changes: int = 1) -> Model:
    """Return the model, with the rules named in `broken` broken."""
    actions = ACTIONS + AGAINST_THE_RULES if broken else ACTIONS
    return Model(State(), actions, World(frozenset(broken), other_changes), NAMES)


# ---- The database and those who change it ----


def creates(s: State, _: World) -> Iterator[State]:
    """Create answers: the token exists."""
    if not s.created:
        yield s._replace(created=True)


def begins_to_delete(s: State, w: World) -> Iterator[State]:
    """Delete begins its transaction."""
    if not s.created or s.deleted or s.drawn or s.delete != BEFORE:
        return
    if "1 revision from a sequence" in w.broken:
        yield s._replace(drawn=s.head + 1)
    if "8 wait counted from before the commit" in w.broken:
        yield s._replace(delete=w.wait)


def deletes(s: State, w: World) -> Iterator[State]:
    """Delete commits, and begins to wait (rules 1 and 8).

    The counter's row is locked until the commit, so for all others, taking a revision and
    committing it are one step.
    """
    if not s.created or s.deleted:
        return
    revision = s.drawn or s.head + 1
    wait = s.delete if s.delete >= 0 else w.wait
    yield s._replace(head=max(s.head, revision), deleted=revision, delete=wait, drawn=0)


def changes_another(s: State, w: World) -> Iterator[State]:
    """A change of another token commits (rule 1)."""
    made = s.head - bool(s.deleted)
    if made < w.other_changes:
        yield s._replace(head=max(s.head, s.drawn) + 1)


def answers_by_acknowledgement(s: State, w: World) -> Iterator[State]:
    """Delete answers: every existing row has acknowledged its revision (rule 8)."""
    acknowledged = s.row == NO_ROW or s.row >= s.deleted
    if s.deleted and s.delete >= 0 and (acknowledged or "8 no wait" in w.broken):
        yield s._replace(delete=ANSWERED)


def answers_by_waiting(s: State, _: World) -> Iterator[State]:
    """Delete answers: T has passed since its commit (rule 8)."""
    if s.deleted and s.delete == 0:
        yield s._replace(delete=ANSWERED)


def tries_delete_again(s: State, w: World) -> Iterator[State]:
    """Delete is called again, because its caller or server gave up: a new wait begins (rule 8)."""
    if s.deleted and s.delete >= 0:
        retried = ANSWERED if "8 a retry answers at once" in w.broken else w.wait
        yield s._replace(delete=retried)


def watches_row(s: State, _: World) -> Iterator[State]:
    """A watcher reads the row's `renewal`, and starts to observe it (rule 9)."""
    if s.row != NO_ROW and s.watch == NOT_WATCHED:
        yield s._replace(watch=TICKS)


def removes_row(s: State, w: World) -> Iterator[State]:
    """A watcher that has seen `renewal` unchanged for T removes the row, if the value is still the
    same (rule 9).

    If the watcher sees another value, a renewal has ended its observation.
    """
    if s.watch == 0 or (s.watch > 0 and "9 row not watched for T" in w.broken):
        yield s._replace(row=NO_ROW, watch=NOT_WATCHED)


def prunes_log(s: State, w: World) -> Iterator[State]:
    """Entries that every row has acknowledged are pruned from the log (rule 11).

    This happens at once, instead of after 10 T, because the guarantee does not depend on that
    delay.
    """
    to = s.head if s.row == NO_ROW or "11 unacknowledged entries pruned" in w.broken else s.row
    if to > s.log_start:
        yield s._replace(log_start=to)


# ---- The process: its row and its lease ----


def begins_to_register(s: State, _: World) -> Iterator[State]:
    """The process begins to register: its transaction has read `head` (rule 2)."""
    if s.phase == DOWN:
        yield s._replace(phase=REGISTERING, applied=s.head, history=s.head)


def registers(s: State, w: World) -> Iterator[State]:
    """The registration commits: the row exists, the cache is empty, and there is no lease yet
    (rule 2).

    `head` may have changed since it was read. So a lease requires a renewal, which reads the log at
    a time when Delete can see the row.
    """
    if s.phase == REGISTERING:
        kept = w.broken & {"2 reads before it registers", "3 cache kept after the loss of the row"}
        cache = s.cache if kept else NOTHING
        lease = TICKS if "3 registration gives a lease" in w.broken else 0
        yield s._replace(
            phase=UP, row=s.applied, watch=NOT_WATCHED, cache=cache, lease=lease, checked=False
        )


def reads_clock(s: State, w: World) -> Iterator[State]:
    """A renewal begins: the process reads its clock, t0 (rule 3)."""
    log_first = 2 if "3 clock read after the log" in w.broken else 0
    if s.phase == UP and s.renewal == IDLE and s.log_read == log_first:
        yield s._replace(renewal=TICKS)


def reads_log(s: State, w: World) -> Iterator[State]:
    """The renewal reads the log up to head and applies it (rule 3).

    Reading and applying are one step. If the log contains the deletion, applying it later is
    equivalent to reading it later. If not, applying it does not affect the token.
    """
    begun = s.renewal != IDLE or "3 clock read after the log" in w.broken
    if s.phase != UP or s.log_read == 2 or not begun:
        return
    if "3 head read after the entries" not in w.broken:
        yield applied(s, w)._replace(log_read=2)
    elif s.log_read == 0:
        yield applied(s, w)._replace(applied=s.applied, log_read=1)
    else:
        yield s._replace(applied=s.head, log_read=2)
    if "10 log read only after a notification" in w.broken:
        yield s._replace(log_read=2)


def applied(s: State, w: World) -> State:
    """Return `s` with the log applied up to head: drop the named tokens, or all if entries are
    missing.
    """
    cache, history = s.cache, s.history if s.lookup else s.head
    if s.log_start > s.applied and "11 pruning not detected" not in w.broken:
        cache, history = NOTHING, s.head
    elif max(s.applied, s.log_start) < s.deleted <= s.head:
        cache = NOTHING
    return s._replace(applied=s.head, history=history, cache=cache)


def updates_row(s: State, w: World) -> Iterator[State]:
    """The renewal updates the row, and its lease runs from t0; or there is no row (rule 3).

    The statement and its answer are one step, because a process that receives the answer later can
    do no more in the meantime than one that receives it at once. The answer may be lost.
    """
    if s.renewal == IDLE or s.log_read != 2:
        return
    done = s._replace(renewal=IDLE, log_read=0)
    if s.row == NO_ROW:
        if "3 a renewal without a row succeeds" in w.broken:
            yield done._replace(lease=max(s.lease, s.renewal))
        else:
            cache = s.cache if "3 cache kept after the loss of the row" in w.broken else NOTHING
            yield done._replace(
                phase=DOWN, applied=0, history=0, cache=cache, lease=0, checked=False
            )
        return
    row = s.head if "3 acknowledges head unread" in w.broken else s.applied
    watch = s.watch if "9 `renewal` not compared" in w.broken else NOT_WATCHED
    yield done._replace(row=row, watch=watch)
    yield done._replace(row=row, watch=watch, lease=max(s.lease, s.renewal))


def hears_notification(s: State, w: World) -> Iterator[State]:
    """A notification arrives and counts as a renewal (against rule 10)."""
    if s.phase == UP and s.row != NO_ROW and "10 a notification extends the lease" in w.broken:
        yield s._replace(lease=TICKS)


def trims_history(s: State, _: World) -> Iterator[State]:
    """The cache drops the names of older revisions, to limit its size (rule 4)."""
    if s.phase == UP and s.history < s.applied:
        yield s._replace(history=s.applied)


def dies(s: State, _: World) -> Iterator[State]:
    """The process dies.

    The row stays, and Delete waits until it is removed. With an immediate removal, Delete answers
    sooner. That does not hide a violation, because a dead process does not answer from the cache.
    (Its clients might: see watch.py.)
    """
    if s.phase != DOWN:
        yield State(
            created=s.created,
            head=s.head,
            deleted=s.deleted,
            log_start=s.log_start,
            delete=s.delete,
        )


# ---- The process: its answers ----


def lateness(s: State) -> int:
    """Return how late a verify is if it begins now."""
    if s.delete == ANSWERED:
        return AFTER_DELETE
    return APPLIED_HERE if s.deleted and s.applied >= s.deleted and s.phase == UP else EARLY


def promised(late: int) -> Iterator[Violation]:
    """Yield the promises that are broken if a verify that began so late answers VALID."""
    if late != EARLY:
        yield Violation(GUARANTEE if late == AFTER_DELETE else LEMMA)


def finds_lease_live(s: State, w: World) -> Iterator[State]:
    """A verify begins after Delete's answer, reads the clock, and finds the lease live (rule 5).

    It may read the cache later.
    """
    late = s.delete == ANSWERED or "5 clock read before the call" in w.broken
    live = s.lease or "5 cache used without a lease" in w.broken
    if late and live and not s.checked and "5 cache read before the clock" not in w.broken:
        yield s._replace(checked=True)


def answers_from_memory(s: State, w: World) -> Iterator[State | Violation]:
    """It reads the cache, and returns the cached answer (rule 5)."""
    if s.checked and s.delete == ANSWERED and "5 cache read before the clock" not in w.broken:
        if s.cache == VALID:
            yield Violation(GUARANTEE)
        yield s._replace(checked=False)


def takes_from_memory_first(s: State, w: World) -> Iterator[State]:
    """A verify begins after Delete's answer, and reads VALID from the cache (against rule 5)."""
    if "5 cache read before the clock" in w.broken and s.delete == ANSWERED and s.cache == VALID:
        yield s._replace(checked=True)


def finds_lease_live_then(s: State, w: World) -> Iterator[Violation]:
    """It reads the clock, and finds the lease live (against rule 5)."""
    if "5 cache read before the clock" in w.broken and s.checked and s.lease:
        yield Violation(GUARANTEE)


def answers_early_from_memory(s: State, _: World) -> Iterator[State | Violation]:
    """A verify begins before Delete's answer, and is answered from the cache (rule 5)."""
    if s.lease == 0 or s.delete == ANSWERED:
        return
    if s.cache == VALID:
        yield Violation(LEMMA) if lateness(s) == APPLIED_HERE else s
    if s.cache == UNKNOWN and s.created:
        yield Violation(CREATED)


def sends_lookup(s: State, w: World) -> Iterator[State]:
    """A verify under a live lease finds nothing in the cache, and sends a look-up (rule 5)."""
    early = "2 reads before it registers" in w.broken and s.phase != UP
    if s.lookup is None and ((s.phase == UP and s.lease) or early):
        began = s.applied if "4 shared by the time of sending" in w.broken else 0
        yield s._replace(lookup=Lookup(caller=lateness(s), began=began), history=s.applied)


def reads_row(s: State, w: World) -> Iterator[State]:
    """The database answers the look-up: the row, and the revision in the same snapshot (rule 4)."""
    found = s.lookup
    if found is None:
        return
    if found.found == NOTHING:
        if s.created and not s.deleted:
            yield s._replace(lookup=found._replace(found=VALID, revision=s.head))
        else:
            # An answer may come late if it is not VALID.
            what = DELETED if s.created else UNKNOWN
            yield s._replace(lookup=Lookup(what, s.head))
    elif "4 revision read after the row" in w.broken and found.revision < s.head:
        yield s._replace(lookup=found._replace(revision=s.head))


def joins_lookup(s: State, w: World) -> Iterator[State | Violation]:
    """A verify that begins later, under a live lease, shares the look-up (rule 4)."""
    found, late = s.lookup, lateness(s)
    if found is None or not s.lease:
        return
    if found.found == UNKNOWN and s.created and "4 UNKNOWN is shared" in w.broken:
        yield Violation(CREATED)
    if late > found.joined and found.found in {NOTHING, VALID}:
        if "4 shared by the time of sending" in w.broken and found.began < s.deleted <= s.applied:
            return
        yield s._replace(lookup=found._replace(joined=late))


def takes_answer(s: State, w: World) -> Iterator[State | Violation]:
    """The look-up returns to its call, and if rule 4 allows it, to other calls and the cache."""
    found = s.lookup
    if found is None or found.found == NOTHING:
        return
    admitted = admits(s, w, found.revision)
    shared = w.broken & {"4 shared without a check", "4 shared by the time of sending"}
    if found.found == VALID:
        yield from promised(found.caller)
        if admitted or shared:
            yield from promised(found.joined)
    cache = s.cache
    # Verdicts other than VALID may be cached too. UNKNOWN may not, because no revision would ever
    # end it.
    if admitted and (found.found != UNKNOWN or "4 UNKNOWN is cached" in w.broken):
        cache = found.found
    yield s._replace(lookup=None, cache=cache, history=s.applied)


def admits(s: State, w: World, revision: int) -> bool:
    """Return whether a verdict read at `revision` still holds at the applied revision (rule 4)."""
    if "4 no fill rule" in w.broken:
        return True
    if s.phase != UP:
        return "2 reads before it registers" in w.broken
    if revision >= s.applied:
        return True
    knows = s.history <= revision or "4 trimmed entries count as unnamed" in w.broken
    # The trimmed part may have named the token.
    named = max(revision, s.history) < s.deleted <= s.applied
    return knows and not named


def loses_lookup(s: State, _: World) -> Iterator[State]:
    """The look-up is lost."""
    if s.lookup is not None:
        yield s._replace(lookup=None, history=s.applied)


# ---- Time ----


def time_passes(s: State, _: World) -> Iterator[State]:
    """A tick passes."""
    renewal, log_read = s.renewal - (s.renewal > 0), s.log_read
    if renewal == 0:
        # This renewal can no longer extend the lease. The next one can do everything else that it
        # could.
        renewal, log_read = IDLE, 0
    yield s._replace(
        watch=s.watch - (s.watch > 0),
        delete=s.delete - (s.delete > 0),
        lease=s.lease - (s.lease > 0),
        renewal=renewal,
        log_read=log_read,
    )


ACTIONS = (
    creates,
    deletes,
    changes_another,
    answers_by_acknowledgement,
    answers_by_waiting,
    tries_delete_again,
    watches_row,
    removes_row,
    prunes_log,
    begins_to_register,
    registers,
    reads_clock,
    reads_log,
    updates_row,
    trims_history,
    dies,
    finds_lease_live,
    answers_from_memory,
    answers_early_from_memory,
    sends_lookup,
    reads_row,
    joins_lookup,
    takes_answer,
    loses_lookup,
    time_passes,
)

# These actions occur only where rules are broken.
AGAINST_THE_RULES = (
    begins_to_delete,
    hears_notification,
    takes_from_memory_first,
    finds_lease_live_then,
)

# The actions of normal operation, which must be enough for Delete to end by acknowledgement.
HEALTHY = (
    begins_to_register,
    registers,
    reads_clock,
    reads_log,
    updates_row,
    answers_by_acknowledgement,
)

"""The states of the model in server.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tests.model.explore import replaced_quickly

TICKS = 2

# The row, and another process's observation of it.
NO_ROW = -1
NOT_WATCHED = -1
# Delete. In between, the number is the ticks still to wait.
BEFORE, ANSWERED = -1, -2
# The process.
DOWN, REGISTERING, UP = range(3)
IDLE = -1
# The result of a look-up, and the token's entry in the cache.
NOTHING, VALID, DELETED, UNKNOWN = range(4)
# How late a verify began, which decides whether it may still return VALID.
EARLY, APPLIED_HERE, AFTER_DELETE = range(3)

GUARANTEE = "Delete had answered before this verify began, and it answers VALID"
LEMMA = "this process had applied the deletion before this verify began, and it answers VALID"
CREATED = "Create had answered before this verify began, and it answers UNKNOWN"


class Lookup(NamedTuple):
    """A look-up in progress: sent, and from `found` on, answered and not yet received."""

    found: int = NOTHING
    revision: int = 0  # of the snapshot in which the row was read
    caller: int = EARLY  # how late the verify that sent it began
    joined: int = EARLY  # how late the verifies that share it began, at the latest
    began: int = 0  # the revision applied when it was sent; kept only where rule 4 is misread


@replaced_quickly
class State(NamedTuple):
    """The complete state at one instant."""

    # The database.
    created: bool = False
    head: int = 0
    deleted: int = 0  # the deletion's revision; 0 before it
    log_start: int = 0  # the log holds the revisions (log_start, head]
    row: int = NO_ROW  # acknowledged_revision
    watch: int = NOT_WATCHED  # ticks until a watcher has seen `renewal` unchanged for T
    # The deleter.
    delete: int = BEFORE
    drawn: int = 0  # only where rule 1 is broken: a revision that was taken but not committed
    # The process.
    phase: int = DOWN
    applied: int = 0  # while registering: the head that the registration has read
    # The cache knows the tokens that (history, applied] name. It does not need the names from
    # before the current look-up was sent.
    history: int = 0
    cache: int = NOTHING
    lease: int = 0  # ticks left
    renewal: int = IDLE  # ticks left of the lease that this renewal is for; runs from its t0
    log_read: int = 0  # 2 once the renewal has read the log; 1 only where rule 3 is broken
    lookup: Lookup | None = None
    checked: bool = False  # a late verify has found the lease live; next it reads the cache


@dataclass(frozen=True)
class World:
    """The parameters of a run."""

    broken: frozenset[str] = frozenset()
    other_changes: int = 1

    @property
    def wait(self) -> int:
        """Return the ticks that Delete waits."""
        return TICKS - ("8 wait shorter than T" in self.broken)


LATENESS = {EARLY: "early", APPLIED_HERE: "late here", AFTER_DELETE: "after Delete's answer"}
NAMES = {
    "row": {NO_ROW: "none"},
    "watch": {NOT_WATCHED: "none"},
    "delete": {BEFORE: "not begun", ANSWERED: "answered"},
    "phase": {DOWN: "down", REGISTERING: "registering", UP: "up"},
    "renewal": {IDLE: "idle"},
    "cache": {NOTHING: "empty", VALID: "VALID", DELETED: "DELETED", UNKNOWN: "UNKNOWN"},
    "found": {NOTHING: "nothing yet", VALID: "VALID", DELETED: "DELETED", UNKNOWN: "UNKNOWN"},
    "caller": LATENESS,
    "joined": LATENESS,
}

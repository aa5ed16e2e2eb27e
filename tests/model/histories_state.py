"""The states of the model in histories.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.model.explore import replaced_quickly

OLD, NEW = 0, 1
# The standby: follows the old primary, is disconnected, or is the primary.
FOLLOWING, CUT_OFF, PROMOTED = range(3)
NO_ROW = -1
BEFORE, ANSWERED = -1, -2  # Delete; in between, the ticks still to wait
UNREGISTERED = None
IDLE = -1
DELETION = ("O", "N")
OTHER = ("o", "n")

GUARANTEE = "Delete had answered before this verify began, and it answers VALID"


@replaced_quickly
class Database(NamedTuple):
    """What readers of a database see."""

    log: str = ""
    row: int = NO_ROW  # acknowledged_revision of the process
    quiet: int = 0  # ticks until the row has gone unrenewed for T


class Lookup(NamedTuple):
    """A look-up in progress: sent, or answered and not yet received."""

    read: str | None = None  # the log in the snapshot that showed the token
    began: int = 0  # the revision applied when it was sent
    late: bool = False  # Delete had answered before the verify that sent it began
    joined: bool = False  # a verify that began after Delete's answer shares it


@replaced_quickly
class State(NamedTuple):
    """The complete state at one instant."""

    standby: int = FOLLOWING
    databases: tuple[Database, Database] = (Database(), Database())
    delete: int = BEFORE
    found: bool = False  # a repeated call has read the deletion where it is not durable
    # The process.
    applied: str | None = UNREGISTERED
    cache: bool = False  # holds VALID
    lease: int = 0
    lookup: Lookup | None = None
    renewal: int = IDLE  # only where a renewal is two statements: the rest of its lease
    log_read: bool = False  # only where a renewal is two statements


@dataclass(frozen=True)
class World:
    """The parameters of a run."""

    broken: frozenset[str]
    ticks: int
    others: tuple[str, ...]  # changes of another token that may happen
    backup: bool  # what is durable on the old primary may be missing on the new one


NAMES: Mapping[str, Mapping[Any, str]] = {
    "standby": {FOLLOWING: "following", CUT_OFF: "cut off", PROMOTED: "promoted"},
    "row": {NO_ROW: "none"},
    "delete": {BEFORE: "not begun", ANSWERED: "answered"},
    "applied": {UNREGISTERED: "unregistered", "": "nothing"},
    "log": {"": "empty"},
    "read": {None: "not yet", "": "nothing"},
    "renewal": {IDLE: "idle"},
}

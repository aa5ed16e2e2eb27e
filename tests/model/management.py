"""Two databases, and a token that only one of them has. Rule 12: timelines, NOT_FOUND, ghosts.

Creating a token takes no revision, so a position does not show which history has the token. Two
errors are possible after a failover:

- The new primary creates a token, and a deposed primary at the same position does not have it. A
  process that reads there must not answer NOT_FOUND.
- The old primary shows a token that its standby never received: a ghost. It may be in a cache, but
  a Delete on the new primary cannot find it.

The timeline that Postgres reports prevents both. Logs and positions are represented as in
histories.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from tests.model.explore import Action, Model, Violation, replaced_quickly
from tests.model.histories_state import CUT_OFF, FOLLOWING, NEW, OLD, OTHER, PROMOTED, UNREGISTERED

T = TypeVar("T")

NOBODY = -1
IDLE, SENT = -2, -1  # a read; then the database that has answered it

NOT_FOUND = "The token was created before this call began, and the answer is NOT_FOUND"
GHOST = "The lease is from a history without the token, and a verify answers VALID"


class Read(NamedTuple):
    """A read in progress: a look-up that finds the token, or a management call that does not."""

    at: int = IDLE
    log: str = ""  # in its snapshot
    timeline: int = 0
    owed: bool = False  # for a management call: NOT_FOUND would be wrong
    began: int = 0  # the revision applied when it was sent


@replaced_quickly
class State(NamedTuple):
    """The complete state at one instant."""

    standby: int = FOLLOWING
    logs: tuple[str, str] = ("", "")
    has_token: tuple[bool, bool] = (False, False)
    created: bool = False  # Create has answered
    settling: int = 0  # ticks until T has passed since the promotion
    # The process.
    applied: str | None = UNREGISTERED
    timeline: int = 0
    lease: int = 0
    leased_by: int = NOBODY
    cache: bool = False  # holds VALID
    lookup: Read = Read()
    call: Read = Read()


@dataclass(frozen=True)
class World:
    """The parameters of a run."""

    broken: frozenset[str]
    ticks: int


def model(*broken: str, ticks: int = 1) -> Model:
    """Return the model, with the rules named in `broken` broken."""
    return Model(State(), ACTIONS, World(frozenset(broken), ticks), NAMES)


# ---- The databases ----


def standby_is_cut_off(s: State, _: World) -> Iterator[State]:
    """The standby is disconnected: later commits of the old primary are not durable."""
    if s.standby == FOLLOWING:
        yield s._replace(standby=CUT_OFF)


def standby_is_promoted(s: State, w: World) -> Iterator[State]:
    """The standby becomes the primary, on a new timeline. The old primary stays up."""
    if s.standby != PROMOTED:
        yield s._replace(standby=PROMOTED, settling=w.ticks)


def changes_another(s: State, _: World) -> Iterator[State]:
    """A change of another token commits, or is visible without being durable (rule 1)."""
    for x in writable(s):
        if OTHER[x] not in s.logs[x]:
            yield s._replace(logs=put(s, s.logs, x, s.logs[x] + OTHER[x]))


def creates(s: State, _: World) -> Iterator[State]:
    """Create commits and answers; a token whose commit is not durable is visible nonetheless."""
    for x in writable(s):
        if not any(s.has_token):
            created = put(s, s.has_token, x, True)
            yield s._replace(has_token=created, created=durable(s, x))


# ---- The process ----


def registers(s: State, _: World) -> Iterator[State]:
    """The process registers, with an empty cache and no lease (rule 2)."""
    for x in writable(s):
        if s.applied is UNREGISTERED and durable(s, x):
            yield s._replace(applied=s.logs[x], timeline=timeline(s, x))


def renews(s: State, w: World) -> Iterator[State]:
    """The process renews its lease, and adopts the timeline of the database (rules 3 and 12)."""
    for x in writable(s):
        if s.applied is UNREGISTERED:
            return
        if not s.logs[x].startswith(s.applied):
            yield lost(s)
        elif durable(s, x):
            # The log does not name the token.
            kept = timeline(s, x) == s.timeline or "12 cache kept on another timeline" in w.broken
            yield s._replace(
                applied=s.logs[x],
                timeline=timeline(s, x),
                lease=w.ticks,
                leased_by=x,
                cache=s.cache and kept,
            )


def loses_row(s: State, _: World) -> Iterator[State]:
    """The process finds its row missing, and must register."""
    if s.applied is not UNREGISTERED:
        yield lost(s)


def reads_log(s: State, w: World) -> Iterator[State]:
    """The process reads only the log, and ignores one of another timeline (rule 12).

    Only a renewal adopts a timeline, together with its lease.
    """
    for x in (OLD, NEW):
        if s.applied is UNREGISTERED:
            return
        if not s.logs[x].startswith(s.applied):
            yield lost(s)
        elif timeline(s, x) == s.timeline:
            yield s._replace(applied=s.logs[x])
        elif "12 a log read adopts a timeline and keeps the lease" in w.broken:
            yield s._replace(applied=s.logs[x], timeline=timeline(s, x), cache=False)


# ---- Its answers ----


def answers_from_memory(s: State, _: World) -> Iterator[State | Violation]:
    """A verify is answered from the cache, under the lease (rule 5)."""
    if s.cache and s.lease:
        if is_ghost(s):
            yield Violation(GHOST)
        yield s


def sends_lookup(s: State, _: World) -> Iterator[State]:
    """A verify under a live lease sends a look-up (rule 5)."""
    if s.lookup.at == IDLE and s.lease and s.applied is not UNREGISTERED:
        yield s._replace(lookup=Read(SENT, began=len(s.applied), owed=s.leased_by == NEW))


def sends_call(s: State, w: World) -> Iterator[State]:
    """A management call reaches the process, under a lease or not (rule 12)."""
    if s.call.at == IDLE and s.applied is not UNREGISTERED:
        led = s.settling == 0 or (s.lease > 0 and s.leased_by == NEW)
        owed = s.created and (led if s.standby == PROMOTED else True)
        yield s._replace(call=Read(SENT, began=len(s.applied), owed=owed))


def reads_token(s: State, w: World) -> Iterator[State]:
    """A database answers: the token or not, and position and timeline of the snapshot (rule 12).

    A standby reports no timeline, so its answers are rejected. It may show less than it has
    received, and so lack a token whose Create has answered.
    """
    for x in (OLD, NEW):
        in_recovery = x not in writable(s)
        if in_recovery and "12 a read of a standby is accepted" not in w.broken:
            continue
        found: dict[str, Any] = {"at": x, "log": s.logs[x], "timeline": timeline(s, x)}
        if s.lookup.at == SENT and s.has_token[x]:
            yield s._replace(lookup=s.lookup._replace(**found))
        if s.call.at == SENT and (in_recovery or not s.has_token[x]):
            yield s._replace(call=s.call._replace(**found))


def takes_verdict(s: State, w: World) -> Iterator[State | Violation]:
    """The look-up returns: the call and the cache accept it if rules 4 and 12 allow that."""
    if s.lookup.at >= 0 and believed(s, s.lookup, w):
        # A verify that began under a lease of the old primary may still answer either way.
        if s.lookup.owed and is_ghost(s):
            yield Violation(GHOST)
        yield s._replace(lookup=Read(), cache=True)


def answers_not_found(s: State, w: World) -> Iterator[State | Violation]:
    """The management call returns NOT_FOUND if the read is accepted, under a lease (rule 12)."""
    if s.call.at < 0:
        return
    unchecked = "12 NOT_FOUND without a lease" in w.broken
    if (s.lease or unchecked) and believed(s, s.call, w):
        if s.call.owed:
            yield Violation(NOT_FOUND)
        yield s._replace(call=Read())


def loses_read(s: State, _: World) -> Iterator[State]:
    """A read is lost, or rejected."""
    if s.lookup.at != IDLE:
        yield s._replace(lookup=Read())
    if s.call.at != IDLE:
        yield s._replace(call=Read())


def time_passes(s: State, _: World) -> Iterator[State]:
    """A tick passes."""
    lease = max(s.lease - 1, 0)
    yield s._replace(
        settling=max(s.settling - 1, 0),
        lease=lease,
        leased_by=s.leased_by if lease else NOBODY,
    )


# ---- Small helpers ----


def writable(s: State) -> tuple[int, ...]:
    """Return the databases that accept writes."""
    return (OLD, NEW) if s.standby == PROMOTED else (OLD,)


def durable(s: State, x: int) -> bool:
    """Return whether a commit on database `x` survives."""
    return s.standby == PROMOTED if x == NEW else s.standby == FOLLOWING


def put(s: State, pair: tuple[T, T], x: int, value: T) -> tuple[T, T]:
    """Return `pair` with a write to database `x`, which a connected standby receives."""
    if s.standby == FOLLOWING:
        return (value, value)
    return (value, pair[NEW]) if x == OLD else (pair[OLD], value)


def timeline(s: State, x: int) -> int:
    """Return the timeline that database `x` reports."""
    return 1 + (x == NEW and s.standby == PROMOTED)


def lost(s: State) -> State:
    """Return `s` with row or history lost: empty cache, no lease (rule 12)."""
    return s._replace(applied=UNREGISTERED, timeline=0, lease=0, leased_by=NOBODY, cache=False)


def is_ghost(s: State) -> bool:
    """Return whether the lease is from the new primary, which does not have the token."""
    return s.leased_by == NEW and not s.has_token[NEW]


def believed(s: State, read: Read, w: World) -> bool:
    """Return whether a read is from the history and timeline that the process follows."""
    if s.applied is UNREGISTERED:
        return False
    if read is s.call and "12 NOT_FOUND without a position" in w.broken:
        return True
    if read.timeline != s.timeline and "12 a read of another timeline is accepted" not in w.broken:
        return False
    return s.applied.startswith(read.log) and len(read.log) >= read.began


ACTIONS: tuple[Action, ...] = (
    standby_is_cut_off,
    standby_is_promoted,
    changes_another,
    creates,
    registers,
    renews,
    loses_row,
    reads_log,
    answers_from_memory,
    sends_lookup,
    sends_call,
    reads_token,
    takes_verdict,
    answers_not_found,
    loses_read,
    time_passes,
)

NAMES: Mapping[str, Mapping[Any, str]] = {
    "standby": {FOLLOWING: "following", CUT_OFF: "cut off", PROMOTED: "promoted"},
    "applied": {UNREGISTERED: "unregistered", "": "nothing"},
    "leased_by": {NOBODY: "nobody", OLD: "the old primary", NEW: "the new primary"},
    "at": {IDLE: "idle", SENT: "sent", OLD: "the old primary", NEW: "the new primary"},
    "logs": {"": "empty"},
    "log": {"": "empty"},
}

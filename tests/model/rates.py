"""Rule 13: two verifiers that spend the calls of one token with a rate limit.

The rate r is one call in each tick. A verifier asks for calls, a database issues them, the answer
travels, and the verifier spends what has arrived. Everything may take any time, be lost, or be cut
short by a restart. The promise is the bound of docs/protocol.md: in any window of w ticks, at most
b + r * (w + S) verifies answer VALID, where S is how long an issued call can be spent.

`room` decides it for all windows at once. It is the level of a bucket that holds b + r * S, from
which each VALID takes one. It would fall below zero exactly if some window had too many.

With `leases`, Postgres may fail over once. The promoted standby may lack draws, and the old primary
stays up, so `extra` allows a further b + r * T, once.

Simplifications. Each allows more than the service does:

- A database issues any number of calls that it has, whatever the verifier needs.
- A verifier spends its calls in any order, and keeps them when it moves to another database.

The two verifiers have the same rules, so two states that differ only in which of them is which have
the same future. A state therefore lists its verifiers in order, and in a trace they may change
places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.model.cases import Broken, Kept
from tests.model.explore import Action, Model, Violation, replaced_quickly

__all__ = ["BROKEN", "KEPT"]

OLD, NEW = 0, 1
# Numbers, so that verifiers can be put in order.
NO_LEASE = -1
NOBODY = -1
UNREAD = -1
PROMISE = "more verifies answer VALID in some window than b + r * (w + S)"


@replaced_quickly
class Question(NamedTuple):
    """A question for calls under way."""

    age: int = 0  # in ticks, since before it was sent
    issued_by: int = NOBODY  # until a database has received it
    calls: int = 0
    seen: int = UNREAD  # only where a draw does not lock the bucket: what it has read


NO_QUESTION = Question(age=-1)


@replaced_quickly
class Verifier(NamedTuple):
    """A server, or a client whose questions a server passes on."""

    question: Question = NO_QUESTION
    # Numbers of calls, by the ticks for which they can still be spent.
    share: tuple[int, ...] = ()
    lease: int = NO_LEASE  # the ticks that are left
    database: int = OLD  # on whose history the lease is


@replaced_quickly
class State(NamedTuple):
    """The complete state at one instant."""

    room: int
    extra: int
    buckets: tuple[int, int]  # the calls that each database can issue
    verifiers: tuple[Verifier, Verifier]
    promoted: bool = False


@dataclass(frozen=True)
class World:
    """The parameters of a run."""

    broken: frozenset[str]
    burst: int
    share_ticks: int  # S
    lease_ticks: int  # T; 0: leases never end, and there is one database

    @property
    def room(self) -> int:
        """Return b + r * S."""
        return self.burst + self.share_ticks


def model(*broken: str, burst: int = 2, share_ticks: int = 2, lease_ticks: int = 0) -> Model:
    """Return the model, with the rules named in `broken` broken."""
    world = World(frozenset(broken), burst, share_ticks, lease_ticks)
    verifier = Verifier(share=_none(world), lease=_first_lease(world))
    first = State(world.room, 0, (burst, burst), (verifier, verifier))
    return Model(first, ACTIONS, world, {})


def asks(s: State, w: World) -> Iterator[State]:
    """A verifier asks for calls."""
    for n, one in enumerate(s.verifiers):
        if one.question == NO_QUESTION and (
            one.lease != NO_LEASE or "13 draws without a lease" in w.broken
        ):
            unlocked = "13 a draw does not lock the bucket" in w.broken
            seen = s.buckets[one.database] if unlocked else UNREAD
            yield _changed(s, n, one._replace(question=Question(seen=seen)))


def issues(s: State, w: World) -> Iterator[State]:
    """A database receives the question, and issues calls."""
    for n, one in enumerate(s.verifiers):
        if one.question == NO_QUESTION or one.question.issued_by != NOBODY:
            continue
        for database in (OLD, NEW) if s.promoted else (OLD,):
            seen = one.question.seen
            has = s.buckets[database] if seen == UNREAD else seen
            for calls in range(1, has + 1):
                buckets = list(s.buckets)
                buckets[database] = has - calls
                question = one.question._replace(issued_by=database, calls=calls, seen=UNREAD)
                after = s._replace(buckets=(buckets[OLD], buckets[NEW]))
                yield _changed(after, n, one._replace(question=question))


def receives(s: State, w: World) -> Iterator[State]:
    """A verifier receives the answer. The calls count only in time, and under the same history."""
    for n, one in enumerate(s.verifiers):
        if (question := one.question).issued_by == NOBODY:
            continue
        left = w.share_ticks - question.age
        if "13 calls are counted from the answer" in w.broken:
            left = w.share_ticks
        trusted = one.lease != NO_LEASE and question.issued_by == one.database
        if {"13 draws without a lease", "13 a lease is checked only before the draw"} & w.broken:
            trusted = question.issued_by == one.database
        if "13 a draw of another history counts" in w.broken:
            trusted = one.lease != NO_LEASE
        share = list(one.share)
        if left >= 0 and trusted:
            share[left] += question.calls
        again = "13 an answer counts twice" in w.broken and not sum(one.share)
        kept = question if again else NO_QUESTION
        yield _changed(s, n, one._replace(question=kept, share=tuple(share)))


def message_is_lost(s: State, _: World) -> Iterator[State]:
    """The question or its answer is lost."""
    for n, one in enumerate(s.verifiers):
        if one.question != NO_QUESTION:
            yield _changed(s, n, one._replace(question=NO_QUESTION))


def spends(s: State, w: World) -> Iterator[State]:
    """A verifier spends a call, and answers VALID."""
    for n, one in enumerate(s.verifiers):
        if one.lease == NO_LEASE and "13 draws without a lease" not in w.broken:
            continue  # rule 5
        for left, calls in enumerate(one.share):
            if not calls:
                continue
            share = list(one.share)
            share[left] -= 1
            after = _changed(s, n, one._replace(share=tuple(share)))
            if s.room:
                yield after._replace(room=s.room - 1)
            elif s.extra:
                yield after._replace(extra=s.extra - 1)
            else:
                yield Violation(PROMISE)  # type: ignore[misc]  # as in every model


def renews(s: State, w: World) -> Iterator[State]:
    """A verifier renews its lease. Only the primary's commits are durable."""
    if w.lease_ticks:
        for n, one in enumerate(s.verifiers):
            database = NEW if s.promoted else OLD
            yield _changed(s, n, one._replace(lease=w.lease_ticks, database=database))


def restarts(s: State, w: World) -> Iterator[State]:
    """A verifier restarts, and has nothing to spend."""
    for n, one in enumerate(s.verifiers):
        share = _none(w)
        if "13 a verifier begins with a burst" in w.broken:
            share = (*share[1:], w.burst)
        if "13 a restarted verifier counts its calls again from zero" in w.broken:
            share = (*share[1:], sum(one.share))
        yield _changed(s, n, Verifier(NO_QUESTION, share, _first_lease(w), one.database))


def fails_over(s: State, w: World) -> Iterator[State]:
    """The standby is promoted. It may lack any draws. The old primary stays up."""
    if w.lease_ticks and not s.promoted:
        allowed = w.burst + w.lease_ticks
        if "13 a failover adds nothing" in w.broken:
            allowed = 0
        for lacking in range(s.buckets[OLD], w.burst + 1):
            yield s._replace(promoted=True, extra=allowed, buckets=(s.buckets[OLD], lacking))


def time_passes(s: State, w: World) -> Iterator[State]:
    """A tick passes."""
    yield s._replace(
        room=min(s.room + 1, w.room),
        buckets=(min(s.buckets[OLD] + 1, w.burst), min(s.buckets[NEW] + 1, w.burst)),
        verifiers=_in_order(_older(s.verifiers[0], w), _older(s.verifiers[1], w)),
    )


ACTIONS: tuple[Action, ...] = (
    asks,
    issues,
    receives,
    message_is_lost,
    spends,
    renews,
    restarts,
    fails_over,
    time_passes,
)


def _older(one: Verifier, w: World) -> Verifier:
    question = one.question
    if question != NO_QUESTION:
        question = question._replace(age=question.age + 1)
        if question.age > w.share_ticks:
            # Too late. If the rule is kept, that is the same as a lost message.
            late = "13 calls are counted from the answer" in w.broken
            question = question._replace(age=w.share_ticks) if late else NO_QUESTION
    share = (*one.share[1:], 0)
    if "13 calls never end" in w.broken:
        share = one.share
    lease = max(one.lease - 1, NO_LEASE) if w.lease_ticks else one.lease
    return Verifier(question, share, lease, one.database)


def _none(w: World) -> tuple[int, ...]:
    return (0,) * (w.share_ticks + 1)


def _first_lease(w: World) -> int:
    return NO_LEASE if w.lease_ticks else 0


def _changed(s: State, number: int, verifier: Verifier) -> State:
    return s._replace(verifiers=_in_order(verifier, s.verifiers[1 - number]))


def _in_order(one: Verifier, other: Verifier) -> tuple[Verifier, Verifier]:
    return (one, other) if one <= other else (other, one)


FEW_CALLS = {"burst": 1, "share_ticks": 1}
LEASES = FEW_CALLS | {"lease_ticks": 1}

KEPT = (
    Kept(
        "rates",
        model(),
        3_000,
        {
            "both verifiers have calls, and the bucket is full again": (
                lambda s: s.buckets[OLD] == 2 and all(sum(one.share) for one in s.verifiers)
            ),
            "a window has as many verifies as the bound permits": lambda s: s.room == 0,
        },
        frozenset({"renews", "fails_over"}),
    ),
    Kept(
        "rates, two databases",
        model(**LEASES),
        28_000,
        {
            "the verifiers have calls of both databases": (
                lambda s: (
                    all(sum(one.share) and one.lease != NO_LEASE for one in s.verifiers)
                    and {one.database for one in s.verifiers} == {OLD, NEW}
                )
            ),
            "the whole allowance for a failover is used": (
                lambda s: s.promoted and s.room == 0 and s.extra == 0
            ),
        },
    ),
)


def _broken(name: str, steps: int, **configuration: int) -> Broken:
    return Broken(name, model(name, **configuration), steps)


BROKEN = (
    _broken("13 an answer counts twice", 8, **FEW_CALLS),
    _broken("13 calls are counted from the answer", 14, **FEW_CALLS),
    _broken("13 calls never end", 14, **FEW_CALLS),
    _broken("13 a draw does not lock the bucket", 13, **FEW_CALLS),
    _broken("13 a verifier begins with a burst", 6, **FEW_CALLS),
    _broken("13 a restarted verifier counts its calls again from zero", 15, **FEW_CALLS),
    _broken("13 draws without a lease", 28, **LEASES),
    _broken("13 a lease is checked only before the draw", 30, **LEASES),
    _broken("13 a draw of another history counts", 29, **LEASES),
    _broken("13 a failover adds nothing", 16, **LEASES),
)

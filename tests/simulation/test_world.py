"""No schedule of faults makes the classes that ship answer with a dead token; each rule counts."""

import contextlib
import math
from collections import Counter
from random import Random
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from latchkey_coherence.memory import Memory, Position
from latchkey_service.coherence import ack_rules, verifier_state
from latchkey_service.coherence.ack_rules import Census, Confirmation, Wait
from latchkey_service.coherence.verifier_state import Change, Log, Membership, Standing
from latchkey_service.coherence.watch_sessions import Grant, Watcher

from tests.simulation.database import Database
from tests.simulation.world import KINDS, World

STEPS = 250
# Tens of thousands were run when this was written; these many each time.
SEEDS = 400
# A broken rule showed within the first fifty of these.
SEEDS_FOR_A_MUTANT = 600


def run(seed: int, steps: int = STEPS) -> World:
    """Run a world of its own until the end, or until something stale was answered."""
    random = Random(seed)  # noqa: S311 - a schedule, not a secret
    world = World(random)
    for _ in range(steps):
        world.step(random.choice(world.kinds))
        if world.stale:
            break
    return world


def test_nothing_stale_is_ever_answered() -> None:
    """Of thousands of Deletes and verifies among faults, none is violated; and all that could be
    is there: answers from memory, deletions confirmed and waited out, processes that leave."""
    counts: Counter[str] = Counter()
    for seed in range(SEEDS):
        world = run(seed)
        assert not world.stale, (seed, world.stale)
        counts.update(world.counts)
    for what in (
        "valid",
        "deleted",
        "from a client's memory",
        "confirmed",
        "outwaited",
        "stopped in good order",
    ):
        assert counts[what] > SEEDS / 2, counts


class AnyOrder(RuleBasedStateMachine):
    """The same, with the order chosen by Hypothesis, which makes what fails short."""

    @initialize(seed=st.integers(0, 10_000))
    def begin(self, seed: int) -> None:
        self.world = World(Random(seed))  # noqa: S311 - a schedule, not a secret

    @rule(kind=st.sampled_from(KINDS))
    def step(self, kind: str) -> None:
        self.world.step(kind)

    @invariant()
    def nothing_stale(self) -> None:
        if hasattr(self, "world"):
            assert not self.world.stale


AnyOrder.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
test_in_any_order = AnyOrder.TestCase


def admit_anything(self: Memory[Any], key: bytes, entry: Any, position: Position) -> bool:
    """Rule 4, without the fill rule."""
    return admit(self, key, entry, self.position)


admit = Memory.admit
take = Watcher.take


def keep_the_memory(
    self: Any, position: Position, acknowledged: int, server: Any, now: float
) -> None:
    """Rule 3, a row that is gone, without emptying the memory."""
    self.memory._marks[position.revision] = position.mark
    self.memory.position = position
    self.acknowledged, self.registered, self.server = acknowledged, True, server


def lose_and_keep_the_memory(self: Membership[Any]) -> None:
    """The same, in the moment in which that is noticed."""
    self.registered, self.lease_ends = False, -math.inf


def grant_longer(self: Watcher, now: float) -> list[Any]:
    """Rule 6, with grants that outlast the server's own lease."""
    return [
        event._replace(lease_seconds=event.lease_seconds + 2.0)
        if isinstance(event, Grant)
        else event
        for event in take(self, now)
    ]


class Markless(Memory[Any]):
    """Rule 12, a memory that compares bare revisions."""

    def knows(self, position: Position) -> bool:
        return position.revision in self._marks

    def agrees(self, position: Position) -> bool:
        return True


def known_by_revision(self: Database, position: Position) -> bool:
    """Rule 12, a database that compares bare revisions."""
    return self.pruned.revision <= position.revision <= self.head.revision


def believe_what_is_new_enough(self: Membership[Any], snapshot: Any, began: Any) -> Standing:
    """Rule 12, a look-up that is believed for its bare revision, as it was before."""
    if snapshot.position.revision > self.memory.position.revision:
        return Standing.AHEAD
    fresh = snapshot.position.revision >= began.applied and began.epoch == self.epoch
    return Standing.BELIEVED if fresh else Standing.REFUSED


def renew_whatever_was_applied(
    self: Database, name: str, incarnation: int, applied: Position, acknowledged: int
) -> Any:
    """Rule 3, a renewal without the condition on the position; the log says that all is well."""

    def change() -> tuple[bool, Log]:
        row = self.rows.get(name)
        if row is None or row.incarnation != incarnation:
            return False, self.read_log(applied)
        self.rows[name] = row._replace(renewal=row.renewal + 1, acknowledged_revision=acknowledged)
        named = tuple(Change(p, (t,)) for p, t in self.log if p.revision > applied.revision)
        return True, Log(True, self.server, self.head, named)

    return self.commit(change)


# Where, what, and what it is replaced by: all of these at once. Rules that break by chance only in
# stories of dozens of steps have them told in tests/unit/coherence and tests/unit/client.
MUTANTS: dict[str, list[tuple[Any, str, Any]]] = {
    "3: the lease runs on": [
        (verifier_state, "server_lease_end", lambda began, seconds: began + 6.0)
    ],
    "3: memory kept when the row was gone": [
        (Membership, "register", keep_the_memory),
        (Membership, "lose", lose_and_keep_the_memory),
    ],
    "3: the log is not applied": [(Membership, "apply", lambda self, log, began: False)],
    "3: renewed on any history": [(Database, "renew", renew_whatever_was_applied)],
    "4: no fill rule": [(Memory, "admit", admit_anything)],
    "6: grants outlast the lease": [(Watcher, "take", grant_longer)],
    "7: clients are not waited for": [
        (Membership, "acknowledgeable", lambda self, now: self.memory.position.revision)
    ],
    "8: no wait": [(Wait, "judge", lambda self, rows, now: Confirmation(0, 0))],
    "8: too short a wait": [(ack_rules, "outwait_seconds", lambda seconds: 0.5)],
    "9: rows are removed at once": [(Census, "dead", lambda self, rows, asked, now: list(rows))],
    "12: no marks in the database": [(Database, "knows", known_by_revision)],
    "12: no marks in the server's memory": [(World, "server_memory", Markless)],
    "12: look-ups are believed by their revision": [
        (Membership, "standing", believe_what_is_new_enough)
    ],
}


@pytest.mark.parametrize("name", MUTANTS)
def test_each_rule_counts(name: str) -> None:
    """With a rule taken away, something stale is answered, and the simulation sees it."""
    with contextlib.ExitStack() as broken:
        for where, attribute, instead in MUTANTS[name]:
            broken.enter_context(mock.patch.object(where, attribute, instead, create=True))
        assert any(run(seed).stale for seed in range(SEEDS_FOR_A_MUTANT)), name

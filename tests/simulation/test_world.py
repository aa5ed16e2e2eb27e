"""No schedule of faults makes the classes that ship answer with a dead token; each rule counts."""

from collections import Counter
from random import Random
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from latchkey_coherence.memory import Memory
from latchkey_service.coherence import confirmation, membership
from latchkey_service.coherence.confirmation import Census, Confirmation, Wait
from latchkey_service.coherence.membership import Membership
from latchkey_service.coherence.watch import Grant, Watcher

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
        world.step(random.choice(KINDS))
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


def admit_anything(self: Memory[Any], key: bytes, entry: Any, revision: int) -> bool:
    """Rule 4, without the fill rule."""
    return admit(self, key, entry, max(revision, self.applied))


admit = Memory.admit
take = Watcher.take


def keep_the_memory(self: Any, revision: int, acknowledged: int) -> None:
    """Rule 3, a row that is gone, without emptying the memory."""
    self.memory.apply(revision, ())
    self.acknowledged, self.registered = acknowledged, True


def grant_longer(self: Watcher, now: float) -> list[Any]:
    """Rule 6, with grants that outlast the server's own lease."""
    return [
        event._replace(lease_seconds=event.lease_seconds + 2.0)
        if isinstance(event, Grant)
        else event
        for event in take(self, now)
    ]


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "3: the lease runs on": (membership, "server_lease_end", lambda began, seconds: began + 6.0),
    "3: memory kept when the row was gone": (Membership, "register", keep_the_memory),
    "3: the log is not applied": (Membership, "apply", lambda self, log: False),
    "4: no fill rule": (Memory, "admit", admit_anything),
    "6: grants outlast the lease": (Watcher, "take", grant_longer),
    "7: clients are not waited for": (
        Membership,
        "acknowledgeable",
        lambda self, now: self.memory.applied,
    ),
    "8: no wait": (Wait, "judge", lambda self, rows, now: Confirmation(0, 0)),
    "8: too short a wait": (confirmation, "outwait_seconds", lambda seconds: 0.5),
    "9: rows are removed at once": (Census, "dead", lambda self, rows, asked, now: list(rows)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_each_rule_counts(name: str) -> None:
    """With a rule taken away, something stale is answered, and the simulation sees it."""
    where, attribute, broken = MUTANTS[name]
    with mock.patch.object(where, attribute, broken):
        assert any(run(seed).stale for seed in range(SEEDS_FOR_A_MUTANT)), name

"""The rules keep their promises in every order of events, and each rule is necessary.

The package's docstring lists the rules and shows how to print the orders of events.
"""

import pytest

from tests.model.broken import BROKEN, HARMLESS, KEPT, LONG
from tests.model.cases import Broken, Kept
from tests.model.explore import always_can, explore
from tests.model.server_state import ANSWERED, LEMMA

RULES = range(1, 14)
# The largest takes 20 seconds of processor time, on a machine that may be busy.
LONG_SECONDS = 600
EXPLORES_LONG = (pytest.mark.slow("explores more states"), pytest.mark.timeout(LONG_SECONDS))


@pytest.mark.parametrize(
    "kept",
    [*KEPT, *(pytest.param(kept, marks=EXPLORES_LONG) for kept in LONG)],
    ids=lambda kept: kept.name,
)
def test_kept(kept: Kept) -> None:
    """With all rules, no verify that begins after Delete's answer returns VALID, in any order. With
    a rate limit, no more verifies return VALID in any window than its bound permits. With healthy
    verifiers, Delete ends by acknowledgement, whatever happened before.

    This would also hold in a model in which nothing happens. Therefore every action must occur, the
    expected states must be reached, and the number of states must not shrink.
    """
    found = explore(kept.model)
    assert found.violation is None, found.trace
    assert found.states >= kept.states_at_least
    actions = {action.__name__ for action in kept.model.actions}
    assert set(found.taken) == actions - kept.untaken
    for what, predicate in kept.seen.items():
        assert any(map(predicate, found.parents)), f"never seen: {what}"
    if healthy := kept.healthy:
        states = list(filter(healthy.where, found.parents))
        assert len(states) >= healthy.states_at_least
        world = kept.model.world
        assert always_can(states, healthy.actions, world, lambda s: s.delete == ANSWERED) is None


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_broken(broken: Broken) -> None:
    """If a rule is broken, the explorer finds a violation, and the shortest trace has the known
    length. The model has only those incidents that the violation needs.
    """
    # The lemma is internal to the model: a broken rule must violate a promise to users.
    found = explore(broken.model, but=[LEMMA])
    assert found.violation is not None, "nothing comes of it"
    assert found.steps == broken.steps, found.trace


@pytest.mark.parametrize("harmless", HARMLESS, ids=lambda harmless: harmless.name)
def test_harmless(harmless: Broken) -> None:
    """Breaking these rules causes no violation, because other rules give the same protection."""
    found = explore(harmless.model)
    assert found.violation is None, found.trace


def test_every_rule() -> None:
    """Each rule has at least one model that breaks it."""
    assert {broken.rule for broken in BROKEN} == set(RULES)

"""The explorer finds all states, the shortest way to a violation, and dead ends."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.model import explore as explorer
from tests.model.explore import Model, Violation, always_can, explore

SPILT = "nothing is spilt"


class Jugs(NamedTuple):
    """Two jugs, for 3 and 5 litres."""

    small: int = 0
    large: int = 0


def fills(jugs: Jugs, _: int) -> Iterator[Jugs]:
    """Fill one."""
    yield jugs._replace(small=3)
    yield jugs._replace(large=5)


def empties(jugs: Jugs, _: int) -> Iterator[Jugs]:
    """Empty one."""
    yield jugs._replace(small=0)
    yield jugs._replace(large=0)


def pours(jugs: Jugs, forbidden: int) -> Iterator[Jugs | Violation]:
    """Pour one into the other."""
    for poured in (
        Jugs(jugs.small - min(jugs.small, 5 - jugs.large), min(5, jugs.small + jugs.large)),
        Jugs(min(3, jugs.small + jugs.large), jugs.large - min(jugs.large, 3 - jugs.small)),
    ):
        yield Violation(SPILT) if poured.large == forbidden else poured


def jugs(forbidden: int = 9) -> Model:
    return Model(Jugs(), (fills, empties, pours), forbidden, {"small": {0: "empty"}})


def test_all_states() -> None:
    """Every state is found once, and every action is counted."""
    found = explore(jugs())
    # One of the two is always empty or full: 2 × 6 + 2 × 4 − 4 corners.
    assert found.states == 16
    assert found.violation is None
    assert found.trace is None
    assert found.taken["fills"] == found.taken["empties"] == found.taken["pours"] == 2 * 16


def test_shortest_way() -> None:
    """The trace is a shortest one (four litres take six steps) and shows the changes of each
    step."""
    found = explore(jugs(forbidden=4))
    assert found.violation == Violation(SPILT)
    assert found.steps == 6
    assert found.trace is not None
    lines = found.trace.splitlines()
    assert lines[:2] == ["  1. Fill one", "       large 0 → 5"]
    assert lines[2:4] == ["  2. Pour one into the other", "       small empty → 3, large 5 → 2"]
    assert lines[-2:] == ["  6. Pour one into the other", f"       VIOLATION: {SPILT}"]


def test_other_promises() -> None:
    """A violation of an excepted promise does not end the exploration."""
    assert explore(jugs(forbidden=4), but=[SPILT]).violation is None


def test_always_can() -> None:
    """States without a way to the goal are distinguished from those that have one."""
    states = list(explore(jugs()).parents)
    assert always_can(states, (empties,), 9, lambda s: s == Jugs(0, 0)) is None
    assert always_can(states, (fills,), 9, lambda s: s == Jugs(0, 0)) not in {None, Jugs(0, 0)}


def test_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that grows without bound fails, and does not fill the memory."""
    monkeypatch.setattr(explorer, "STATES_MAX", 10)
    with pytest.raises(RuntimeError, match="more than 10 states"):
        explore(jugs())

"""The explorer finds dead ends, and always terminates. `test_rules.py` shows that it finds the
shortest way.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.model import explore as explorer
from tests.model.explore import Model, always_can, explore


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


def jugs() -> Model:
    return Model(Jugs(), (fills, empties), 9, {})


def test_always_can() -> None:
    """States without a way to the goal are distinguished from those that have one."""
    states = list(explore(jugs()).parents)
    assert always_can(states, (empties,), 9, lambda s: s == Jugs(0, 0)) is None
    assert always_can(states, (fills,), 9, lambda s: s == Jugs(0, 0)) not in {None, Jugs(0, 0)}


def test_without() -> None:
    """A model without an action reaches only what the other actions reach."""
    assert explore(jugs()).states == 4
    assert explore(jugs().without({"empties"})).taken.keys() == {"fills"}


def test_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exploration of a model that grows without bound fails before it fills the memory."""
    monkeypatch.setattr(explorer, "STATES_MAX", 3)
    with pytest.raises(RuntimeError, match="more than 3 states"):
        explore(jugs())

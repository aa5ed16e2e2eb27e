"""The kinds of exploration: a model with all rules, a healthy model, and a model with a broken
rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.model.explore import Action, Model

__all__ = ["Broken", "Healthy", "Kept"]


@dataclass(frozen=True)
class Healthy:
    """The condition under which the states of a model are healthy."""

    states_at_least: int
    # Whether Delete has committed, and all verifiers are healthy, so that it can end before time
    # passes.
    where: Callable[[Any], bool]
    actions: Sequence[Action]


@dataclass(frozen=True)
class Kept:
    """A model with all its rules."""

    name: str
    model: Model
    # A model that shrinks much has lost an action or a state that it needs; see also `seen`.
    states_at_least: int
    # States that must be reachable: a model in which nothing happens would keep every promise.
    seen: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    # Actions that this configuration never takes.
    untaken: frozenset[str] = frozenset()
    healthy: Healthy | None = None


@dataclass(frozen=True)
class Broken:
    """A model with a broken rule. Its name begins with the rule's number."""

    name: str
    model: Model
    steps: int  # of the shortest way to a violation; 0 if there is none

    @property
    def rule(self) -> int:
        """Return the number of the rule."""
        return int(self.name.partition(" ")[0])

"""Breadth-first exploration: every state that a model can reach, or the shortest way to a
violation.

A model is a first state and a list of actions. A state is a NamedTuple of small integers (and of
such tuples). An action is a generator function: given a state, it yields each possible next state,
or nothing if the action is impossible there. If it breaks a promise, it yields a `Violation`
instead. A trace prints the first line of the action's docstring.

This module is independent of leases and tokens.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

__all__ = [
    "Action",
    "Exploration",
    "Model",
    "Violation",
    "always_can",
    "explore",
    "replaced_quickly",
]

# Far above any configuration here: if a change makes the number of states explode, the run fails
# before it fills the memory.
STATES_MAX = 1_500_000
# Names that a trace gives to the members of a field with several objects of one kind.
EACH = {
    "servers": ("server A", "server B"),
    "verifiers": ("verifier A", "verifier B"),
    "databases": ("old primary", "new primary"),
}


class Violation(NamedTuple):
    """Yielded by an action that breaks a promise."""

    promise: str


State = Any  # a NamedTuple of the model
Kind = TypeVar("Kind", bound=tuple[Any, ...])
Action = Callable[[State, Any], Iterator[State]]


def replaced_quickly(kind: type[Kind]) -> type[Kind]:
    """Give a NamedTuple a `_replace` that takes less than half the time, because that is much of
    the work of a model."""
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    # An argument for each field needs no dictionary.
    arguments = ", ".join(f"{name}=_KEEP" for name in fields)
    old = ", ".join(f"old_{name}" for name in fields)
    values = ", ".join(f"old_{name} if {name} is _KEEP else {name}" for name in fields)
    names: dict[str, Any] = {"_KEEP": object(), "_new": tuple.__new__, "_kind": kind}
    source = f"""def replace(self, /, *, {arguments}):
        {old}, = self
        return _new(_kind, ({values},))"""
    exec(source, names)  # noqa: S102 - made of the names of fields
    kind._replace = names["replace"]  # type: ignore[attr-defined]
    return kind


@dataclass(frozen=True)
class Model:
    """A model to explore. `world` holds the constants and the rules broken on purpose."""

    first: State
    actions: Sequence[Action]
    world: Any
    # How to print a field's special values in a trace: {"delete": {-1: "not begun"}}.
    names: Mapping[str, Mapping[Any, str]]
    # States after which no promise can be broken. What follows them is not explored.
    is_over: Callable[[State], bool] | None = None

    def without(self, left_out: Collection[str]) -> Model:
        """Return the model in which these actions never happen.

        Each order of events in it is also one of the whole model, and so is each violation.
        """
        kept = [action for action in self.actions if action.__name__ not in left_out]
        return replace(self, actions=kept)


@dataclass(frozen=True)
class Exploration:
    """The result of an exploration. `parents` maps every reached state to the state from which it
    was first reached.
    """

    parents: dict[State, State | None]
    taken: Counter[str]
    steps: int
    seconds: float  # of CPU
    trace: str | None
    violation: Violation | None = None

    @property
    def states(self) -> int:
        """Number of different states."""
        return len(self.parents)


def explore(model: Model, but: Collection[str] = ()) -> Exploration:
    """Take every action in every state until no new state appears or a promise is broken.

    Promises in `but` may be broken. The search is breadth-first, so the trace is a shortest one,
    and `steps` its length. Without a violation, `steps` is the depth reached. Raises RuntimeError
    beyond STATES_MAX states.
    """
    began = time.process_time()
    parents: dict[State, State | None] = {model.first: None}
    taken = dict.fromkeys((action.__name__ for action in model.actions), 0)
    layer, steps, known = [model.first], 0, 1
    is_over = model.is_over
    world = model.world
    named = [(action, action.__name__) for action in model.actions]
    # Trees of tuples have no reference cycles, and the garbage collector would take half of the
    # time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        while layer:
            steps += 1
            following = []
            for state in itertools.filterfalse(is_over, layer) if is_over else layer:
                for action, name in named:
                    for after in action(state, world):
                        taken[name] += 1
                        if after.__class__ is Violation:
                            if after.promise not in but:
                                trace = _trace(model, parents, state, action, after)
                                seconds = time.process_time() - began
                                return Exploration(
                                    parents, +Counter(taken), steps, seconds, trace, after
                                )
                            continue
                        # Looked up and inserted in one operation, because hashing is much of the
                        # work.
                        parents.setdefault(after, state)
                        if len(parents) > known:
                            known += 1
                            following.append(after)
            if len(parents) > STATES_MAX:
                raise RuntimeError(f"more than {STATES_MAX:,} states, and no end in sight")
            layer = following
    finally:
        if collecting:
            gc.enable()
    return Exploration(parents, +Counter(taken), steps, time.process_time() - began, None)


def always_can(
    states: Iterable[State], actions: Sequence[Action], world: Any, goal: Callable[[State], bool]
) -> State | None:
    """Return a state from which `actions` alone cannot reach `goal`, or None if all can.

    `states` must hold every state that `actions` lead to from them.
    """
    sources: dict[State, list[State]] = {}
    stuck, reached = set(), []
    for state in states:
        if goal(state):
            reached.append(state)
            continue
        stuck.add(state)
        for action in actions:
            for after in action(state, world):
                sources.setdefault(after, []).append(state)
    while reached:
        for source in sources.pop(reached.pop(), ()):
            if source in stuck:
                stuck.remove(source)
                reached.append(source)
    return next(iter(stuck), None)


def _trace(
    model: Model,
    parents: Mapping[State, State | None],
    last: State,
    action: Action,
    violation: Violation,
) -> str:
    """Return the steps to `last`, the changes of each step, and how the promise is broken."""
    path: list[State] = [last]
    while (parent := parents[path[-1]]) is not None:
        path.append(parent)
    path.reverse()
    lines = []
    for number, (before, after) in enumerate(itertools.pairwise(path), 1):
        taken = next(a for a in model.actions if after in list(a(before, model.world)))
        changes = ", ".join(_changes(model.names, before, after))
        lines.append(f"{number:3}. {_sentence(taken)}\n       {changes}")
    lines.append(f"{len(path):3}. {_sentence(action)}\n       VIOLATION: {violation.promise}")
    return "\n".join(lines)


def _sentence(action: Action) -> str:
    return (action.__doc__ or action.__name__).partition("\n")[0].removesuffix(".")


def _changes(names: Mapping[str, Mapping[Any, str]], before: Any, after: Any) -> Iterator[str]:
    """Name the fields that differ; tuples of the same kind are compared field by field."""
    for field, old, new in zip(before._fields, before, after, strict=True):
        if old == new:
            continue
        if hasattr(old, "_fields") and hasattr(new, "_fields"):
            yield from (f"{field}.{change}" for change in _changes(names, old, new))
        elif field in EACH:
            for each, one, other in zip(EACH[field], old, new, strict=False):
                yield from (f"{each}.{change}" for change in _changes(names, one, other))
        else:
            yield f"{field} {_shown(names, field, old)} → {_shown(names, field, new)}"


def _shown(names: Mapping[str, Mapping[Any, str]], field: str, value: Any) -> str:
    if hasattr(value, "_fields"):
        parts = zip(value._fields, value, strict=True)
        return f"({', '.join(f'{name} {_shown(names, name, part)}' for name, part in parts)})"
    if isinstance(value, tuple):
        return f"[{', '.join(_shown(names, field, part) for part in value)}]"
    return names.get(field, {}).get(value, str(value))

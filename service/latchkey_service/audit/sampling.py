"""Decides which of many similar calls get a separate entry. Pure.

In each minute, of the calls of one caller, method and result:

- the first few get an entry each;
- the first call about each further target, a token or account, gets one, up to a limit;
- of all others, a few are chosen at random, with equal chances, and get one at the end;
- one entry counts the rest.

So a caller cannot hide what it does behind a few harmless calls: the calls that hide something have
another target, or the same chance as the harmless ones, and in any case they are counted.
"""

from collections.abc import Callable
from typing import Final, Generic, TypeVar

__all__ = ["CHOSEN_MAX", "FIRST_MAX", "LOOKED_MAX", "TARGETS_MAX", "Sample"]

FIRST_MAX: Final = 10
TARGETS_MAX: Final = 100
CHOSEN_MAX: Final = 10
# Refused calls that are parsed only to find their target. Parsing one takes up to 0.3 ms.
LOOKED_MAX: Final = 1_000

_Entry = TypeVar("_Entry")


class Sample(Generic[_Entry]):
    """The calls of one caller, method and result since `since`."""

    __slots__ = (
        "_calls",
        "_chosen",
        "_looked",
        "_randrange",
        "_targets",
        "kept",
        "since",
        "without_entry",
    )

    def __init__(self, since: float, randrange: Callable[[int], int]) -> None:
        self.since = since
        self.kept: list[_Entry] = []
        """The entries of calls that were chosen at random."""
        self._randrange = randrange
        self._calls = 0
        self._looked = 0
        # Whether `is_wanted` has chosen the next call.
        self._chosen = False
        self._targets: set[object] = set()
        self.without_entry = 0

    @property
    def has_room(self) -> bool:
        """Whether the next call gets an entry if its target is new."""
        return self._calls < FIRST_MAX or (
            len(self._targets) < TARGETS_MAX and self._looked < LOOKED_MAX
        )

    def is_wanted(self) -> bool:
        """Return whether the next call may get an entry, so that it is worth describing.

        If so, `takes` must be called next. If not, `count`.
        """
        if self._calls < FIRST_MAX:
            return True
        if len(self._targets) < TARGETS_MAX and self._looked < LOOKED_MAX:
            self._looked += 1
            return True
        self._chosen = self._choose()
        return self._chosen

    def takes(self, target: object) -> bool:
        """Count a call. Return whether it gets an entry at once."""
        self._calls += 1
        if self._calls <= FIRST_MAX or (
            target not in self._targets and len(self._targets) < TARGETS_MAX
        ):
            self._targets.add(target)
            self._chosen = False
            return True
        self.without_entry += 1
        return False

    def count(self) -> None:
        """Count a call that is not described."""
        self._calls += 1
        self.without_entry += 1

    def is_chosen(self) -> bool:
        """Return whether the call that `takes` has just refused is chosen at random."""
        chosen, self._chosen = self._chosen, False
        return chosen or self._choose(counted=1)

    def keep(self, entry: _Entry) -> None:
        """Keep the entry of a chosen call, in place of a random one if there are too many."""
        if len(self.kept) < CHOSEN_MAX:
            self.kept.append(entry)
        else:
            self.kept[self._randrange(CHOSEN_MAX)] = entry

    def _choose(self, counted: int = 0) -> bool:
        """Decide as reservoir sampling does (Vitter 1985, algorithm R)."""
        return self._randrange(self.without_entry + 1 - counted) < CHOSEN_MAX

"""Computes how long calls had no answer around a fault: a pure function of the histories."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from tests.history.records import CREATES, ENDS, Kind, Outcome, Record

__all__ = ["Outage", "Window", "outages"]

_VERIFIES = (Kind.NOWAIT, Kind.VERIFY, Kind.DIRECT)
_VERIFIED = (Outcome.VALID, Outcome.REFUSED)
_CHANGED = (Outcome.DONE, Outcome.CONFIRMED)


class Window(NamedTuple):
    """A fault, and the period in which its effects count, in nanoseconds of the records' clock."""

    name: str
    began: int
    ended: int


@dataclass(frozen=True)
class Outage:
    """The longest times without answers in a window, in seconds."""

    name: str
    verifies: float
    """Without an answer to a verify of any process."""
    verifies_worst: float
    """Without an answer to a verify of the process that waited longest."""
    changes: float
    """Without an answer to a Create, or to a Delete that waits until the token is dead."""


def outages(
    histories: Mapping[str, Callable[[], Iterable[Record]]], windows: Iterable[Window]
) -> list[Outage]:
    """Return one outage for each window, in order. Each history is read once."""
    windows = list(windows)
    verified: list[dict[str, list[int]]] = [defaultdict(list) for _ in windows]
    changed: list[list[int]] = [[] for _ in windows]
    for who, history in histories.items():
        for kind, outcome, _, _, ended in history():
            is_verify = kind in _VERIFIES and outcome in _VERIFIED
            is_change = (kind in CREATES or kind in ENDS) and outcome in _CHANGED
            if not is_verify and not is_change:
                continue
            for number, window in enumerate(windows):
                if window.began <= ended <= window.ended:
                    if is_verify:
                        verified[number][who].append(ended)
                    else:
                        changed[number].append(ended)
    found = []
    for window, by_process, changes in zip(windows, verified, changed, strict=True):
        everyone = [moment for moments in by_process.values() for moment in moments]
        found.append(
            Outage(
                window.name,
                _longest(window, everyone),
                # A process without any answer in the window was not running, or was frozen.
                max((_longest(window, each) for each in by_process.values()), default=0.0),
                _longest(window, changes),
            )
        )
    return found


def _longest(window: Window, moments: list[int]) -> float:
    ordered = [window.began, *sorted(moments), window.ended]
    return max(after - before for before, after in pairwise(ordered)) / 1e9

"""Notifies objects in a child process that `os.fork` has created.

A fork copies the cache and its lease, but nobody acknowledges deletions for the copy.
"""

import os
import weakref
from typing import Final, Protocol


class Forked(Protocol):
    """An object that must know about a fork."""

    def forked(self) -> None:
        """React to the fork. Runs in the child before any other code there."""
        ...


_forked: Final["weakref.WeakSet[Forked]"] = weakref.WeakSet()


def watch(concerned: Forked) -> None:
    """Call `concerned.forked` in every child that this process forks."""
    _forked.add(concerned)


def _in_child() -> None:
    for concerned in list(_forked):
        concerned.forked()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_in_child)

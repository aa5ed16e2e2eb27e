"""What has to happen in a child process that `os.fork` has made.

A fork copies the memory, and the lease on it, while no one acknowledges deletions for the copy.
"""

import os
import weakref
from typing import Final, Protocol


class Forked(Protocol):
    """What a fork concerns."""

    def forked(self) -> None:
        """Take note, in the child, before anything else runs there."""
        ...


_forked: Final["weakref.WeakSet[Forked]"] = weakref.WeakSet()


def watch(concerned: Forked) -> None:
    """Call `concerned.forked` in every child that is forked from this process."""
    _forked.add(concerned)


def _in_child() -> None:
    for concerned in list(_forked):
        concerned.forked()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_in_child)

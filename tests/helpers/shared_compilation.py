"""Divides the compilation of the tests among the workers of pytest-xdist.

All workers collect all tests at once. In a fresh clone, each would compile every module for itself,
with pytest's rewriting of assertions, which takes most of the time of a collection.
"""

import contextlib
import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.repository import ROOT

__all__ = ["import_in_turn", "in_turn"]


def import_in_turn(arguments: Sequence[str]) -> None:
    """If this is a worker that runs all tests, import their modules.

    Each worker begins with another part. When it reaches the parts of the others, they have
    compiled those.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    tests = ROOT / "tests"
    if worker is None or [Path(argument).resolve() for argument in arguments] != [tests]:
        return
    modules = sorted(tests.rglob("test_*.py"))
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    for path in in_turn(modules, int(worker.removeprefix("gw")), count):
        # pytest's collection imports it again, and reports what fails.
        with contextlib.suppress(Exception):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def in_turn(every: Sequence[Path], number: int, count: int) -> list[Path]:
    """Return all in the order of this worker of `count`."""
    first = len(every) * number // count
    return [*every[first:], *every[:first]]

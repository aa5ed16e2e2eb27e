"""Decides which tests count for coverage, when `make test` measures it.

The tests of faults, histories and models do not: they depend on time or run hot loops, and tracing
makes Python almost twice as slow. What they execute is tested one call at a time elsewhere.
"""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

__all__ = ["MEASURED", "pytest_runtest_protocol"]

MEASURED = {"console", "contract", "integration", "unit"}
# Set by coverage.py. A Python process that inherits it measures itself. The tests of the command
# line start theirs without it: measuring hundreds of short processes takes too long.
FOR_CHILDREN = "COVERAGE_PROCESS_CONFIG"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Pause the measurement while a test runs that does not count, with its fixtures."""
    plugin = item.config.pluginmanager.getplugin("_cov")
    controller = getattr(plugin, "cov_controller", None)
    folder = item.path.relative_to(item.config.rootpath / "tests").parts[0]
    if controller is None or folder in MEASURED:
        return (yield)
    with paused(controller):
        return (yield)


@contextmanager
def paused(controller: Any) -> Iterator[None]:
    """Stop measuring this process and the processes that it starts."""
    config = os.environ.pop(FOR_CHILDREN, None)
    controller.pause()
    try:
        yield
    finally:
        controller.resume()
        if config is not None:
            os.environ[FOR_CHILDREN] = config

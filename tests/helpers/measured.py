"""Decides which tests count for coverage, when `make test` measures it.

The tests of faults, histories and models do not: they depend on time or run hot loops, and tracing
makes Python almost twice as slow. What they execute is tested one call at a time elsewhere.

Contract tests that run on each transport count on one of them. The integration tests of transports
count on both.
"""

import os
import sys
import tomllib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["MEASURED", "data_file", "measured_python", "pytest_runtest_protocol"]

MEASURED = {"console", "contract", "integration", "unit"}
# The transport on which the contract tests do not count.
NOT_MEASURED = "grpcio"
# Set by coverage.py. A Python process that inherits it measures itself.
FOR_CHILDREN = "COVERAGE_PROCESS_CONFIG"


def data_file(config: pytest.Config) -> str | None:
    """Return the file whose name other processes extend for what they measure, or None if nothing
    is measured. The measurement of pytest includes these files in the end."""
    controller = getattr(config.pluginmanager.getplugin("_cov"), "cov_controller", None)
    return None if controller is None else str(Path(controller.cov.config.data_file).resolve())


def measured_python(config: pytest.Config) -> tuple[str, ...]:
    """Return the command that runs Python in any folder, and measures coverage if pytest does."""
    data = data_file(config)
    if data is None:
        return (sys.executable,)
    file = config.rootpath / "pyproject.toml"
    settings = tomllib.loads(file.read_text("utf-8"))["tool"]["coverage"]["run"]
    # The file's folders are relative to the folder of the process.
    source = ",".join(str(config.rootpath / folder) for folder in settings["source"])
    options = ("--parallel-mode", f"--data-file={data}", f"--rcfile={file}", f"--source={source}")
    return (sys.executable, "-m", "coverage", "run", *options)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Pause the measurement while a test runs that does not count, with its fixtures."""
    plugin = item.config.pluginmanager.getplugin("_cov")
    controller = getattr(plugin, "cov_controller", None)
    if controller is None or counts(item):
        return (yield)
    with paused(controller):
        return (yield)


def counts(item: pytest.Item) -> bool:
    """Return whether coverage is measured while this test runs."""
    folder = item.path.relative_to(item.config.rootpath / "tests").parts[0]
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    repeated = folder == "contract" and parameters.get("transport") == NOT_MEASURED
    return folder in MEASURED and not repeated


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

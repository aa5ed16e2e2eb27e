"""Fixtures for tests of the command line tool as a process."""

from pathlib import Path

import pytest

from tests.helpers.fork_server import Forked
from tests.helpers.tool import Run, make_run


@pytest.fixture
def transport() -> str:
    """The tool cannot tell the transports apart, so one is enough here."""
    return "native"


@pytest.fixture
def run(tmp_path: Path, forked: Forked) -> Run:
    """Run the tool in an empty folder without a .env file."""
    return make_run(tmp_path, forked)

"""What the tests of calls to a service in its own process share."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="latchkey-test-", dir="/tmp"))
    yield path
    shutil.rmtree(path)

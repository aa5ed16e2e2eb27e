"""The fork servers of a run of the tests, which all workers of pytest-xdist share."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.helpers.fork_server import waiting_server
from tests.helpers.forked_service import waiting_services
from tests.helpers.measured import folder as coverage_folder
from tests.helpers.scratch import SCRATCH
from tests.helpers.tool import PRELOADED

__all__ = ["run_fork_servers", "shared_folder"]

# The variable by which workers find the folder of the servers.
_FOLDER = "FORK_SERVERS_FOLDER"


def run_fork_servers() -> Callable[[], None]:
    """Run the servers of tools, services and consoles. Return a function that ends them."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="latchkey-test-", dir=SCRATCH))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        os.environ[_FOLDER] = str(folder)
        (folder / "tools").mkdir()
        stack.enter_context(
            waiting_server(folder / "tools", *PRELOADED, coverage=coverage_folder())
        )
        stack.enter_context(waiting_services(folder))
        return stack.pop_all().close


def shared_folder() -> Path:
    """Return the folder that contains a folder for each server."""
    return Path(os.environ[_FOLDER])

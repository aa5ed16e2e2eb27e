"""A cluster of Postgres that one process of a run of the tests makes, and that all of them copy.

To make a cluster takes seconds of processor time, a copy a few hundredths.

`python -m tests.helpers.made_cluster FOLDER` makes it.
"""

import asyncio
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from latchkey_service.postgres.embedded_cluster import EmbeddedPostgres
from latchkey_service.postgres.migrate import bundled, migrate

from tests.helpers.repository import ROOT
from tests.helpers.scratch import SCRATCH
from tests.helpers.servers import TEMPLATE, execute, with_database

__all__ = ["copy_cluster", "keep_cluster"]

# The variable by which workers find the folder of the cluster.
_FOLDER = "MADE_CLUSTER_FOLDER"
# On a busy machine, on which all workers start.
_MAKE_SECONDS_MAX = 90.0
# Postgres reads the headers of all buffers at each checkpoint, and when it drops a database. With
# the service's 512 MB, creating and dropping a database takes a fifth more processor time.
_SHARED_BUFFERS = "32MB"


def keep_cluster() -> Callable[[], None]:
    """Make a folder for the cluster. Return a function that removes it."""
    folder = Path(tempfile.mkdtemp(prefix="latchkey-test-", dir=SCRATCH))
    # Postgres' own account enters it, if root runs the tests.
    folder.chmod(0o755)
    os.environ[_FOLDER] = str(folder)
    return lambda: shutil.rmtree(folder, ignore_errors=True)


def copy_cluster(data_dir: Path) -> None:
    """Make a new data directory for `EmbeddedPostgres`. The database of its URL is empty, and the
    database TEMPLATE is migrated."""
    folder = Path(os.environ[_FOLDER])
    made = folder / "made"
    with (folder / "lock").open("a") as lock:
        # The first process makes it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            subprocess.run(
                [sys.executable, "-m", "tests.helpers.made_cluster", str(folder / "making")],
                cwd=ROOT,
                check=True,
                timeout=_MAKE_SECONDS_MAX,
            )
            (folder / "making").rename(made)
    # Not shutil, because the copy must keep the owners.
    subprocess.run(["cp", "-a", made, data_dir], check=True)


def _make(data_dir: Path) -> None:
    postgres = EmbeddedPostgres(data_dir)
    url = postgres.start()
    try:
        asyncio.run(execute(url, f"CREATE DATABASE {TEMPLATE}"))
        # The same password. By default, each connection takes a millisecond of processor time more,
        # which protects only passwords that somebody can guess.
        password = urlsplit(url).password
        asyncio.run(
            execute(url, f"SET scram_iterations = 1; ALTER ROLE latchkey PASSWORD '{password}'")
        )
        asyncio.run(migrate(with_database(url, TEMPLATE), bundled()))
    finally:
        postgres.stop()
    with (data_dir / "postgres" / "postgresql.conf").open("a") as settings:
        settings.write(f"shared_buffers = {_SHARED_BUFFERS}\n")
    # Tests look for messages in the log of their own server.
    (data_dir / "postgres.log").unlink()


if __name__ == "__main__":
    _make(Path(sys.argv[1]))

"""Installs programs that tests need from outside Python, where possible.

If a program is missing and cannot be installed, tests are skipped with the reason; in CI (CI=true)
they fail.
"""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import pytest

from tests.helpers.repository import ROOT

__all__ = ["INSTALLS", "TOOLS", "alone", "installed_by_apt", "missing", "run"]

TOOLS = ROOT / ".tools"
# A slow apt mirror; some 100 MB.
APT_SECONDS = 420.0
INSTALLS = pytest.mark.timeout(600)
"""Marks tests that may install a program first, and wait for another process that installs."""


def missing(reason: str) -> NoReturn:
    """Skip the test because something is missing; in CI, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (not skipped in CI)")
    pytest.skip(reason)


def installed_by_apt(present: Callable[[], bool], packages: Sequence[str]) -> None:
    """Install Debian packages unless `present()`, as root on a system with apt."""
    if present():
        return
    names = " and ".join(packages)
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        missing(f"not installed here: Debian's {names}, which root can install")
    with alone("apt"):
        if present():
            return
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        install = ("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages)
        # The package lists may be old or missing. They are updated only if the installation fails
        # without that.
        for step in (install, ("apt-get", "update", "-qq"), install):
            code, said = run(step, APT_SECONDS, environment)
            if code == 0 and step is install:
                break
        else:
            missing(f"apt-get cannot install {names}: {said[-500:]}")
    if not present():
        missing(f"installed, but not found: {names}")


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Let one of several test processes install while the others wait."""
    TOOLS.mkdir(exist_ok=True)
    with (TOOLS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: Sequence[str], seconds: float, environment: dict[str, str]) -> tuple[int, str]:
    """Run a command and return its exit code and output."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return 1, f"not done within {seconds:.0f} s"
    return done.returncode, done.stdout + done.stderr

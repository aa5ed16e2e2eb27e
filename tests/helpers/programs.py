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
from pathlib import Path
from typing import NoReturn

import pytest

from tests.helpers.repository import ROOT

__all__ = [
    "GRPCURL",
    "HELM",
    "INSTALLS",
    "TOOLS",
    "alone",
    "found",
    "installed_by_apt",
    "installed_by_go",
    "missing",
    "run",
]

TOOLS = ROOT / ".tools"
# A slow apt mirror; about 100 MB.
APT_SECONDS = 420.0
# A build on a slow machine: Helm takes two minutes of one processor.
GO_SECONDS = 480.0
GRPCURL = "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3"
HELM = "helm.sh/helm/v3/cmd/helm@v3.22.0"
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


def found(name: str) -> Path | None:
    """Return the path of a program from PATH, from Go's own folders or from .tools, or None."""
    if (on_path := shutil.which(name)) is not None:
        return Path(on_path)
    folders = [Path.home() / "go/bin", TOOLS / "bin"]
    if (go := shutil.which("go")) is not None:
        code, gopath = run((go, "env", "GOPATH"), 30, dict(os.environ))
        if code == 0 and gopath.strip():
            folders.insert(0, Path(gopath.strip()) / "bin")
    return next((f / name for f in folders if os.access(f / name, os.X_OK)), None)


def installed_by_go(name: str, package: str) -> Path:
    """Return the path of a program. If it is missing, install it with `go install`."""
    if (program := found(name)) is not None:
        return program
    if shutil.which("go") is None:
        pytest.skip(f"neither {name} nor a Go toolchain to install it with is here")
    target = TOOLS / "bin"
    target.mkdir(parents=True, exist_ok=True)
    with alone(name):
        if not (target / name).exists():
            environment = os.environ | {"GOBIN": str(target)}
            code, said = run(("go", "install", package), GO_SECONDS, environment)
            if code != 0:
                pytest.skip(f"{name} could not be installed: {said.strip()[-300:]}")
    return target / name


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

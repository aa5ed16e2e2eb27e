"""What the browser tests need that no Python package brings, installed where that can be done.

Chromium and its driver come from apt, axe and the OpenID provider from npm. Where they are not
there and cannot be installed, tests are skipped with the reason; in CI (CI=true) they fail.
"""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".tools"
# An apt mirror on a bad day; some 100 MB.
APT_SECONDS = 420.0
NPM_SECONDS = 120.0
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Browser:
    """Where the browser and its driver are."""

    binary: str
    driver: str


def browser() -> Browser:
    """Return the browser, installing it where this is root on a system with apt."""
    if found := _installed_browser():
        return found
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        missing("no Chromium with chromedriver here: install Debian's chromium-driver, as root")
    with _alone("apt"):
        if _installed_browser() is None:
            environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            install = ("apt-get", "install", "-y", "-qq", "--no-install-recommends")
            packages = ("chromium", "chromium-driver")
            # The package lists may be old, or not there: fetched only when they are of no use.
            steps = ((*install, *packages), ("apt-get", "update", "-qq"), (*install, *packages))
            for step in steps:
                code, said = _run(step, APT_SECONDS, environment)
                if code == 0 and step[1] == "install":
                    break
            else:
                missing(f"apt-get cannot install chromium-driver: {said[-500:]}")
    return _installed_browser() or missing("chromium-driver is installed, but not in PATH")


def npm_packages() -> Path:
    """Return the folder node_modules with what package.json beside this file asks for."""
    modules = TOOLS / "console-npm/node_modules"
    lock = Path(__file__).parent / "npm/package-lock.json"
    stamp = modules / ".installed"
    with _alone("npm"):
        if not stamp.exists() or stamp.read_bytes() != lock.read_bytes():
            if shutil.which("npm") is None or shutil.which("node") is None:
                missing("no Node.js with npm here, which axe and the OpenID provider come with")
            modules.parent.mkdir(parents=True, exist_ok=True)
            for name in ("package.json", "package-lock.json"):
                shutil.copy(lock.with_name(name), modules.parent)
            command = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix")
            code, said = _run((*command, str(modules.parent)), NPM_SECONDS, dict(os.environ))
            if code:
                missing(f"npm cannot install what the tests need: {said[-500:]}")
            stamp.write_bytes(lock.read_bytes())
    return modules


def missing(reason: str) -> NoReturn:
    """Skip the test for want of something; in CI, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (not skipped in CI)")
    pytest.skip(reason)


def _installed_browser() -> Browser | None:
    binary = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    return Browser(binary, driver) if binary and driver else None


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Of several test processes, one installs and the others wait."""
    TOOLS.mkdir(exist_ok=True)
    with (TOOLS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str], seconds: float, environment: dict[str, str]) -> tuple[int, str]:
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

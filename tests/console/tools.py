"""Installs the tools of the browser tests that no Python package provides.

Chromium's headless shell and its driver come from apt; axe and the OpenID provider come from npm.
If a tool is missing and cannot be installed, its tests are skipped with the reason. In CI (CI=true)
they fail.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.programs import TOOLS, alone, installed_by_apt, missing, run

NPM_SECONDS = 120.0
# The headless shell draws pages as Chromium does, in half of the processor time, because it has no
# windows. Debian's command for it is a script; the driver must start, and may have to kill, the
# program itself.
_BROWSERS = (
    "/usr/lib/chromium/chromium-headless-shell",
    *("chromium", "chromium-browser", "google-chrome"),
)


@dataclass(frozen=True)
class Browser:
    """The paths of the browser and its driver."""

    binary: str
    driver: str


def browser() -> Browser:
    """Return the browser. As root on a system with apt, install it first."""
    installed_by_apt(
        lambda: _installed_browser() is not None, ("chromium-headless-shell", "chromium-driver")
    )
    return _installed_browser() or missing("chromium-driver is installed but not in PATH")


def npm_packages() -> Path:
    """Return the node_modules folder with the packages of npm/package.json."""
    modules = TOOLS / "console-npm/node_modules"
    lock = Path(__file__).parent / "npm/package-lock.json"
    stamp = modules / ".installed"
    with alone("npm"):
        if not stamp.exists() or stamp.read_bytes() != lock.read_bytes():
            if shutil.which("npm") is None or shutil.which("node") is None:
                missing("axe and the OpenID provider need Node.js with npm")
            modules.parent.mkdir(parents=True, exist_ok=True)
            for name in ("package.json", "package-lock.json"):
                shutil.copy(lock.with_name(name), modules.parent)
            command = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix")
            code, said = run((*command, str(modules.parent)), NPM_SECONDS, dict(os.environ))
            if code:
                missing(f"npm cannot install the packages of the tests: {said[-500:]}")
            stamp.write_bytes(lock.read_bytes())
    return modules


def _installed_browser() -> Browser | None:
    binary = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    return Browser(binary, driver) if binary and driver else None

"""What the browser tests need that no Python package brings, installed where that can be done.

Chromium and its driver come from apt, axe and the OpenID provider from npm. Where they are not
there and cannot be installed, tests are skipped with the reason; in CI (CI=true) they fail.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.packages import TOOLS, alone, installed_by_apt, missing, run

ROOT = Path(__file__).parents[2]
NPM_SECONDS = 120.0
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Browser:
    """Where the browser and its driver are."""

    binary: str
    driver: str


def browser() -> Browser:
    """Return the browser, installing it where this is root on a system with apt."""
    installed_by_apt(lambda: _installed_browser() is not None, ("chromium", "chromium-driver"))
    return _installed_browser() or missing("chromium-driver is installed, but not in PATH")


def npm_packages() -> Path:
    """Return the folder node_modules with what package.json beside this file asks for."""
    modules = TOOLS / "console-npm/node_modules"
    lock = Path(__file__).parent / "npm/package-lock.json"
    stamp = modules / ".installed"
    with alone("npm"):
        if not stamp.exists() or stamp.read_bytes() != lock.read_bytes():
            if shutil.which("npm") is None or shutil.which("node") is None:
                missing("no Node.js with npm here, which axe and the OpenID provider come with")
            modules.parent.mkdir(parents=True, exist_ok=True)
            for name in ("package.json", "package-lock.json"):
                shutil.copy(lock.with_name(name), modules.parent)
            command = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix")
            code, said = run((*command, str(modules.parent)), NPM_SECONDS, dict(os.environ))
            if code:
                missing(f"npm cannot install what the tests need: {said[-500:]}")
            stamp.write_bytes(lock.read_bytes())
    return modules


def _installed_browser() -> Browser | None:
    binary = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    return Browser(binary, driver) if binary and driver else None

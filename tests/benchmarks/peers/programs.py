"""Builds the products from their Go modules, once, into .tools/bin."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.helpers.programs import TOOLS, alone

__all__ = ["Unavailable", "program"]

# SpiceDB takes minutes to compile on one core.
BUILD_SECONDS_MAX = 3_600.0


class Unavailable(Exception):
    """The product cannot be installed or started here; the message says why."""


def program(name: str, package: str, version: str) -> str:
    """Return the path of a product's binary. Raises Unavailable if it cannot be built here.

    It is built as a tool of an empty module, because `go install` refuses modules that replace
    their dependencies.
    """
    target = TOOLS / "bin" / f"{name}-{version}"
    if target.exists():
        return str(target)
    if (go := shutil.which("go")) is None:
        raise Unavailable("there is no Go toolchain here to build it with")
    module = TOOLS / f"module-{name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone(name):
        module.mkdir(exist_ok=True)
        (module / "go.mod").unlink(missing_ok=True)
        for step in (
            (go, "mod", "init", f"example.com/{name}"),
            (go, "get", "-tool", f"{package}@{version}"),
            (go, "build", "-trimpath", "-o", str(target), package),
        ):
            _run(step, module)
    return str(target)


def _run(step: tuple[str, ...], folder: Path) -> None:
    try:
        done = subprocess.run(
            step,
            cwd=folder,
            env=os.environ | {"CGO_ENABLED": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{' '.join(step[1:3])} took longer than an hour") from error
    if done.returncode:
        raise Unavailable(f"{' '.join(step[1:3])}: {done.stderr.strip()[-300:]}")

"""Builds the products from their Go modules, once, into .tools/bin."""

import json
import os
import re
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

    `package` begins with the path of its module. It is built in a copy of the module, as its
    developers build it: `go install` refuses modules that replace their dependencies.
    """
    target = TOOLS / "bin" / f"{name}-{version}"
    if target.exists():
        return str(target)
    if (go := shutil.which("go")) is None:
        raise Unavailable("there is no Go toolchain here to build it with")
    source = TOOLS / f"source-{name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone(name):
        module, folder = _module(package)
        shown = _run((go, "mod", "download", "-json", f"{module}@{version}"), TOOLS)
        shutil.rmtree(source, ignore_errors=True)
        # Files in Go's cache are read-only, and so are their copies, except for their folders.
        shutil.copytree(json.loads(shown)["Dir"], source, copy_function=shutil.copyfile)
        _run(("chmod", "-R", "u+w", str(source)), TOOLS)
        _drop_missing_folders(go, source)
        _run((go, "build", "-mod=mod", "-trimpath", "-o", str(target), folder), source)
        shutil.rmtree(source)
    return str(target)


def _drop_missing_folders(go: str, source: Path) -> None:
    """Drop the replacements of modules by folders of the repository that the module lacks."""
    for replaced in json.loads(_run((go, "mod", "edit", "-json"), source))["Replace"] or ():
        folder = replaced["New"]["Path"]
        if folder.startswith(".") and not (source / folder).exists():
            _run((go, "mod", "edit", f"-dropreplace={replaced['Old']['Path']}"), source)


def _module(package: str) -> tuple[str, str]:
    """Return the module of a package, and the package's folder in it."""
    host, owner, name, *rest = package.split("/")
    if rest and re.fullmatch(r"v\d+", rest[0]):
        name = f"{name}/{rest.pop(0)}"
    return f"{host}/{owner}/{name}", "./" + "/".join(rest)


def _run(step: tuple[str, ...], folder: Path) -> str:
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
        raise Unavailable(f"{' '.join(step[:2])} took longer than an hour") from error
    if done.returncode:
        raise Unavailable(f"{' '.join(step[:2])}: {done.stderr.strip()[-300:]}")
    return done.stdout

"""Environments that contain exactly what a distribution of the workspace declares.

Nothing is downloaded. An environment gets links to the files that the development environment has
of each declared distribution, of those that they declare in turn, and of no other. uv then resolves
the requirement in it, without an index, and installs our wheels.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.repository import ROOT

__all__ = ["BUILD", "Environment", "build_wheels", "declared_by"]

# The name of the build in the wheels.
BUILD = "test.1"

# Reads and writes small files, on a machine that may be busy.
UV_SECONDS = 60.0
# Starts an interpreter that imports gRPC, pydantic and the like.
PROGRAM_SECONDS = 60.0


def build_wheels(folder: Path) -> dict[str, Path]:
    """Build a wheel of each distribution into `folder`; return their paths by name."""
    _uv("build", "--all-packages", "--wheel", "--no-build-isolation", "--out-dir", str(folder))
    return {path.name.partition("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}


def declared_by(wheel: Path) -> list[str]:
    """Return the requirements in the wheel's metadata."""
    with ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(path).decode())
    return headers.get_all("Requires-Dist", [])


class Environment:
    """A virtual environment in which `requirement`, one of `wheels`, is installed."""

    def __init__(self, folder: Path, requirement: str, wheels: Mapping[str, Path]) -> None:
        self.folder = folder
        self.expected = closure(requirement, wheels)
        _uv("venv", "--no-project", "--python", sys.executable, str(folder))
        (site,) = folder.glob("lib/python*/site-packages")
        for name in self.expected - wheels.keys():
            _link(metadata.distribution(name), site)
        (archives,) = {wheel.parent for wheel in wheels.values()}
        source = ("--no-index", "--find-links", str(archives))
        _uv("pip", "install", "--python", str(folder), *source, requirement)

    def installed(self) -> set[str]:
        """Return the names of the installed distributions. Fails if their versions conflict."""
        _uv("pip", "check", "--python", str(self.folder))
        rows = json.loads(_uv("pip", "list", "--python", str(self.folder), "--format", "json"))
        return {str(canonicalize_name(row["name"])) for row in rows}

    def run(
        self, program: str, *arguments: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, outside the repository and without its variables."""
        return subprocess.run(
            [self.folder / "bin" / program, *arguments],
            cwd=self.folder,
            env={"PATH": os.defpath, "HOME": str(self.folder), **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PROGRAM_SECONDS,
        )


def closure(requirement: str, wheels: Mapping[str, Path]) -> set[str]:
    """Return the names of the distributions that `requirement` needs on this machine."""
    todo, seen = [Requirement(requirement)], set[tuple[str, str]]()
    while todo:
        wanted = todo.pop()
        name = str(canonicalize_name(wanted.name))
        # The empty extra stands for the requirements that need no extra.
        for extra in {"", *wanted.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            todo += needed(_requirements(name, wheels), extra)
    return {name for name, _ in seen}


def needed(requirements: Iterable[str], extra: str) -> list[Requirement]:
    """Return those requirements that apply on this machine, with `extra`."""
    parsed = map(Requirement, requirements)
    return [
        wanted for wanted in parsed if not wanted.marker or wanted.marker.evaluate({"extra": extra})
    ]


def _requirements(name: str, wheels: Mapping[str, Path]) -> list[str]:
    if name in wheels:
        return declared_by(wheels[name])
    return metadata.distribution(name).requires or []


def _link(distribution: metadata.Distribution, site: Path) -> None:
    """Link the distribution's files into `site`, except its scripts."""
    for file in distribution.files or ():
        if ".." not in file.parts:
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(str(distribution.locate_file(file)))


def _uv(*arguments: str) -> str:
    """Run uv without network, cache and settings of the user, and return its output."""
    done = subprocess.run(
        [sys.executable, "-m", "uv", "--offline", "--no-cache", "--quiet", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("UV_")}
        | {"VIRTUAL_ENV": sys.prefix, "LATCHKEY_BUILD": BUILD},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=UV_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

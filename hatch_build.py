"""Hooks of the build tool, hatchling, for the distributions of this repository."""

import os
import re
import subprocess
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any, Final

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

# Reads the state of one clone, on a disk that may be cold.
GIT_SECONDS: Final = 20.0


class SameVersion(MetadataHookInterface):
    """Makes the distributions depend on exactly the same version of each other.

    `[tool.hatch.metadata.hooks.custom]` lists the dependencies of a distribution. `{version}` in
    that list stands for the version in the `pyproject.toml` of the repository's root.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        """Write the dependencies into `metadata`, in which hatchling has put the version."""
        version = metadata["version"]
        metadata["dependencies"] = [
            requirement.format(version=version) for requirement in self.config["dependencies"]
        ]


class MoreFiles(BuildHookInterface[Any]):
    """Adds the `packages` outside the distribution's folder to its wheel, and names the build.

    `build_file` is the path of a file in the wheel for the build: LATCHKEY_BUILD, or the commit of
    the clone. Without either, there is no such file.

    Not to an editable wheel: hatchling would copy them, and changes of the originals would have no
    effect. `dev-mode-dirs` names the folder of packages instead.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files to `build_data` if this is not an editable wheel."""
        if version == "editable":
            return
        for package in self.config.get("packages", ()):
            build_data["force_include"][package] = PurePosixPath(package).name
        if build := _build(Path(self.root)):
            self._folder = tempfile.TemporaryDirectory()
            file = Path(self._folder.name, "BUILD")
            file.write_text(build + "\n", "ascii")
            build_data["force_include"][str(file)] = self.config["build_file"]


def _build(folder: Path) -> str:
    """Return the name of the build, as the local part of a version, or an empty text."""
    given = os.environ.get("LATCHKEY_BUILD", "")
    if given:
        if not re.fullmatch(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*", given):
            raise ValueError("LATCHKEY_BUILD may have letters and digits, separated by . _ or -")
        return given
    try:
        # Only the repository of this file. Around an unpacked archive, there may be another one.
        top = _git(folder, "rev-parse", "--show-toplevel")
        if not Path(top, "hatch_build.py").exists():
            return ""
        return _git(folder, "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=.dirty")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(  # noqa: S603 - a fixed program
        ["git", "-C", str(folder), *arguments],  # noqa: S607 - a developer's own
        capture_output=True,
        text=True,
        check=True,
        timeout=GIT_SECONDS,
    ).stdout.strip()

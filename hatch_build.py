"""Hooks of the build tool, hatchling, for the distributions of this repository."""

from pathlib import PurePosixPath
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface


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


class PackagesElsewhere(BuildHookInterface[Any]):
    """Adds the `packages` outside the distribution's folder to its wheel.

    Not to an editable one: hatchling would copy them, and changes of the originals would have no
    effect. `dev-mode-dirs` names their folder instead.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the packages to `build_data` if this is not an editable wheel."""
        if version != "editable":
            for package in self.config["packages"]:
                build_data["force_include"][package] = PurePosixPath(package).name

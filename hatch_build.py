"""Gives the four distributions one version, and makes them depend on exactly that version.

Hatchling runs this hook when it reads a `pyproject.toml` whose table
`[tool.hatch.metadata.hooks.custom]` lists the dependencies. `{version}` in that list stands for the
version in the `pyproject.toml` of the repository's root.
"""

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class SameVersion(MetadataHookInterface):
    """Fills in `dependencies`. Hatchling has read the version by then."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Write the dependencies into `metadata`."""
        version = metadata["version"]
        metadata["dependencies"] = [
            requirement.format(version=version) for requirement in self.config["dependencies"]
        ]

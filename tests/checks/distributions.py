"""Reads what the `pyproject.toml` of each distribution declares."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Distribution", "distributions", "version"]


@dataclass(frozen=True)
class Distribution:
    """A distribution of the workspace: its name, folder, dependencies, and those of its extras."""

    name: str
    folder: Path
    dependencies: Sequence[str]
    extras: Mapping[str, Sequence[str]]


def version(root: Path) -> str:
    """Return the version of all distributions, from the `pyproject.toml` in `root`."""
    found = _read(root)["tool"]["latchkey"]["version"]
    assert isinstance(found, str)
    return found


def distributions(root: Path) -> list[Distribution]:
    """Return the members of the workspace in `root`."""
    same = version(root)
    found = []
    for member in _read(root)["tool"]["uv"]["workspace"]["members"]:
        declared = _read(root / member)
        hook = declared["tool"]["hatch"]["metadata"]["hooks"]["custom"]
        found.append(
            Distribution(
                name=declared["project"]["name"],
                folder=root / member,
                # As hatch_build.py does.
                dependencies=[text.format(version=same) for text in hook["dependencies"]],
                extras=declared["project"].get("optional-dependencies", {}),
            )
        )
    return found


def _read(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))

"""Checks the lock files: no address, a hash for each entry, and the requested versions."""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.checks.steps import Outcome, failed, ok

__all__ = ["check", "complaints"]

PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==(\S+)", re.MULTILINE)
ADDRESS = re.compile(
    r"://|\s@\s|^\s*(-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host)\b",
    re.MULTILINE,
)


def check(root: Path) -> Outcome:
    """Check the lock files below `root` against its pyproject.toml."""
    found = list(complaints(root))
    return failed("\n".join(found)) if found else ok()


def complaints(root: Path) -> Iterator[str]:
    """Yield one line for each fault of a lock file."""
    pins: dict[str, dict[str, str]] = {}
    for path in sorted((root / "requirements").glob("*.txt")):
        text = path.read_text("utf-8")
        yield from entry_faults(f"requirements/{path.name}", text)
        pins[path.name] = {str(canonicalize_name(n)): version for n, version in PIN.findall(text)}
    for name, requirements in wanted(root).items():
        yield from missing(name, pins.get(name, {}), requirements)
    for name in sorted(pins):
        for package, version in pins[name].items():
            other = pins.get("run.txt", {}).get(package, version)
            if other != version:
                yield f"requirements/{name}: {package} {version}, but {other} in run.txt"


def entry_faults(name: str, text: str) -> Iterator[str]:
    """Yield the faults of a lock file that its text alone shows."""
    for found in ADDRESS.finditer(text):
        line = text.count("\n", 0, found.end()) + 1
        yield f"{name}:{line}: names an address; a lock file must work with any index"
    for entry in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE):
        if PIN.match(entry):
            if "--hash=sha256:" not in entry:
                yield f"{name}: {entry.split()[0]} has no hash"
        elif re.match(r"[A-Za-z0-9]", entry):
            yield f"{name}: {entry.split()[0]} is not pinned with =="


def wanted(root: Path) -> Mapping[str, Sequence[str]]:
    """Return the requirements that each lock file must meet, from pyproject.toml and build.in."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"]
    runtime = project["project"]["dependencies"]
    build = [
        line
        for line in (root / "requirements/build.in").read_text("utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    everything = [*runtime, *(line for extra in extras.values() for line in extra), *build]
    return {
        "run.txt": everything,
        "service.txt": [*runtime, *extras["service"], *extras["cli"]],
        "dev.txt": [*everything, *project["dependency-groups"]["dev"]],
    }


def missing(name: str, pins: Mapping[str, str], requirements: Sequence[str]) -> Iterator[str]:
    """Yield the requirements that the pins of a lock file do not meet."""
    for text in requirements:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        if version is None:
            yield f"requirements/{name}: lacks {requirement.name}; run make lock"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"requirements/{name}: {requirement.name} {version} is not {text}; run make lock"

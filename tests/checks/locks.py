"""Checks the lock files: no address, a hash for each entry, and the requested versions."""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.checks.distributions import distributions
from tests.checks.steps import Outcome, failed, ok

__all__ = ["check", "complaints"]

PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==(\S+)", re.MULTILINE)
ADDRESS = re.compile(
    r"://|\s@\s|^\s*(-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host)\b",
    re.MULTILINE,
)


def check(root: Path) -> Outcome:
    """Check the lock files below `root` against what its distributions declare."""
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
    # `make test` installs only dev.txt.
    for package in pins.get("run.txt", {}):
        if package not in pins.get("dev.txt", {}):
            yield f"requirements/dev.txt: lacks {package} of run.txt; run make lock"
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
    """Return the requirements that each lock file must meet, as the project declares them."""
    members = distributions(root)
    ours = {canonicalize_name(member.name) for member in members}
    runtime = [
        text
        for member in members
        for text in member.dependencies
        # Installed from this repository, so not locked.
        if canonicalize_name(Requirement(text).name) not in ours
    ]
    # `make run` needs no framework, which only some guards of the client library do.
    own, frameworks = (
        [
            text
            for member in members
            for extra in member.extras.values()
            for text in extra
            if (member.name == "latchkey-client") is of_guards
        ]
        for of_guards in (False, True)
    )
    # Container images can export traces without another build.
    tracing = [
        text
        for member in members
        if member.name == "latchkey-service"
        for text in member.extras["tracing"]
    ]
    build = [
        line
        for line in (root / "requirements/build.in").read_text("utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    groups = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["dependency-groups"]
    return {
        "run.txt": [*runtime, *own, *build],
        "service.txt": [*runtime, *tracing],
        "dev.txt": [*runtime, *own, *frameworks, *build, *groups["dev"]],
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

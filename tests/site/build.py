"""Builds the site, and checks it."""

import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.checks.steps import Outcome, State, command, failed, ok
from tests.site import grpc_reference, links, pages, python_reference

__all__ = ["build", "unlisted"]

# Some seconds on an idle machine.
BUILD_SECONDS = 180.0


def build(root: Path) -> Outcome:
    """Write the pages to build/docs and the site to build/site. A warning is a failure."""
    folder = root / "build"
    source, site = folder / "docs", folder / "site"
    for old in (source, site):
        shutil.rmtree(old, ignore_errors=True)
    try:
        pages.stage(root, source)
    except pages.BrokenLink as error:
        return failed(str(error))
    (source / "reference").mkdir(exist_ok=True)
    (source / "reference/grpc.md").write_text(grpc_reference.page(), "utf-8")
    (source / "reference/python.md").write_text(python_reference.page(), "utf-8")
    configuration = folder / "zensical.toml"
    shutil.copyfile(root / "tests/site/zensical.toml", configuration)
    outcome = command(
        *("zensical", "build", "--strict", "--clean", "--config-file", str(configuration)),
        cwd=folder,
        seconds=BUILD_SECONDS,
    )
    if outcome.state is not State.OK:
        return outcome
    faults = [
        *(f"not in both docs and the navigation: {name}" for name in unlisted(source)),
        *(f"leads nowhere: {link}" for link in links.broken(site)),
        *(f"loaded from another host: {address}" for address in links.foreign(site)),
    ]
    return failed("\n".join(faults)) if faults else ok()


def unlisted(source: Path) -> list[str]:
    """Return the pages that only the navigation has, or only the folder. Pages of single files are
    reached by links."""
    project = tomllib.loads((source.parent / "zensical.toml").read_text("utf-8"))["project"]
    there = {page.relative_to(source).as_posix() for page in source.rglob("*.md")}
    written = {name for name in there if not name.startswith("files/")}
    return sorted(written ^ set(_listed(project["nav"])))


def _listed(entry: Any) -> Iterator[str]:
    """Return the pages of a part of the navigation."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        for value in entry.values():
            yield from _listed(value)
    else:
        for value in entry:
            yield from _listed(value)

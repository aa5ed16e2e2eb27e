"""Runs every step, prints one line for each, and exits with 1 if any step failed.

Run it as `make check`, or as `python -m tests.checks` in the root of the repository. With names of
steps as arguments, it runs only those.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

from tests.checks import audit, contract, documents, locks, schemas
from tests.checks.steps import ROOT, Outcome, command, run
from tests.site import build as site

PACKAGES = (
    "hatch_build.py",
    "proto/latchkey_coherence",
    "service/latchkey_service",
    "clients/python/latchkey",
    "clients/cli/latchkey_cli",
    "clients/console/latchkey_console",
)
PROTO = ROOT / "proto"

STEPS = [
    ("ruff check", partial(command, "ruff", "check", "--quiet", ".")),
    ("ruff format", partial(command, "ruff", "format", "--check", "--quiet", ".")),
    ("mypy", partial(command, "mypy", *PACKAGES)),
    ("mypy tests", partial(command, "mypy", "tests")),
    ("mypy examples", partial(command, "mypy", "examples")),
    ("mypy documents", partial(documents.check, ROOT)),
    ("imports", partial(command, "lint-imports", "--no-cache", "--no-logo")),
    ("buf lint", partial(command, "buf", "lint", cwd=PROTO)),
    ("buf format", partial(command, "buf", "format", "--diff", "--exit-code", cwd=PROTO)),
    ("buf breaking", partial(contract.breaking, ROOT)),
    ("stubs", partial(command, sys.executable, "proto/generate.py", "--check")),
    ("locks", partial(locks.check, ROOT)),
    ("schemas", partial(schemas.check, ROOT)),
    ("site", partial(site.build, ROOT)),
    ("pip-audit", partial(audit.check, ROOT)),
]


def chosen(arguments: Sequence[str]) -> list[tuple[str, Callable[[], Outcome]]]:
    """Return the steps that the arguments name, or all; exit with 2 if a name is unknown."""
    names = [name for name, _ in STEPS]
    parser = argparse.ArgumentParser(prog="python -m tests.checks", description="Check the code.")
    parser.add_argument("step", nargs="*", help=f"one of: {', '.join(names)} (default: all)")
    wanted = parser.parse_args(arguments).step
    if unknown := set(wanted) - set(names):
        parser.error(f"unknown step: {', '.join(sorted(unknown))}")
    return [(name, step) for name, step in STEPS if not wanted or name in wanted]


if __name__ == "__main__":
    sys.exit(run(chosen(sys.argv[1:])))

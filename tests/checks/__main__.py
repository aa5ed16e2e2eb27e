"""Runs every step, prints one line for each, and exits with 1 if any step failed.

Run it as `make check`, or as `python -m tests.checks` in the root of the repository.
"""

import sys
from functools import partial

from tests.checks import audit, contract, locks
from tests.checks.steps import ROOT, command, run

PACKAGES = (
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
    ("imports", partial(command, "lint-imports", "--no-cache", "--no-logo")),
    ("buf lint", partial(command, "buf", "lint", cwd=PROTO)),
    ("buf format", partial(command, "buf", "format", "--diff", "--exit-code", cwd=PROTO)),
    ("buf breaking", partial(contract.breaking, ROOT)),
    ("stubs", partial(command, sys.executable, "proto/generate.py", "--check")),
    ("locks", partial(locks.check, ROOT)),
    ("pip-audit", partial(audit.check, ROOT)),
]

if __name__ == "__main__":
    sys.exit(run(STEPS))

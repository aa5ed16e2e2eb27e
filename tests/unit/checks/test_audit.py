"""How the check for known vulnerabilities reads pip-audit's answer."""

import json
from collections.abc import Mapping

import pytest

from tests.checks.audit import judge
from tests.checks.steps import State, failed

CLEAN = {"name": "base", "version": "1.0", "vulns": []}
FAULTY = {
    "name": "shell",
    "version": "2.0",
    "vulns": [
        {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.1", "3.0"]},
        {"id": "PYSEC-2", "fix_versions": []},
    ],
}
UNKNOWN = {"name": "server", "skip_reason": "not found"}


def report(*packages: Mapping[str, object]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


@pytest.mark.parametrize("code", [0, 1])
def test_vulnerability_fails(code: int) -> None:
    """Each vulnerability is named with its fix, whatever the exit code and the other packages."""
    assert judge(code, report(CLEAN, FAULTY, UNKNOWN), "") == failed(
        "shell 2.0: PYSEC-1 CVE-1, fixed in 2.1, 3.0\nshell 2.0: PYSEC-2, fixed in no version yet"
    )


@pytest.mark.parametrize(
    "errors",
    [
        "requests.exceptions.ConnectionError: ...",
        "HTTPSConnectionPool: Read timed out. (read timeout=10)",
        "503 Server Error: Service Unavailable",
        "403 Client Error: Forbidden",
    ],
)
def test_unreachable_source_is_skipped(errors: str) -> None:
    """A source that cannot be reached skips the check."""
    assert judge(1, "", errors).state is State.SKIPPED


@pytest.mark.parametrize(
    ("code", "text", "errors", "shown"),
    [
        (1, "", "ERROR: requirements/run.txt: unpinned requirement", "unpinned requirement"),
        (2, "usage: pip-audit", "", "usage: pip-audit"),
        (3, "", "", "exit code 3"),
        (1, report(CLEAN), "ERROR: a hash does not match", "a hash does not match"),
        (4, report(CLEAN), "", "exit code 4"),
    ],
)
def test_other_failures_fail(code: int, text: str, errors: str, shown: str) -> None:
    """A failure of pip-audit itself is a failure, and its message is shown."""
    outcome = judge(code, text, errors)
    assert outcome.state is State.FAILED
    assert shown in outcome.text

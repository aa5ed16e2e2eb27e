"""Looks up known vulnerabilities of the pinned packages, with pip-audit.

A known vulnerability fails the check. A source of vulnerability data that does not answer, or does
not know a package, does not.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.checks.steps import Outcome, failed, ok, skipped

__all__ = ["check", "judge"]

# The vulnerability data comes over the network, which may be slow, filtered or absent.
AUDIT_SECONDS = 60.0
# For each connection; several fit into the time for the whole audit.
CONNECTION_SECONDS = 10
UNREACHABLE = re.compile(
    r"ConnectionError|ConnectTimeout|ReadTimeout|timed out|Max retries exceeded|NameResolutionError"
    r"|SSLError|ProxyError|\b(?:403|407|429|5\d\d) (?:Client|Server) Error"
)


def check(root: Path) -> Outcome:
    """Audit requirements/run.txt, which pins everything that users install."""
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip_audit", "--requirement", "requirements/run.txt"),
                *("--require-hashes", "--disable-pip", "--timeout", str(CONNECTION_SECONDS)),
                *("--progress-spinner", "off", "--format", "json"),
            ],
            cwd=root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=AUDIT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return skipped("the source of vulnerability data did not answer in time")
    return judge(done.returncode, done.stdout, done.stderr)


def judge(code: int, report: str, errors: str) -> Outcome:
    """Derive the outcome from pip-audit's exit code, report and error output."""
    try:
        packages = json.loads(report)["dependencies"]
    except ValueError:
        if UNREACHABLE.search(errors):
            return skipped("the source of vulnerability data cannot be reached")
        return failed(errors or report or f"pip-audit ended with exit code {code} and no output")
    found = [line(package, fault) for package in packages for fault in package.get("vulns", [])]
    if found:
        return failed("\n".join(found))
    if code:
        return failed(errors or f"pip-audit ended with exit code {code}")
    unknown = sum("skip_reason" in package for package in packages)
    if unknown:
        return skipped(
            f"the source of vulnerability data does not know {unknown} of {len(packages)} packages"
        )
    return ok()


def line(package: dict[str, Any], fault: dict[str, Any]) -> str:
    """Describe one vulnerability of one package."""
    names = " ".join([fault["id"], *fault.get("aliases", [])])
    fixed = ", ".join(fault["fix_versions"]) or "no version yet"
    return f"{package['name']} {package['version']}: {names}, fixed in {fixed}"

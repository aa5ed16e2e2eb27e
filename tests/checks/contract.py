"""Compares the contract with the one on the main branch, with `buf breaking`."""

import subprocess
import tempfile
from pathlib import Path

from tests.checks.steps import Outcome, command, failed, skipped

__all__ = ["MAIN", "breaking"]

# The published branch first; a clone without a remote has only its own.
MAIN = ("refs/remotes/origin/main", "refs/heads/main")
# git reads a few small files. A command that takes this long hangs.
GIT_SECONDS = 60.0


def breaking(root: Path) -> Outcome:
    """Check that a client of the contract on the main branch works with the contract in `root`."""
    base = base_commit(root)
    if base is None:
        return skipped("git finds no earlier commit of the main branch")
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "main.tar"
        if git(root, "archive", f"--output={before}", base, "proto") is None:
            return failed(f"git cannot read proto/ of commit {base}")
        return command("buf", "breaking", "--against", f"{before}#subdir=proto", cwd=root / "proto")


def base_commit(root: Path) -> str | None:
    """Return the last commit of the main branch, or the one before it if it is checked out.

    The checked-out commit contains the change that is being checked, so it is not compared with
    itself.
    """
    head = commit(root, "HEAD")
    for branch in MAIN:
        last = commit(root, branch)
        if last is not None:
            return commit(root, f"{branch}~1") if last == head else last
    return None


def commit(root: Path, name: str) -> str | None:
    """Return the hash of the commit that `name` refers to."""
    found = git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    return None if found is None else found.strip()


def git(root: Path, *arguments: str) -> str | None:
    """Run git in `root` and return its output, or None if git is missing or fails."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=GIT_SECONDS,
        )
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None

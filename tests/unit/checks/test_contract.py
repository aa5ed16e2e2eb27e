"""Which commit the contract is compared with, and what the comparison finds."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.checks import contract
from tests.checks.steps import ROOT, State, ok

# Creates, commits and clones a repository of two files.
GIT_SECONDS = 60.0
PROTO = """syntax = "proto3";

package sample.v1;

message Sample {
  string name = 1;
  string note = 2;
}
"""
BROKEN = PROTO.replace("  string note = 2;\n", "")

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
    done = subprocess.run(
        ["git", *identity, *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        timeout=GIT_SECONDS,
    )
    return done.stdout.strip()


def write(root: Path, text: str) -> None:
    path = root / "proto/sample/v1/sample.proto"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def commit(root: Path, text: str) -> str:
    """Commit the contract `text` and return the commit."""
    write(root, text)
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--allow-empty", "--message", "sample")
    return git(root, "rev-parse", "HEAD")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository without a commit."""
    root = tmp_path / "repository"
    (root / "proto").mkdir(parents=True)
    shutil.copy(ROOT / "proto/buf.yaml", root / "proto/buf.yaml")
    git(root, "init", "--quiet", "--initial-branch=main")
    return root


def test_branch_is_compared_with_main(root: Path) -> None:
    """On another branch, a field that main has must not be removed."""
    first = commit(root, PROTO)
    git(root, "switch", "--quiet", "--create", "topic")
    commit(root, PROTO + "\nmessage More {}\n")
    assert contract.base_commit(root) == first
    assert contract.breaking(root) == ok()
    commit(root, BROKEN)
    outcome = contract.breaking(root)
    assert outcome.state is State.FAILED
    assert 'Previously present field "2"' in outcome.text


def test_main_is_compared_with_the_commit_before(root: Path) -> None:
    """A breaking commit on main fails on main, where CI checks it out."""
    first = commit(root, PROTO)
    commit(root, BROKEN)
    assert contract.base_commit(root) == first
    assert contract.breaking(root).state is State.FAILED


def test_shallow_clone_is_skipped(root: Path, tmp_path: Path) -> None:
    """A clone of one commit has nothing to compare with."""
    commit(root, PROTO)
    commit(root, BROKEN)
    clone = tmp_path / "clone"
    git(root, "clone", "--quiet", "--depth=1", root.as_uri(), str(clone))
    outcome = contract.breaking(clone)
    assert outcome.state is State.SKIPPED
    assert "no earlier commit" in outcome.text

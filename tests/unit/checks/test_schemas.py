"""What the check of GitHub's and Docker's files accepts and rejects."""

import shutil
from pathlib import Path

import pytest

from tests.checks import schemas
from tests.checks.steps import ROOT, State, ok


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with this repository's files."""
    for pattern in schemas.SCHEMAS:
        for path in ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return tmp_path


def test_own_files_pass(root: Path) -> None:
    """This repository's files match their schemas."""
    assert schemas.check(root) == ok()


def test_wrong_keys_are_rejected(root: Path) -> None:
    """A misspelled key fails the check, in each kind of file. The outcome names every file."""
    names = (".github/workflows/ci.yml", ".github/dependabot.yml", "docker-compose.yml")
    for name in names:
        path = root / name
        path.write_text(path.read_text("utf-8") + "\nno-such-key: 1\n")
    outcome = schemas.check(root)
    assert outcome.state is State.FAILED
    for name in names:
        assert str(root / name) in outcome.text


def test_missing_file_is_rejected(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moved file fails the check."""
    pattern = ".github/workflows/*.yml"
    # Alone, because each check of a file that exists takes two seconds.
    monkeypatch.setattr(schemas, "SCHEMAS", {pattern: schemas.SCHEMAS[pattern]})
    (root / ".github/workflows/ci.yml").unlink()
    outcome = schemas.check(root)
    assert (outcome.state, outcome.text) == (
        State.FAILED,
        "no file matches .github/workflows/*.yml",
    )

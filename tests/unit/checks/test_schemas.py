"""What the check of GitHub's and Docker's files accepts and rejects."""

import shutil
from importlib.util import find_spec
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


def only(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """Check only these files."""
    monkeypatch.setattr(schemas, "SCHEMAS", {pattern: schemas.SCHEMAS[pattern]})


def test_valid_files_pass(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check passes if all files match their schemas."""
    only(monkeypatch, ".github/dependabot.yml")
    assert schemas.check(root) == ok()


def test_wrong_keys_are_rejected(root: Path) -> None:
    """A misspelled key fails the check, in each kind of file. The outcome names every wrong file,
    and none of this repository's own files."""
    own = (".github/workflows/ci.yml", "docker-compose.yml")
    # There is one file of this kind.
    wrong = {".github/dependabot.yml": ".github/dependabot.yml"}
    wrong |= {name: name.replace(".yml", ".wrong.yml") for name in own}
    for name, copy in wrong.items():
        text = (root / name).read_text("utf-8")
        (root / copy).write_text(f"{text}\nno-such-key: 1\n")
    outcome = schemas.check(root)
    assert outcome.state is State.FAILED
    for copy in wrong.values():
        assert str(root / copy) in outcome.text
    for name in own:
        assert str(root / name) not in outcome.text


def test_missing_file_is_rejected(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moved file fails the check."""
    only(monkeypatch, ".github/workflows/*.yml")
    (root / ".github/workflows/ci.yml").unlink()
    outcome = schemas.check(root)
    assert (outcome.state, outcome.text) == (
        State.FAILED,
        "no file matches .github/workflows/*.yml",
    )


def test_schemas_need_no_iris() -> None:
    """No schema has the format `iri` or `iri-reference`, which the check ignores."""
    # Does not import the package, which takes long.
    spec = find_spec("check_jsonschema")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "builtin_schemas"
    for schema in schemas.SCHEMAS.values():
        kind, _, name = schema.partition(".")
        text = (folder / kind / f"{name}.json").read_text("utf-8")
        assert '"properties"' in text
        assert '"iri' not in text

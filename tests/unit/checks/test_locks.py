"""What the check of the lock files accepts and rejects."""

from pathlib import Path

import pytest

from tests.checks import locks
from tests.checks.steps import ROOT, ok

ROOT_PROJECT = """
[tool.latchkey]
version = "1.2"
[tool.uv.workspace]
members = ["core", "server"]
[dependency-groups]
dev = ["linter<5; sys_platform == 'linux'"]
"""
CORE = """
[project]
name = "our-core"
[tool.hatch.metadata.hooks.custom]
dependencies = ["Base_Lib>=1"]
"""
SERVER = """
[project]
name = "our-server"
[project.optional-dependencies]
shell = ["shell-lib>=2"]
[tool.hatch.metadata.hooks.custom]
dependencies = ["Our_Core=={version}", "server-lib==3.1"]
"""
HASH = " \\\n    --hash=sha256:00\n"
PINS = {
    "run.txt": ["base-lib==1.4", "shell-lib==2.0", "server-lib==3.1", "builder==1.0"],
    "service.txt": ["base-lib==1.4", "server-lib==3.1"],
    "dev.txt": [
        *("base-lib==1.4", "shell-lib==2.0", "server-lib==3.1", "builder==1.0"),
        "linter==4.9 ; sys_platform == 'linux'",
    ],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project whose lock files are right."""
    for folder, text in (("", ROOT_PROJECT), ("core", CORE), ("server", SERVER)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "pyproject.toml").write_text(text)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/build.in").write_text("# comment\nbuilder\n\n")
    for name, pins in PINS.items():
        (tmp_path / "requirements" / name).write_text("".join(pin + HASH for pin in pins))
    return tmp_path


def replace(root: Path, name: str, before: str, after: str) -> None:
    path = root / "requirements" / name
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def test_valid_lock_files_pass(root: Path) -> None:
    """Names match whatever their spelling, the distributions themselves are not locked, and the
    project's own lock files pass."""
    assert locks.check(root) == ok()
    assert locks.check(ROOT) == ok()


@pytest.mark.parametrize(
    "address",
    [
        "--index-url https://index.example/simple",
        "--extra-index-url index.example",
        "-i index.example",
        "-f wheels",
        "  --find-links wheels",
        "--trusted-host index.example",
        "other @ file:///wheels/other.whl",
        "# from http://index.example",
    ],
)
def test_address_is_rejected(root: Path, address: str) -> None:
    """A lock file that names an index, a host or a file fails, with the line."""
    path = root / "requirements/run.txt"
    path.write_text(path.read_text() + address + "\n")
    found = list(locks.complaints(root))
    assert any(text.startswith("requirements/run.txt:9: names an address") for text in found), found


def test_missing_hash_is_rejected(root: Path) -> None:
    """An entry without a hash fails, even if the entries around it have one."""
    replace(root, "run.txt", f"shell-lib==2.0{HASH}", "shell-lib==2.0\n")
    assert list(locks.complaints(root)) == ["requirements/run.txt: shell-lib==2.0 has no hash"]


def test_unpinned_entry_is_rejected(root: Path) -> None:
    """An entry that allows several versions fails."""
    replace(root, "dev.txt", "builder==1.0", "builder>=1.0")
    assert "requirements/dev.txt: builder>=1.0 is not pinned with ==" in locks.complaints(root)


@pytest.mark.parametrize(
    ("name", "pin", "package"),
    [
        ("run.txt", "base-lib==1.4", "Base_Lib"),
        ("run.txt", "builder==1.0", "builder"),
        ("service.txt", "server-lib==3.1", "server-lib"),
        ("dev.txt", "linter==4.9 ; sys_platform == 'linux'", "linter"),
    ],
)
def test_missing_package_is_rejected(root: Path, name: str, pin: str, package: str) -> None:
    """Each lock file contains everything that it is made from."""
    replace(root, name, pin + HASH, "")
    assert list(locks.complaints(root)) == [f"requirements/{name}: lacks {package}; run make lock"]


def test_wrong_version_is_rejected(root: Path) -> None:
    """A pinned version that pyproject.toml does not allow fails."""
    replace(root, "dev.txt", "linter==4.9", "linter==5.0")
    assert list(locks.complaints(root)) == [
        "requirements/dev.txt: linter 5.0 is not linter<5; sys_platform == 'linux'; run make lock"
    ]


def test_different_versions_are_rejected(root: Path) -> None:
    """Tests and the container use the versions that run.txt pins."""
    replace(root, "service.txt", "base-lib==1.4", "base-lib==1.5")
    assert list(locks.complaints(root)) == [
        "requirements/service.txt: base-lib 1.5, but 1.4 in run.txt"
    ]


def test_the_tools_include_what_runs(root: Path) -> None:
    """dev.txt lists every package of run.txt, because `make test` installs nothing else."""
    pin = f"indirect==1.0{HASH}"
    path = root / "requirements/run.txt"
    path.write_text(path.read_text() + pin)
    complaint = "requirements/dev.txt: lacks indirect of run.txt; run make lock"
    assert list(locks.complaints(root)) == [complaint]
    tools = root / "requirements/dev.txt"
    tools.write_text(tools.read_text() + pin)
    assert locks.check(root) == ok()

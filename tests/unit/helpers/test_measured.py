"""What `make test` counts as covered, and when it fails. Each test measures a small suite."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fork_server import fork_server
from tests.helpers.repository import ROOT

# A few small tests in some interpreters, on a busy machine.
SECONDS = 60.0
SETTINGS = """
[tool.slipcover]
branch = true
source = ["library"]
exclude-also = ["^if __name__ == .__main__.:"]
fail-under = {floor}
"""
LIBRARY = """
def first(number):
    if number:
        number += 1
    return number

def second():
    return 2

def missed():
    return 3

if __name__ == "__main__":
    missed()
"""
# As tests/conftest.py imports the service.
CONFTEST = "import library.used\n"
TESTS = {
    "tests/test_first.py": "import library.used\ndef test(): assert library.used.first(1) == 2\n",
    "tests/test_second.py": "import library.used\ndef test(): assert library.used.second() == 2\n",
}
# SlipCover's columns: lines, missed lines, branches, missed branches, two percentages, what is
# missing.
ROW = re.compile(
    r"^library/(\w+)\.py +(\d+) +(\d+) +(\d+) +(\d+) +\d+ +\d+ +(.+?) *$", re.MULTILINE
)


def measure(folder: Path, *options: str, floor: float) -> subprocess.CompletedProcess[str]:
    """Measure the small suite, of which each worker runs one test."""
    files = {
        "pyproject.toml": SETTINGS.format(floor=floor),
        "library/__init__.py": "",
        "library/used.py": LIBRARY,
        "library/unused.py": "def unused():\n    return 1\n",
        "tests/conftest.py": CONFTEST,
        **TESTS,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "xdist", "-q"),
            *options,
            *("--import-mode=importlib", "--rootdir", ".", "tests"),
        ],
        cwd=folder,
        env={
            "PATH": "",
            # The suite's own folder is called `tests` too.
            "PYTHONPATH": f"{folder}:{ROOT}",
            # Hypothesis, selenium and others take longer to import than these tests to run.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_PLUGINS": "tests.helpers.measured",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )


@pytest.mark.parametrize("options", [("-n", "0"), ("-n", "2")])
def test_lines_and_branches_of_all_workers_count(tmp_path: Path, options: tuple[str, ...]) -> None:
    """The report unites the workers, from the first import on. It lists each missed line and
    branch, and modules that nothing imports."""
    done = measure(tmp_path, *options, floor=1)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {name: tuple(rest) for name, *rest in ROW.findall(done.stdout)}
    assert rows["used"] == ("8", "1", "2", "1", "3->5, 11")
    assert rows["unused"] == ("2", "2", "0", "0", "1-2")
    assert re.search(r"^Coverage: 66\.7 %; of branches alone: 50\.0 %$", done.stdout, re.MULTILINE)


def test_too_little_coverage_fails_the_run(tmp_path: Path) -> None:
    """A run below the floor fails although its tests pass, and says why."""
    done = measure(tmp_path, floor=90)
    assert "2 passed" in done.stdout
    assert "FAILED: coverage is below the floor of 90 %" in done.stdout
    assert done.returncode == 1


def test_forked_program_that_becomes_another_counts(tmp_path: Path) -> None:
    """A forked program is measured, including its main module, even if another program replaces
    it."""
    seen = tmp_path / "seen"
    seen.mkdir()
    with fork_server(tmp_path, coverage=str(seen)) as forked:
        command = forked("latchkey_cli", "dev-ca", "--caller", "a b")
        done = subprocess.run(command, capture_output=True, check=False, timeout=SECONDS)
    assert done.returncode == 2
    lines: dict[str, set[int]] = {}
    for saved in seen.glob("*.json"):
        for name, found in json.loads(saved.read_text("utf-8")).items():
            lines.setdefault(name, set()).update(n for n in found if isinstance(n, int))
    tool = ROOT / "clients/cli/latchkey_cli"
    for module, text in (("__main__.py", "sys.exit("), ("service.py", "os.execve(")):
        code = (tool / module).read_text("utf-8").splitlines()
        (line,) = (number for number, each in enumerate(code, 1) if text in each)
        assert line in lines[str(tool / module)]

"""The pre-commit hooks and the GitHub workflow run what `make check` and `make test` run."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checks.__main__ import chosen
from tests.checks.distributions import distributions
from tests.checks.steps import ROOT

HOOKS = ROOT / ".pre-commit-config.yaml"
WORKFLOW = ROOT / ".github/workflows/ci.yml"
# Reads one small file. A run that takes this long hangs.
VALIDATE_SECONDS = 60.0


def hooks() -> list[dict[str, Any]]:
    repositories = yaml.safe_load(HOOKS.read_text("utf-8"))["repos"]
    # Other repositories would be fetched over the network, in versions that no lock file names.
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks: list[dict[str, Any]] = repositories[0]["hooks"]
    return hooks


def job() -> dict[str, Any]:
    jobs = yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]
    (job,) = jobs.values()
    assert isinstance(job, dict)
    return job


def test_hooks_are_valid() -> None:
    """pre-commit accepts the configuration."""
    subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-config", str(HOOKS)],
        check=True,
        timeout=VALIDATE_SECONDS,
    )


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook["id"])
def test_hook_uses_installed_tools(hook: dict[str, Any]) -> None:
    """Each hook runs a program of .venv, and names steps of `make check` that exist."""
    program, *arguments = shlex.split(hook["entry"])
    assert hook["language"] == "system"
    assert program.startswith(".venv/bin/")
    assert (Path(sys.prefix) / "bin" / Path(program).name).exists()
    if arguments[:2] == ["-m", "tests.checks"]:
        assert arguments[2:]
        assert [name for name, _ in chosen(arguments[2:])] == arguments[2:]
        assert hook["pass_filenames"] is False


def test_unknown_step_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelled step fails instead of checking nothing."""
    with pytest.raises(SystemExit) as exit_:
        chosen(["lokcs"])
    assert exit_.value.code == 2
    assert "unknown step: lokcs" in capsys.readouterr().err


def test_workflow_runs_make() -> None:
    """GitHub runs `make check` and all tests, the tests even if a check failed."""
    steps = {step["run"]: step for step in job()["steps"] if "run" in step}
    assert "if" not in steps["make check"]
    for command in ("make test", "make test-slow"):
        assert steps[command]["if"] == "${{ !cancelled() }}"


def test_each_test_runs_in_ci() -> None:
    """A test is either slow or not, and `.ci/run` runs both kinds, whatever the others say."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    chosen = re.findall(r"^\t@?exec \$\(PYTEST\) -n \d (.+)$", makefile, re.MULTILINE)
    assert chosen == ['$(or $(ARGS),-m "not slow")', "-m slow $(ARGS)"]
    for path in (ROOT / "tests").rglob("test_*.py"):
        # A mark without a reason would hide why the test is not in `make test`.
        assert not re.search(r"mark\.slow(?!\(\"\w)", path.read_text("utf-8")), path
    commands = re.findall(r"^run (\S+)$", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE)
    assert commands == ["check", "test", "test-slow"]


def test_workflow_uses_supported_versions() -> None:
    """GitHub tests the oldest supported Python and the one in the container image."""
    oldest = {
        tomllib.loads((member.folder / "pyproject.toml").read_text("utf-8"))["project"][
            "requires-python"
        ]
        for member in distributions(ROOT)
    }
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    image = re.search(r"^FROM python:(\d+\.\d+)", dockerfile, re.MULTILINE)
    assert image is not None
    first, last = job()["strategy"]["matrix"]["python"]
    assert ({f">={first}"}, image[1]) == (oldest, last)


def test_workflow_needs_no_secret() -> None:
    """The workflow can only read the repository, and uses actions by major version."""
    text = WORKFLOW.read_text("utf-8")
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    actions = [step["uses"] for step in job()["steps"] if "uses" in step]
    assert actions
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)

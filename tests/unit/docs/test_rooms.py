"""The boundaries in docs/architecture.md hold, and the rooms' docstrings are true.

import-linter checks the imports (`[tool.importlinter]` in pyproject.toml) in `make check`. This
module checks which modules may contain SQL, and that no module is too long.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT

SERVICE = ROOT / "service/latchkey_service"
SOURCES = (
    "proto/latchkey_coherence",
    "proto/latchkey_proto",
    "service/latchkey_service",
    "clients/python/latchkey",
    "clients/cli/latchkey_cli",
    "clients/console/latchkey_console",
)
# The linter takes half a second on an idle machine; one that takes this long hangs.
LINT_SECONDS = 60.0

# For each contract, a file, the line that breaks the contract in it, and what the linter reports.
VIOLATIONS = [
    (
        "rooms",
        "service/latchkey_service/postgres/hosts.py",
        "import latchkey_service.tokens.token_store",
        "latchkey_service.postgres.hosts -> latchkey_service.tokens.token_store (",
    ),
    (
        "rooms",
        "service/latchkey_service/new_room/__init__.py",
        '"""A room without a place."""',
        "not listed as layers: - latchkey_service.new_room",
    ),
    (
        "circles",
        "service/latchkey_service/tokens/verdict.py",
        "import latchkey_service.tokens.verifier",
        "No cycles are allowed in latchkey_service.tokens.",
    ),
    (
        "clients",
        "clients/python/latchkey/models.py",
        "import latchkey_cli.main",
        "latchkey.models -> latchkey_cli.main (",
    ),
    (
        "service-without-clients",
        "service/latchkey_service/errors.py",
        "import latchkey.models",
        "latchkey_service.errors -> latchkey.models (",
    ),
    (
        "clients-without-service",
        "clients/python/latchkey/models.py",
        "import latchkey_service",
        "latchkey.models -> latchkey_service (",
    ),
    (
        "clients-without-service",
        "proto/latchkey_coherence/lease.py",
        "import latchkey_service",
        "latchkey_coherence.lease -> latchkey_service (",
    ),
    (
        "protobuf",
        "service/latchkey_service/tokens/verdict.py",
        "import latchkey_proto.v1.token_service_pb2",
        "latchkey_service.tokens.verdict -> latchkey_proto.v1.token_service_pb2 (",
    ),
    (
        "protobuf",
        "service/latchkey_service/coherence/reads.py",
        "import google.protobuf",
        "latchkey_service.coherence.reads -> google (",
    ),
    (
        "protobuf",
        "clients/cli/latchkey_cli/main.py",
        "import latchkey_proto.v1",
        "latchkey_cli.main -> latchkey_proto.v1 (",
    ),
]

# A module that is longer holds more than one subject.
LINES_MAX = 450

# Modules that may contain SQL, apart from `*_store.py`, `*_table.py` and `migrate.py`.
SQL_ELSEWHERE = {
    "coherence/primary.py": "asks the server which primary it is and whether a standby has commits",
    "coherence/snapshot.py": "the fragment that both the store and the verifier table embed",
    "postgres/embedded_cluster.py": "creates the role and the database of a new cluster",
    "postgres/connections.py": "the trial statement on a connection",
    "postgres/grants.py": "the rights of the service's role",
    "postgres/inspection.py": "reads facts about the server for `latchkey doctor`",
    "postgres/preflight.py": "checks the server before the first migration",
    "postgres/sessions.py": "session settings, and the statement that finds the primary",
    "postgres/traced_connection.py": "the names of operations, for the spans of statements",
}
# Most modules contain none of these words and are not parsed.
SQL_WORDS = re.compile(r"SELECT|INSERT|UPDATE|DELETE|TRUNCATE|CONFLICT|CREATE|ALTER|DROP")
SQL = re.compile(
    r"\b(SELECT|INSERT INTO|UPDATE \w+\s+SET|DELETE FROM|TRUNCATE|ON CONFLICT"
    r"|(CREATE|ALTER|DROP) (TABLE|INDEX|ROLE|DATABASE|SCHEMA|FUNCTION|TYPE))\b"
)


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the packages below `root`, with this repository's contracts."""
    return subprocess.run(
        [Path(sys.prefix) / "bin/lint-imports", ROOT / "pyproject.toml", "--no-cache"],
        cwd=root,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(str((root / name).parent) for name in SOURCES)},
        capture_output=True,
        text=True,
        check=False,
        timeout=LINT_SECONDS,
    )


def contracts() -> dict[str, str]:
    """Return the names of the contracts in pyproject.toml by their ids."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return {each["id"]: each["name"] for each in project["tool"]["importlinter"]["contracts"]}


def broken(report: str) -> dict[str, str]:
    """Return what import-linter reports for each broken contract, in one line, by its name."""
    found = re.split(r"^(\S.*)\n-{5,}\n", report, flags=re.MULTILINE)[1:]
    return {
        name: " ".join(text.split()) for name, text in zip(found[::2], found[1::2], strict=True)
    }


def sql_in(path: Path) -> Iterator[str]:
    """Yield each string literal of a module that contains SQL; docstrings do not count."""
    text = path.read_text("utf-8")
    if not SQL_WORDS.search(text):
        return
    tree = ast.parse(text)
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in prose
            and SQL.search(node.value)
        ):
            yield node.value


def modules_with_sql(service: Path) -> set[str]:
    """Return the modules below `service` that contain SQL, by path, without those that may."""
    return {
        path.relative_to(service).as_posix()
        for path in service.rglob("*.py")
        if not re.search(r"(_store|_table|/migrate)\.py$", path.as_posix()) and any(sql_in(path))
    }


def imported_rooms(room: Path) -> set[str]:
    """Return the other rooms that the modules of `room` import."""
    names = set()
    for path in room.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    found = {name.split(".")[1] for name in names if name.startswith("latchkey_service.")}
    return {name for name in found if (SERVICE / name).is_dir()} - {room.name}


@pytest.mark.parametrize("room", sorted(path.parent for path in SERVICE.glob("*/__init__.py")))
def test_docstrings_of_rooms(room: Path) -> None:
    """A room's docstring says what it owns, lists the rooms that it imports, and names a module to
    begin with."""
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text("utf-8"))) or ""
    assert re.search(r"^Owns ", text, re.MULTILINE)
    imports = re.search(r"^Imports: (.+)\.$", text, re.MULTILINE)
    assert imports is not None
    listed = set() if imports[1] == "no other room" else set(imports[1].split(", "))
    assert listed == imported_rooms(room)
    begin = re.search(r"^Begin with `(\w+\.py)`", text, re.MULTILINE)
    assert begin is not None
    assert (room / begin[1]).is_file()


def test_modules_that_comments_name() -> None:
    """Each module that a comment or docstring names in backquotes exists, even where it names a
    constant of that module."""
    folders = [ROOT / name for name in (*SOURCES, "tests")]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    modules = [f"/{path}" for path in paths]
    for path in paths:
        text = path.read_text("utf-8")
        names = re.findall(r"`([\w/]+\.py)`", text)
        names += [f"{name}.py" for name in re.findall(r"`([a-z_]+)\.[A-Z][A-Z_]+`", text)]
        for name in names:
            assert any(module.endswith(f"/{name}") for module in modules), (path, name)


def test_imports() -> None:
    """Every import of the packages keeps to the contracts."""
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_contract_can_fail(tmp_path: Path) -> None:
    """The linter reports each forbidden import, and the room without a place, as a violation of its
    contract."""
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for _, name, line, _ in VIOLATIONS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    reports = broken(done.stdout)
    for contract, _, line, report in VIOLATIONS:
        assert report in reports[contracts()[contract]], (contract, line, done.stdout)


def test_each_contract_has_a_violation() -> None:
    """A new contract comes with an example of what it forbids."""
    assert {contract for contract, *_ in VIOLATIONS} == contracts().keys()


def test_modules_are_short() -> None:
    """No module of the packages or of the tests is longer than the limit."""
    longer = set()
    for name in (*SOURCES, "tests"):
        if name != "proto/latchkey_proto":  # generated
            for path in (ROOT / name).rglob("*.py"):
                if len(path.read_text("utf-8").splitlines()) > LINES_MAX:
                    longer.add(str(path.relative_to(ROOT)))
    assert longer == set()


def test_sql() -> None:
    """SQL is only in stores, tables, migrations and the modules listed here, which all contain
    some; clients contain none."""
    assert modules_with_sql(SERVICE) == set(SQL_ELSEWHERE)
    for name in ("clients", "proto"):
        assert modules_with_sql(ROOT / name) == set(), name


def test_sql_is_found(tmp_path: Path) -> None:
    """A statement in any other module is found, in an f-string too; SQL in a docstring is not a
    statement."""
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/verdict.py").write_text('QUERY = f"SELECT {1} FROM token"\n')
    (tmp_path / "tokens/other.py").write_text('"""Runs the SELECT of the store."""\n')
    (tmp_path / "tokens/token_store.py").write_text('QUERY = "DELETE FROM token"\n')
    assert modules_with_sql(tmp_path) == {"tokens/verdict.py"}

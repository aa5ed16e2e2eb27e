"""Measures which lines and branches of the service and the clients the tests execute.

A plugin of pytest, which `make test` loads before anything that it measures is imported
(`PYTEST_PLUGINS`). SlipCover adds a probe to each line that is measured, and changes no other code.
This costs much less than a tracer. It measures the processes of pytest, and the command line tools,
services and consoles that tests fork (`fork_server.py`).

Each process saves the lines that it has seen when it ends, unless it is killed. The process that
reports unites them. The probes are added once for all processes (`probed_code.py`). The settings
are in pyproject.toml (`[tool.slipcover]`).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import tomllib
from collections.abc import Generator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Final

import pytest
from slipcover import FileMatcher, ImportManager, Slipcover, print_coverage
from slipcover.importer import SlipcoverLoader

from tests.helpers.probed_code import ProbedCode
from tests.helpers.shared_compilation import in_turn

__all__ = ["FOLDER", "Measurement", "folder"]

# The variable that names the folder in which processes save what they have seen.
FOLDER: Final = "COVERAGE_FOLDER"
# The variable by which pytest loads this plugin. Another pytest that a test starts must not.
_PLUGINS: Final = "PYTEST_PLUGINS"
# SlipCover could remove the probes that have been passed so many times. With Python 3.11, it edits
# the code of all modules for that, so that an event loop stops for a quarter of a second; the whole
# suite would also use more processor time.
_PASSES_MAX: Final = 2**31 - 1

Coverage = dict[str, Any]


def folder() -> str | None:
    """Return the folder in which processes save what they have seen, or None if nothing is
    measured."""
    return os.environ.get(FOLDER)


class Measurement:
    """Measures the modules that this process imports from now on."""

    def __init__(self, root: Path, folder: Path) -> None:
        """Measure as the pyproject.toml in `root` says, and save in `folder`."""
        self._folder = folder
        settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["slipcover"]
        sources = [str(root / source) for source in settings["source"]]
        self._sources = sources
        self.floor = float(settings["fail-under"])
        self._slipcover = Slipcover(
            branch=settings["branch"],
            source=sources,
            exclude_also=settings["exclude-also"],
            d_miss_threshold=_PASSES_MAX,
        )
        self._imports = ImportManager(self._slipcover, FileMatcher(sources=sources))
        self._code = ProbedCode(self._slipcover, folder, _PASSES_MAX)

    def start(self) -> None:
        self._imports.__enter__()

        def code_of(loader: SlipcoverLoader, _name: str) -> CodeType:
            # Of a module that runs as a program (`runpy`) too, which SlipCover would not measure.
            return self._code.of(loader.origin)

        def execute(loader: SlipcoverLoader, module: ModuleType) -> None:
            exec(self._code.of(loader.origin), module.__dict__)  # noqa: S102 - as each loader does

        SlipcoverLoader.get_code, SlipcoverLoader.exec_module = code_of, execute

    def prepare(self, number: int, count: int) -> None:
        """Prepare all modules together with other processes; this is process `number` of
        `count`."""
        self._code.prepare(in_turn(self._modules(), number, count))

    def forked(self) -> None:
        """Forget what the parent has seen, which saves that itself."""
        self._slipcover.signal_child_process()

    def save(self) -> None:
        """Write what this process has seen."""
        seen: dict[str, set[Any]] = {}
        for part in (self._slipcover.all_seen, self._slipcover.newly_seen):
            # A list, because other threads may still run.
            for name, lines in list(part.items()):
                seen.setdefault(name, set()).update(lines)
        text = json.dumps({name: list(lines) for name, lines in seen.items()})
        # Written whole or not at all, because the process may be killed.
        number, name = tempfile.mkstemp(".part", dir=self._folder)
        os.write(number, text.encode())
        os.close(number)
        Path(name).rename(Path(name).with_suffix(".json"))

    def united(self) -> Coverage:
        """Return the coverage by all processes that have saved. Modules that no process has
        imported count too."""
        for path in self._folder.glob("*.json"):
            for name, lines in json.loads(path.read_text("utf-8")).items():
                # A branch is a pair of lines.
                seen = (tuple(line) if isinstance(line, list) else line for line in lines)
                self._slipcover.all_seen[name].update(seen)
        self._code.count(self._modules())
        coverage: Coverage = self._slipcover.get_coverage()
        return coverage

    def _modules(self) -> list[Path]:
        return sorted(path for source in self._sources for path in Path(source).rglob("*.py"))


def percent_of_branches(summary: Coverage) -> float:
    """Return the percentage of covered branches, and 100 without any."""
    covered, missing = summary["covered_branches"], summary["missing_branches"]
    return 100.0 * covered / (covered + missing) if covered + missing else 100.0


class _Plugin:
    """Measures the tests that this process runs, or reports what the workers have measured."""

    def __init__(self, root: Path, *, runs: bool, reports: bool) -> None:
        """Both are true without pytest-xdist."""
        if reports:
            os.environ[FOLDER] = tempfile.mkdtemp(prefix="latchkey-coverage-")
        self._folder = Path(os.environ[FOLDER])
        self._runs, self._reports = runs, reports
        self._measurement = Measurement(root, self._folder)
        self._lines: list[str] = []
        if runs:
            os.environ.pop(_PLUGINS, None)
            self._measurement.start()
        if worker := os.environ.get("PYTEST_XDIST_WORKER"):
            count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
            self._measurement.prepare(int(worker.removeprefix("gw")), count)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        # All fixtures have ended after it, and all workers.
        result = yield
        if self._runs:
            self._measurement.save()
        if self._reports:
            self._judge(session)
        return result

    def _judge(self, session: pytest.Session) -> None:
        coverage = self._measurement.united()
        table = io.StringIO()
        print_coverage(coverage, outfile=table, missing_width=80, skip_covered=True)
        summary, floor = coverage["summary"], self._measurement.floor
        total, branches = summary["percent_covered"], percent_of_branches(summary)
        parts = f"Coverage: {total:.1f} %; of branches alone: {branches:.1f} %"
        self._lines = [*table.getvalue().splitlines(), "", parts]
        if total < floor:
            self._lines.append(f"FAILED: coverage is below the floor of {floor:g} %")
            # pytest exits with 1.
            session.testsfailed += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._lines:
            terminalreporter.section("coverage")
            for line in self._lines:
                terminalreporter.write_line(line)

    def pytest_unconfigure(self) -> None:
        if self._reports:
            shutil.rmtree(self._folder, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Start before the first conftest.py, which imports the service."""
    worker = "PYTEST_XDIST_WORKER" in os.environ
    alone = not getattr(early_config.known_args_namespace, "numprocesses", None)
    plugin = _Plugin(early_config.rootpath, runs=worker or alone, reports=not worker)
    early_config.pluginmanager.register(plugin, "coverage of the service and the clients")

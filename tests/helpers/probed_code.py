"""Keeps the code that SlipCover has prepared in a folder, so that of all processes of a run of the
tests only one prepares each module.

SlipCover parses and compiles a module from its source, and with Python 3.11 adds probes to the
code. For all modules of the service and the clients, that takes several seconds of processor time,
and a run has about ten processes that import them.
"""

import ast
import hashlib
import marshal
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, Final

import slipcover.slipcover
from slipcover import Slipcover, branch

__all__ = ["ProbedCode"]

# With Python 3.11, the constants of prepared code include probes, which cannot be saved. The saved
# code has these instead.
_SIGNAL: Final = "tests.helpers.probed_code: call"
_PROBE: Final = "tests.helpers.probed_code: probe"
_HAS_PROBES: Final = sys.version_info < (3, 12)
if _HAS_PROBES:
    from slipcover import probe

    slipcover.slipcover.probe = SimpleNamespace(
        signal=_SIGNAL, new=lambda _slipcover, _path, place, _passes: (_PROBE, place)
    )


class ProbedCode:
    """The code of modules, prepared by this process or by another one with the same folder."""

    def __init__(self, prepares: Slipcover, folder: Path, passes_max: int) -> None:
        """`passes_max` is SlipCover's own limit, from which it removes a probe."""
        self._slipcover = prepares
        self._folder = folder
        self._passes_max = passes_max

    def of(self, path: Path) -> CodeType:
        """Return the code of the module at `path`."""
        code, _, _ = self._saved(path)
        if _HAS_PROBES:
            return self._with_probes(code)
        # Asks the interpreter to report the lines of this code.
        instrumented: CodeType = self._slipcover.instrument(code)
        return instrumented

    def prepare(self, paths: Iterable[Path]) -> None:
        """Prepare the modules that no process has prepared so far."""
        for path in paths:
            if not self._file(path).exists():
                self._prepare(path)

    def count(self, paths: Iterable[Path]) -> None:
        """Make SlipCover count all lines and branches of these modules, executed or not."""
        for path in paths:
            _, lines, branches = self._saved(path)
            self._slipcover.code_lines[str(path)].update(lines)
            self._slipcover.code_branches[str(path)].update(branches)

    def _saved(self, path: Path) -> tuple[CodeType, set[int], set[tuple[int, int]]]:
        try:
            data = self._file(path).read_bytes()
        except FileNotFoundError:
            data = self._prepare(path)
        code, lines, branches = marshal.loads(data)  # noqa: S302 - a file of this run
        return code, lines, branches

    def _prepare(self, path: Path) -> bytes:
        name = str(path)
        tree = branch.preinstrument(ast.parse(path.read_bytes()))
        code: CodeType = compile(tree, name, "exec", dont_inherit=True)
        instrumented = self._slipcover.instrument(code)
        data = marshal.dumps(
            (
                instrumented if _HAS_PROBES else code,
                set(self._slipcover.code_lines[name]),
                set(self._slipcover.code_branches[name]),
            )
        )
        # Written whole, because another process may read it.
        number, part = tempfile.mkstemp(".part", dir=self._folder)
        with os.fdopen(number, "wb") as file:
            file.write(data)
        Path(part).rename(self._file(path))
        return data

    def _file(self, path: Path) -> Path:
        # The path itself may be too long for a name.
        return self._folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.code"

    def _with_probes(self, code: CodeType) -> CodeType:
        constants = (self._constant(constant, code.co_filename) for constant in code.co_consts)
        return code.replace(co_consts=tuple(constants))

    def _constant(self, saved: Any, name: str) -> Any:
        if isinstance(saved, CodeType):
            return self._with_probes(saved)
        if saved == _SIGNAL:
            return probe.signal
        if isinstance(saved, tuple) and saved[:1] == (_PROBE,):
            return probe.new(self._slipcover, name, saved[1], self._passes_max)
        return saved

"""Processes that a run starts, stops, kills and ends by pid, and never leaves behind."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.helpers.repository import ROOT
from tests.helpers.waiting import eventually

__all__ = ["ROOT", "Child", "end_with_parent"]

END_SECONDS_MAX = 20.0
_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Make the kernel end this process when its parent dies, even if it is stopped then."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


class Child:
    """A process with its output in files. `end` shuts it down; the other methods inject faults."""

    def __init__(
        self,
        folder: Path,
        name: str,
        argv: Sequence[str],
        environment: Mapping[str, str],
        stdin: bytes = b"",
    ) -> None:
        self.name = name
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("LATCHKEY_")}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *argv],
                # Held open: when it closes, the child stops.
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                # A directory without a developer's .env.
                cwd=folder,
                env={**inherited, **environment, "PYTHONPATH": str(ROOT)},
                # Ctrl-C must reach only the run, which shuts the children down.
                start_new_session=True,
            )
        # Distinguishes it from another process that reuses its pid.
        self.handle = psutil.Process(self._process.pid)
        self.expected_end = False
        """Whether we ended it."""
        if stdin:
            assert self._process.stdin is not None
            self._process.stdin.write(stdin)
            self._process.stdin.flush()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self.expected_end = True
        self._process.kill()

    def ask_to_end(self) -> None:
        """Close its standard input."""
        self.expected_end = True
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def terminate(self) -> None:
        self.expected_end = True
        self._process.terminate()

    async def ended(self, within: float = END_SECONDS_MAX) -> int:
        """Wait for its end and return its exit code. Raises AssertionError."""
        await eventually(lambda: not self.alive, f"the end of {self.name}", within)
        return self._process.returncode

    def clean_up(self) -> None:
        """End it and its children in any case."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (*self.handle.children(recursive=True), self.handle):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def trouble(self) -> str | None:
        """Return how it ended, if it neither ended cleanly nor was killed by us."""
        code = self._process.poll()
        if code is None or (self.expected_end and code in (0, -signal.SIGKILL)):
            return None
        return f"{self.name} ended with {code}: {self.err.read_text('utf-8', 'replace')[-2000:]}"

"""Runs the steps of `make check` and prints one line for each."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tests.helpers.repository import ROOT

__all__ = ["ROOT", "Outcome", "State", "command", "failed", "ok", "run", "skipped"]

# mypy without a cache needs about a minute on a loaded machine. A step that takes this long hangs.
STEP_SECONDS = 600.0
# Column at which the outcomes begin.
NAME_WIDTH = 20


class State(Enum):
    """How a step ended."""

    OK = "ok"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Outcome:
    """How a step ended, and the details of a failure or the reason for a skip."""

    state: State
    text: str = ""


def ok() -> Outcome:
    """Return the outcome of a step that found nothing."""
    return Outcome(State.OK)


def failed(text: str) -> Outcome:
    """Return the outcome of a step that found something."""
    return Outcome(State.FAILED, text)


def skipped(reason: str) -> Outcome:
    """Return the outcome of a step that could not look."""
    return Outcome(State.SKIPPED, reason)


def command(*words: str, cwd: Path = ROOT, seconds: float = STEP_SECONDS) -> Outcome:
    """Run a program of the development environment; exit code 0 is ok."""
    programs = Path(sys.executable).parent
    try:
        # In its own process group, so that a time-out stops its children too.
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env=os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
    except FileNotFoundError:
        return failed(f"{words[0]} is not installed")
    with process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return failed(f"{words[0]} did not finish within {seconds:g} s")
        finally:
            # Ctrl-C reaches only the group of the terminal, so this is needed after it, too.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == 0:
        return ok()
    return failed(output.strip() or f"{words[0]} ended with exit code {process.returncode}")


def run(steps: Sequence[tuple[str, Callable[[], Outcome]]]) -> int:
    """Run every step, print its outcome, and return 1 if any step failed."""
    names = []
    for name, step in steps:
        try:
            outcome = step()
        except Exception as error:  # noqa: BLE001 - a broken step must not hide the later ones
            outcome = failed(f"{type(error).__name__}: {error}")
        line = outcome.state.value
        if outcome.state is State.SKIPPED:
            line += f": {outcome.text}"
        report(f"{name:<{NAME_WIDTH}} {line}")
        if outcome.state is State.FAILED:
            names.append(name)
            report(textwrap.indent(outcome.text, "    ", lambda _: True))
    if names:
        sys.stderr.write(f"failed: {', '.join(names)}\n")
    return 1 if names else 0


def report(text: str) -> None:
    """Print a line for the person or the CI log, without delay."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

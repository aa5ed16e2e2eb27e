"""How `make check` runs its steps and reports them."""

import sys
from pathlib import Path

import psutil
import pytest

from tests.checks.steps import Outcome, State, command, failed, ok, run
from tests.helpers.waiting import eventually

# Far more than the programs below need, and short enough for a failure to be noticed.
SECONDS = 30.0


def test_broken_step_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """A step that raises counts as failed, and later steps run."""

    def broken() -> Outcome:
        raise ValueError("unreadable")

    assert run([("first", broken), ("second", ok), ("third", lambda: failed("no"))]) == 1
    printed = capsys.readouterr()
    assert "ValueError: unreadable" in printed.out
    assert f"{'second':<20} ok" in printed.out
    assert printed.err == "failed: first, third\n"


def test_exit_code_decides() -> None:
    """A program fails its step by its exit code, whatever it prints."""
    assert command(sys.executable, "-c", "print('warning')", seconds=SECONDS) == ok()
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    outcome = command(sys.executable, "-u", "-c", code, seconds=SECONDS)
    assert outcome == failed("out\nerr")


async def test_hanging_grandchild_is_stopped(tmp_path: Path) -> None:
    """A program that does not end is stopped together with the programs that it started."""
    note = tmp_path / "pid"
    hang = "import threading; threading.Event().wait()"
    code = (
        "import pathlib, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {hang!r}])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    # A loaded machine may need longer to start both programs.
    for seconds in (1.0, 4.0, 16.0):
        assert command(sys.executable, "-c", code, seconds=seconds).state is State.FAILED
        if note.exists():
            break
    pid = int(note.read_text())
    await eventually(lambda: not running(pid), "the program that was started has ended")


def running(pid: int) -> bool:
    """Return whether a process runs. One that ended, but was not reaped, does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

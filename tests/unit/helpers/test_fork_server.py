"""A run by the fork server is a process like any other."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.fork_server import Forked, fork_server
from tests.helpers.waiting import eventually

PROGRAM = """
import atexit, os, pathlib, signal, sys, threading, time
match sys.argv[1:]:
    case ["report"]:
        print(os.getcwd(), os.environ["COLOUR"], sys.stdin.read())
        print("é", file=sys.stderr)
        sys.exit(7)
    case ["end-by-signal"]:
        os.kill(os.getpid(), signal.SIGTERM)
    case ["fail"]:
        raise LookupError("nothing there")
    case ["end-slowly"]:
        atexit.register(print, "at exit")
        threading.Timer(0.05, print, ["thread"]).start()
        print("module")
    case ["print"]:
        print("nobody reads this")
    case ["wait", path]:
        pathlib.Path(path).write_text(str(os.getpid()))
        time.sleep(60)
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Forked]:
    """Commands that run the program, in a folder that contains it."""
    (tmp_path / "program.py").write_text(PROGRAM)
    with fork_server(tmp_path, "json") as forked:
        yield lambda *arguments, **options: forked("program", *arguments, **options)


def run(program: Forked, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        program(*arguments),
        cwd=folder,
        env=os.environ | {"COLOUR": "red"},
        input="text",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_run_has_its_own_streams_folder_variables_and_exit_code(
    program: Forked, tmp_path: Path
) -> None:
    """The module sees what the caller gives it, and the caller sees how the module ends."""
    done = run(program, tmp_path, "report")
    assert (done.returncode, done.stdout, done.stderr) == (7, f"{tmp_path} red text\n", "é\n")
    assert run(program, tmp_path, "end-by-signal").returncode == -signal.SIGTERM
    failed = run(program, tmp_path, "fail")
    assert failed.returncode == 1
    assert "LookupError: nothing there" in failed.stderr


def test_a_run_ends_as_python_does(program: Forked, tmp_path: Path) -> None:
    """Threads end, and functions registered with `atexit` run, before the process does. Output that
    cannot be written is an error."""
    done = run(program, tmp_path, "end-slowly")
    assert (done.returncode, done.stdout, done.stderr) == (0, "module\nthread\nat exit\n", "")
    reader, writer = os.pipe()
    os.close(reader)
    failed = subprocess.run(
        program("print"), cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert failed.returncode == 120
    assert b"BrokenPipeError" in failed.stderr


def test_runs_end_in_any_order(program: Forked, tmp_path: Path) -> None:
    """A run that takes long delays no other."""
    with subprocess.Popen(program("wait", str(tmp_path / "pid")), cwd=tmp_path) as long:
        try:
            assert run(program, tmp_path, "report").returncode == 7
            assert long.poll() is None
        finally:
            long.kill()


async def test_a_run_ends_with_its_caller(program: Forked, tmp_path: Path) -> None:
    """Killing the process that a test holds also ends the process that runs the module."""
    path = tmp_path / "pid"
    process = await asyncio.create_subprocess_exec(*program("wait", str(path)), cwd=tmp_path)
    try:
        pid: Any = await eventually(lambda: path.exists() and path.read_text(), "it runs")
        module = psutil.Process(int(pid))
        assert module.is_running()
    finally:
        process.kill()
        await process.wait()
    await eventually(lambda: gone(module), "the module has ended")


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        # It has ended between the two questions.
        return True


def test_a_server_ends_with_its_test(tmp_path: Path) -> None:
    """Nothing is left of a server that failed to start or has been closed."""
    with fork_server(tmp_path) as forked:
        assert sys.executable == forked("program")[0]
        assert (tmp_path / "fork-server").is_socket()
    assert not (tmp_path / "fork-server").exists()
    with pytest.raises(AssertionError, match="did not start"), fork_server(tmp_path, "no_module"):
        pass

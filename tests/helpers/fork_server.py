"""Runs Python modules in processes that it forks from itself, after it has imported them once.

Python needs a quarter of a second of processor time to import the command line tool, and hundreds
of tests run it. A fork takes a few milliseconds. Each run is still a process with its own streams,
folder, variables and exit code. Tests of what happens before the imports end, or of signals to the
process, start Python itself.

`python -m tests.helpers.fork_server SOCKET MODULE...` imports the modules and serves until its
standard input ends; `fork_client.py` is its client.
"""

import ast
import atexit
import contextlib
import fcntl
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from tests.helpers.repository import ROOT

__all__ = ["LEADER", "SOCKET", "Forked", "commands", "fork_server", "waiting_server"]

# Imports everything, on a busy machine.
START_SECONDS_MAX = 60.0
# A client has its request ready when it connects. The server serves nobody else meanwhile.
REQUEST_SECONDS_MAX = 10.0
# The server notices at once that its standard input has ended, unless it is still importing.
END_SECONDS_MAX = 10.0
# The variable that names the folder for coverage (`measured.py`).
FOLDER = "COVERAGE_FOLDER"
CLIENT = Path(__file__).with_name("fork_client.py")
# In the folder of the server.
SOCKET = "fork-server"
# The option of a run that leads a process group, and whose pid the server sends to the client.
LEADER = "--leader"
# A request of no run. The server answers it when it has imported its modules.
NOTHING = bytes(4)

Forked = Callable[..., tuple[str, ...]]


@contextlib.contextmanager
def fork_server(
    folder: Path,
    *modules: str,
    coverage: str | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Forked]:
    """Run a server, and yield a function that returns the command of a run of a module."""
    with waiting_server(folder, *modules, coverage=coverage, variables=variables):
        yield commands(folder)


@contextlib.contextmanager
def waiting_server(
    folder: Path,
    *modules: str,
    coverage: str | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[None]:
    """Run a server in a folder. It imports the modules when it is used for the first time.

    With `coverage`, each run saves in this folder which lines it has executed. The server imports
    the modules with `variables` in its environment.
    """
    path = folder / SOCKET
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.fork_server", str(path), *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        # Python chooses its encodings at startup.
        env={
            **os.environ,
            "LANG": "C.UTF-8",
            "LC_ALL": "C.UTF-8",
            FOLDER: coverage or "",
            **variables,
        },
        # Ctrl-C reaches pytest, which ends the server.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], START_SECONDS_MAX)
        assert ready, "the fork server did not start in time"
        assert process.stdout.readline() == b"ready\n", "the fork server did not start"
        yield
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        path.unlink(missing_ok=True)


def commands(folder: Path) -> Forked:
    """Wait until the server of a folder has imported its modules. Return a function that returns
    the command of a run of a module."""
    path = folder / SOCKET
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(START_SECONDS_MAX)
        answer = b""
        # It closes the connection if an import fails.
        with contextlib.suppress(ConnectionError):
            connection.connect(str(path))
            connection.sendall(NOTHING)
            answer = connection.recv(16)
        assert answer == b"ready\n", "the fork server did not start"

    def command(module: str, *arguments: str, terminal: bool = False) -> tuple[str, ...]:
        options = ["--terminal"] if terminal else []
        return (sys.executable, "-I", "-S", str(CLIENT), str(path), *options, module, *arguments)

    return command


class Run(NamedTuple):
    """What a client asks for."""

    arguments: list[str]
    folder: str
    variables: dict[str, str]
    streams: list[int]


def listen(path: str) -> socket.socket:
    """Return a listener once a client connects to it. Ends this process if none does."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    # Every test may run at once.
    listener.listen(socket.SOMAXCONN)
    print("ready", flush=True)  # noqa: T201 - read by `waiting_server`
    sources: list[Any] = [listener, 0]
    if listener not in select.select(sources, [], [])[0]:
        os._exit(0)
    return listener


def serve(listener: socket.socket) -> Run:
    """Fork a process for each run. Returns only in that process."""
    runs: dict[socket.socket, int] = {}
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with listener:
        while True:
            sources: list[Any] = [listener, 0, woken, *runs]
            readable, _, _ = select.select(sources, [], [])
            if 0 in readable:
                for pid in runs.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            if woken in readable:
                os.read(woken, 1 << 12)
            for connection, pid in list(runs.items()):
                # A client sends nothing after its request, so it has ended.
                if has_ended(connection, pid, kill=connection in readable):
                    del runs[connection]
            if listener not in readable:
                continue
            connection, _ = listener.accept()
            connection.settimeout(REQUEST_SECONDS_MAX)
            run = None
            # A client may end at any time, or hang.
            with contextlib.suppress(OSError):
                run = receive(connection)
            if run is None:
                with connection, contextlib.suppress(OSError):
                    connection.sendall(b"ready\n")
            elif (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (connection, *runs):
                    other.close()
                os.close(woken)
                os.close(wakes)
                return run
            else:
                attend(connection, run, pid)
                runs[connection] = pid


def attend(connection: socket.socket, run: Run, pid: int) -> None:
    """Report the process of a run, if its client wants that, and leave the streams to it."""
    # A client, or a process that has ended or become another program, must not end the server.
    with contextlib.suppress(OSError):
        if run.arguments[0] == LEADER:
            # Here too: the caller may signal the group at once.
            with contextlib.suppress(OSError):
                os.setpgid(pid, pid)
            connection.sendall(b"%d\n" % pid)
    for stream in run.streams:
        os.close(stream)


def has_ended(connection: socket.socket, pid: int, *, kill: bool) -> bool:
    """Return whether the process of a run has ended, and if so, report its exit code."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended and kill:
        os.kill(pid, signal.SIGKILL)
        ended, status = os.waitpid(pid, 0)
    if ended:
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    return bool(ended)


def receive(connection: socket.socket) -> Run | None:
    """Return what the client asks for, or None if that is nothing or it has ended."""
    data, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    if data == NOTHING:
        return None
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
        more = connection.recv(1 << 16)
        if not more:
            for stream in streams:
                os.close(stream)
            return None
        data += more
    arguments, folder, variables = ast.literal_eval(data[4:].decode())
    return Run(arguments, folder, variables, streams)


def become(run: Run) -> list[str]:
    """Give this process what Python would have given it at startup; return its arguments."""
    option, *arguments = run.arguments
    if option == "--terminal":
        os.setsid()
        fcntl.ioctl(run.streams[0], termios.TIOCSCTTY, 0)
    elif option == LEADER:
        os.setpgid(0, 0)
    else:
        arguments = run.arguments
    for number, stream in enumerate(run.streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(run.folder)
    os.environ.clear()
    os.environ.update(run.variables)
    time.tzset()
    sys.path[0] = run.folder
    # As from a terminal, even if the tests run under nohup.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As Python opens them in a locale of UTF-8.
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr.reconfigure(line_buffering=True)
    return arguments


def run_module(module: str) -> None:
    """Run a module and end this process with its exit code.

    Ends as Python does, except that all objects are left to the operating system: to destroy them,
    Python would write to every page that this process shares with the server, which takes longer
    than most commands.
    """
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not (end.code is None or isinstance(end.code, int)):
            raise
        code = end.code or 0
    threading._shutdown()  # type: ignore[attr-defined]  # Python's own first step
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        # Python reports it.
        sys.exit(code)
    os._exit(code & 0xFF)


def measure(folder: str) -> Any:
    """Begin to measure what this process imports, and the processes that it forks."""
    from tests.helpers.measured import Measurement

    measurement = Measurement(ROOT, Path(folder))
    measurement.start()
    return measurement


def save_at_the_end(measurement: Any) -> None:
    """Save what was measured when this process ends, or becomes another program.

    A process that it forks does so too: it inherits these functions. Killed processes save nothing.
    """
    saved = False

    def save() -> None:
        nonlocal saved
        if not saved:
            saved = True
            # What a program does must not depend on whether it is measured.
            with contextlib.suppress(OSError):
                measurement.save()

    def saving(ends: Callable[..., NoReturn]) -> Callable[..., NoReturn]:
        def end(*arguments: Any) -> NoReturn:
            save()
            ends(*arguments)

        return end

    atexit.register(save)
    os._exit = saving(os._exit)
    os.execve = saving(os.execve)


if __name__ == "__main__":
    listener = listen(sys.argv[1])
    # Before the imports, which it measures too.
    measurement = measure(folder) if (folder := os.environ[FOLDER]) else None
    for module in sys.argv[2:]:
        importlib.import_module(module)
    if measurement is not None:
        measurement.save()
        measurement.forked()
    gc.collect()
    # Shared pages stay shared.
    gc.freeze()
    module, *rest = become(serve(listener))
    sys.argv = [module, *rest]
    if measurement is not None:
        save_at_the_end(measurement)
    run_module(module)

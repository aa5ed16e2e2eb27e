"""Starts the service and the console in processes that are forked from one that has imported them.

Supervisor and worker each need almost half a second of processor time to import what they use, and
tests start a service hundreds of times. Some tests start Python instead: those of the start itself,
of what Python does before the service's own code runs and when it ends, and of how much memory a
service needs.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from latchkey_service.transport import tls

from tests.helpers.fork_server import LEADER, SOCKET, commands, waiting_server
from tests.helpers.measured import folder as coverage_folder

__all__ = ["ForkedProcess", "fork_console", "fork_service", "forks_services", "waiting_services"]

# A fork takes milliseconds, on a busy machine.
FORK_SECONDS_MAX = 30.0
SERVICE = ("tests.helpers.preloaded_service",)
CONSOLE = (
    "h11",
    "latchkey_cli.main",
    "latchkey_console.running",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.h11_impl",
)


class ForkedProcess:
    """A process whose parent is the fork server. Has the methods of `subprocess.Popen` that
    `Service` uses."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.returncode: int | None = None
        self.pid = int(self._line(FORK_SECONDS_MAX))

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        if self.returncode is None:
            # Without a line, the fork server was killed, and so was the process.
            self.returncode = int(self._line(timeout) or -signal.SIGKILL)
            self._connection.close()
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def _line(self, timeout: float) -> bytes:
        """Return the next line, or nothing if the fork server has ended."""
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._connection], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            more = self._connection.recv(1)
            if not more:
                break
            line += more
        return line


class _Server:
    """A fork server, which is used when the first process starts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ready = False

    def fork(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        out: BinaryIO,
        err: BinaryIO,
    ) -> ForkedProcess:
        """Run `python -m module` in a forked process."""
        if not self._ready:
            commands(self._folder)
            self._ready = True
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._folder / SOCKET))
        message = repr(([LEADER, module, *arguments], str(folder), dict(environment))).encode()
        message = len(message).to_bytes(4, "big") + message
        with Path(os.devnull).open("rb") as nothing:
            files = [nothing.fileno(), out.fileno(), err.fileno()]
            sent = socket.send_fds(connection, [message], files)
        if sent < len(message):
            connection.sendall(message[sent:])
        return ForkedProcess(connection)


class _Servers(NamedTuple):
    service: _Server
    console: _Server


_servers: list[_Servers] = []


@contextlib.contextmanager
def waiting_services(folder: Path) -> Iterator[None]:
    """Run a server of services and one of consoles, in subfolders. They import what they need when
    they are used."""
    # gRPC reads these when it is imported. A worker has them, and a supervisor does not use gRPC.
    variables = {"GRPC_VERBOSITY": "ERROR", **tls.ENVIRONMENT}
    kinds = {"services": (SERVICE, variables), "consoles": (CONSOLE, {})}
    with contextlib.ExitStack() as stack:
        for name, (modules, more) in kinds.items():
            (folder / name).mkdir()
            server = waiting_server(
                folder / name, *modules, coverage=coverage_folder(), variables=more
            )
            stack.enter_context(server)
        yield


@contextlib.contextmanager
def forks_services(folder: Path) -> Iterator[None]:
    """Until the end of the block, the servers in the subfolders start services and consoles."""
    _servers.append(_Servers(_Server(folder / "services"), _Server(folder / "consoles")))
    try:
        yield
    finally:
        _servers.pop()


def fork_service(
    environment: Mapping[str, str], folder: Path, out: BinaryIO, err: BinaryIO
) -> ForkedProcess | None:
    """Run `python -m latchkey_service` in a forked process, or return None where that is
    impossible.

    If a folder of PYTHONPATH has a sitecustomize module, the workers run it first.
    """
    if not _servers or sys.platform != "linux":
        return None
    return _servers[-1].service.fork("latchkey_service", (), environment, folder, out, err)


def fork_console(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    out: BinaryIO,
    err: BinaryIO,
) -> ForkedProcess | None:
    """Run `python -m latchkey_cli console` in a forked process, or return None where that is
    impossible."""
    if not _servers or sys.platform != "linux":
        return None
    return _servers[-1].console.fork(
        "latchkey_cli", ("console", *arguments), environment, folder, out, err
    )

"""Starts the service in processes that are forked from one that has imported it.

Supervisor and worker each need almost half a second of processor time to import what they use, and
tests start a service some hundred times. Tests of the start itself, of what Python does before the
service's own code runs, and of memory start Python instead.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from latchkey_service.transport import tls

from tests.helpers.fork_server import LEADER, SOCKET, commands, waiting_server

__all__ = ["ForkedProcess", "fork_service", "forks_services", "waiting_services"]

# A fork takes milliseconds, on a busy machine.
FORK_SECONDS_MAX = 30.0
PRELOADED = "tests.helpers.preloaded_service"


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
                raise subprocess.TimeoutExpired(PRELOADED, timeout)
            more = self._connection.recv(1)
            if not more:
                break
            line += more
        return line


def waiting_services(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Run a server that starts services."""
    # gRPC reads these when it is imported. A worker has them, and a supervisor does not use gRPC.
    return waiting_server(folder, PRELOADED, variables=tls.ENVIRONMENT)


class _Server:
    """A server that is used when the first service starts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ready = False

    def connect(self) -> socket.socket:
        if not self._ready:
            commands(self._folder)
            self._ready = True
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._folder / SOCKET))
        return connection


_servers: list[_Server] = []


@contextlib.contextmanager
def forks_services(folder: Path) -> Iterator[None]:
    """Fork services, instead of starting Python for each, until the end of the block. A server
    runs in this folder."""
    _servers.append(_Server(folder))
    try:
        yield
    finally:
        _servers.pop()


def fork_service(
    environment: Mapping[str, str], folder: Path, out: BinaryIO, err: BinaryIO
) -> ForkedProcess | None:
    """Run `python -m latchkey_service` in a forked process, or return None if it needs a Python
    that was started for it."""
    # A test changes what Python does at its start.
    if not _servers or sys.platform != "linux" or "PYTHONPATH" in environment:
        return None
    connection = _servers[-1].connect()
    message = repr(([LEADER, "latchkey_service"], str(folder), dict(environment))).encode()
    message = len(message).to_bytes(4, "big") + message
    with Path(os.devnull).open("rb") as nothing:
        files = [nothing.fileno(), out.fileno(), err.fileno()]
        sent = socket.send_fds(connection, [message], files)
    connection.sendall(message[sent:])
    return ForkedProcess(connection)

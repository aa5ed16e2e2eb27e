"""Runs the console as a process, as users do, and makes changes that no service call can make."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import asyncpg

from tests.helpers.forked_service import ForkedProcess, fork_console
from tests.helpers.waiting import WAIT_SECONDS, eventually

T = TypeVar("T")
# The process would inherit signals that the tests ignore, for example under nohup.
_AS_FROM_A_TERMINAL = """
import os, signal, sys
for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
TOOL = (sys.executable, "-m", "latchkey_cli")
_ADDRESS = re.compile(r"^API Tokens: (\S+) ", re.MULTILINE)


class Console:
    """A `latchkey console` process that serves `url`. `log` holds its output."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        start: Sequence[str] | None = None,
    ) -> None:
        """`start` is the command of the tool, for example TOOL. By default, it is forked where a
        test runs (`forked_service.py`)."""
        folder.mkdir(exist_ok=True)
        self._out, self._err = folder / "out", folder / "err"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LATCHKEY_")}
        arguments = ("--listen", "127.0.0.1:0", *arguments)
        forked: ForkedProcess | None = None
        with self._out.open("wb") as out, self._err.open("wb") as err:
            if start is None:
                forked = fork_console(arguments, environment, folder, out, err)
            command = (*(start or TOOL), "console", *arguments)
            self._process = forked or subprocess.Popen(
                (sys.executable, "-c", _AS_FROM_A_TERMINAL, *command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                cwd=folder,
                process_group=0,
            )

    @property
    def log(self) -> str:
        return self._out.read_text() + self._err.read_text()

    async def url(self) -> str:
        """Wait until it serves and return its URL."""

        def said() -> str | None:
            match = _ADDRESS.search(self._out.read_text())
            assert match is not None or self._process.poll() is None, f"it ended: {self.log}"
            return match[1] if match else None

        found: str = await eventually(said, f"the page's address; its output: {self.log}")
        return found

    def send(self, number: signal.Signals) -> None:
        """Send it a signal if it still runs."""
        if self._process.poll() is None:
            os.kill(self._process.pid, number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop it and return the exit code."""
        self.send(number)
        return self.wait()

    def wait(self) -> int:
        """Wait until it exits and return the exit code."""
        try:
            return self._process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self._process.wait(WAIT_SECONDS)
            raise


@contextmanager
def console(
    folder: Path, *arguments: str, start: Sequence[str] | None = None
) -> Iterator[tuple[Console, str]]:
    """Run the console as a process. Yield the process and its URL."""
    running = Console(folder, *arguments, start=start)
    try:
        yield running, run(running.url())
    finally:
        # As Ctrl-C does, so that Python ends in order and saves what it has measured.
        running.end(signal.SIGINT)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine from a synchronous test, in a separate thread with its own loop.

    The main thread belongs to pytest's event loop.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            result.append(asyncio.run(work))
        except BaseException as error:  # noqa: BLE001 - handed on
            failure.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def sql(url: str, statement: str, *values: Any) -> None:
    """Change the database in ways that no call can, such as a token's age."""

    async def execute() -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(statement, *values)
        finally:
            await connection.close()

    run(execute())

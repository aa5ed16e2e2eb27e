"""The page as a process, as its users run it; and what no call to the service can do."""

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

from tests.support import WAIT_SECONDS, eventually

T = TypeVar("T")
# What the tests themselves were told to ignore, as by nohup, would be ignored.
_AS_FROM_A_TERMINAL = """
import os, signal, sys
for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
_ADDRESS = re.compile(r"^API Tokens: (\S+) ", re.MULTILINE)


class Console:
    """`latchkey console` that serves at `url`. What it wrote is in `log`."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        start: Sequence[str] = (sys.executable, "-m", "latchkey_cli"),
    ) -> None:
        folder.mkdir(exist_ok=True)
        self._out, self._err = folder / "out", folder / "err"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LATCHKEY_")}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", _AS_FROM_A_TERMINAL, *start, "console"),
                    *("--listen", "127.0.0.1:0", *arguments),
                ],
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
        """Wait until it serves, and return where."""

        def said() -> str | None:
            match = _ADDRESS.search(self._out.read_text())
            assert match is not None or self._process.poll() is None, f"it ended: {self.log}"
            return match[1] if match else None

        found: str = await eventually(said, f"the page's address; it said {self.log}")
        return found

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it has not ended."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop it, and return the exit code."""
        self.send(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end, and return the exit code."""
        try:
            return self._process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(WAIT_SECONDS)
            raise


@contextmanager
def console(folder: Path, *arguments: str) -> Iterator[tuple[Console, str]]:
    """Run the page as a process; yield it and its URL."""
    running = Console(folder, *arguments)
    try:
        yield running, run(running.url())
    finally:
        running.end()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine from a test that is none, on a thread and loop of its own.

    The thread that the tests run on has pytest's loop, which is not to be touched.
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
    """Change the database in a way that no call can, such as a token's age."""

    async def execute() -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(statement, *values)
        finally:
            await connection.close()

    run(execute())

"""Latchkey as a process, started as users start it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from tests.helpers.forked_service import ForkedProcess, fork_service
from tests.helpers.repository import ROOT
from tests.helpers.waiting import WAIT_SECONDS, eventually

__all__ = ["FAVOUR", "PYTHON", "Service", "service"]

# Variables that configure Latchkey or its gRPC library.
OWN_VARIABLES = ("LATCHKEY_", "GRPC_")
# As in nice(2).
FAVOUR = -10
# Starts Python for the service, for tests of what happens before the service's own code runs, of
# its imports, and of its memory.
PYTHON: Final = (sys.executable,)


class Service:
    """`python -m latchkey_service` as a separate process, with its settings in the environment.

    It always ends with everything that it started, even when a test fails.
    """

    # A subclass that replaces it belongs to the tests.
    module = "latchkey_service"
    # A program that prepares the process, and then becomes it.
    prefix: tuple[str, ...] = ()

    def __init__(
        self, folder: Path, python: Sequence[str] | None = None, /, **settings: object
    ) -> None:
        """Start it with the command `python`, for example PYTHON. By default, its processes are
        forked where a test runs (`forked_service.py`)."""
        folder.mkdir(exist_ok=True)
        self._out, self._err = folder / "out", folder / "err"
        # A user's environment: nothing that this process or its libraries have set for themselves.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(OWN_VARIABLES)}
        environment |= {f"LATCHKEY_{k.upper()}": str(v) for k, v in settings.items()}
        if self.module.startswith("tests."):
            environment["PYTHONPATH"] = str(ROOT)
        forked: ForkedProcess | None = None
        with self._out.open("wb") as out, self._err.open("wb") as err:
            if python is None and not self.prefix and self.module == Service.module:
                forked = fork_service(environment, folder, out, err)
            self._process = forked or subprocess.Popen(
                [*self.prefix, *(python or PYTHON), "-m", self.module],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                # Not the checkout, which may contain a developer's .env.
                cwd=folder,
                # As in a terminal, where Ctrl-C goes to the process group.
                process_group=0,
            )
        self._family: set[psutil.Process] = set()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err_path(self) -> Path:
        return self._err

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def log(self) -> list[dict[str, Any]]:
        """Return its complete log lines, in order."""
        lines = []
        for line in self.err.splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    @property
    def worker_pids(self) -> list[int]:
        """Return the pids of all workers that have come up, in order."""
        return [line["pid"] for line in self.log if line["event"] == "worker ready"]

    def postmaster(self) -> psutil.Process:
        """Return its embedded Postgres."""
        for process in psutil.Process(self.pid).children():
            if process.cmdline()[0].endswith("/postgres"):
                return process
        raise AssertionError("no embedded Postgres")

    async def welcome(self, within: float = WAIT_SECONDS) -> str:
        """Wait until it prints or logs that it serves; return the address."""

        def said() -> str | None:
            match = re.search(
                r"^Latchkey serves on (\S+) \(.*Press Ctrl-C to stop", self.out, re.MULTILINE
            )
            if match is not None:
                return match[1]
            for line in self.log:
                if line["event"] == "serving":
                    return str(line["address"])
            assert self._process.poll() is None, f"it ended: {self.err}"
            return None

        try:
            address: str = await eventually(said, "the welcome line", within)
        except AssertionError:
            print(self.err, file=sys.stderr)  # noqa: T201 - pytest shows it with the failure
            raise
        self.family()
        return address

    async def prints(self, text: str) -> None:
        """Wait until its output contains the text. The log may say earlier that it serves."""
        await eventually(lambda: text in self.out, f"the output {text!r}")

    def family(self) -> set[psutil.Process]:
        """Return the process and everything that it has started and that was ever seen."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            self._family |= {process, *process.children(recursive=True)}
        return self._family

    def favour(self) -> None:
        """Raise its priority where the system allows that, because the load of the machine must not
        decide whether it answers in time."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess, PermissionError):
                for thread in process.threads():
                    # One may have ended since.
                    with contextlib.suppress(ProcessLookupError):
                        # Linux has a priority for each thread.
                        os.setpriority(os.PRIO_PROCESS, thread.id, FAVOUR)

    def alive(self) -> list[psutil.Process]:
        """Return the processes of the family that still run."""
        alive = []
        for process in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        return alive

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        self.family()
        os.kill(self.pid, number)
        return await self.ended()

    def ended_with(self) -> int | None:
        """Return its exit code, or None while it runs."""
        return self._process.poll()

    async def ended(self) -> int:
        """Wait for the end, and return the exit code."""
        await eventually(lambda: self._process.poll() is not None, "the end of the service")
        code = self._process.returncode
        assert code is not None
        return code

    def clean_up(self) -> None:
        self.family()
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(WAIT_SECONDS)
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(WAIT_SECONDS)


@contextlib.contextmanager
def service(
    folder: Path, python: Sequence[str] | None = None, /, **settings: object
) -> Iterator[Service]:
    """Run Latchkey as a process. See `Service` for `python`."""
    running = Service(folder, python, **settings)
    try:
        yield running
    finally:
        running.clean_up()

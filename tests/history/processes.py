"""The processes of a run: started, stopped, killed and ended by pid, and never left behind."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import latchkey
import psutil

from tests.support import eventually

__all__ = ["Child", "Host", "LoneHost", "SupervisedHost", "end_with_parent", "tell_if_strange"]

ROOT = Path(__file__).parents[2]
# Twenty that start at once on two cores take a while.
START_SECONDS_MAX = 60.0
END_SECONDS_MAX = 20.0
_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel end this process when its parent dies, also if it is stopped then."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def tell_if_strange(error: latchkey.LatchkeyError) -> None:
    """Write to standard error what no outage explains; the report shows how often it came."""
    if not isinstance(error, latchkey.Unavailable | latchkey.ResourceExhausted):
        print(f"strange: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201


class Child:
    """A process with its output in files. `end` is what ends it in order; the rest are faults."""

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
                # Held open: its end is what tells a child to stop.
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                # Where no developer's .env lies.
                cwd=folder,
                env={**inherited, **environment, "PYTHONPATH": str(ROOT)},
                # Ctrl-C is for the run, which ends the others in order.
                start_new_session=True,
            )
        # Knows it from another process that gets its pid.
        self.handle = psutil.Process(self._process.pid)
        self.expected_end = False
        """Whether its end is our doing."""
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
        """End it and its children whatever they do."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (*self.handle.children(recursive=True), self.handle):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def trouble(self) -> str | None:
        """Return how it ended, if that was neither our doing nor in order."""
        code = self._process.poll()
        if code is None or (self.expected_end and code in (0, -signal.SIGKILL)):
            return None
        return f"{self.name} ended with {code}: {self.err.read_text('utf-8', 'replace')[-2000:]}"


class Host:
    """One address with one or more workers of the service behind it."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, str], workers: int) -> None:
        self.name = name
        self.workers = workers
        self.address = ""
        self.children: list[Child] = []
        self._folder = folder
        self._environment = {
            "LATCHKEY_DATA_DIR": str(folder / "unused"),
            "LATCHKEY_GRACE_SECONDS": "2",
            "LATCHKEY_LOG_FORMAT": "json",
            "LATCHKEY_WORKERS": str(workers),
        } | {f"LATCHKEY_{name.upper()}": value for name, value in settings.items()}

    async def start(self) -> None:
        """Start it and wait until it serves."""
        raise NotImplementedError

    def worker_processes(self) -> list[psutil.Process]:
        """Return those that serve."""
        raise NotImplementedError

    def times_up(self) -> int:
        """Return how many workers have come up so far."""
        raise NotImplementedError

    async def bring_back(self, times_up: int) -> None:
        """Wait until a worker has come up in place of one that was ended, and start it where
        nobody else does. `times_up` is from before the end."""
        raise NotImplementedError

    async def end(self) -> None:
        """Stop it in order."""
        child = self.children[-1]
        child.terminate()
        await child.ended()

    def clean_up(self) -> None:
        for child in self.children:
            child.clean_up()


class LoneHost(Host):
    """A worker without a supervisor: started again by us, on the same port."""

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: Mapping[str, str],
        peppers: bytes,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name, folder, settings, workers=1)
        self._peppers = peppers
        # Keeps the port while the worker is away, as the supervisor does.
        self._keeper = socket.socket()
        self._keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._keeper.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._keeper.getsockname()[1]}"
        self._environment |= {"LATCHKEY_LISTEN": self.address, **(environment or {})}

    async def start(self) -> None:
        name = f"{self.name}.{len(self.children)}"
        child = Child(
            self._folder, name, ["tests.history.worker"], self._environment, self._peppers
        )
        self.children.append(child)
        await eventually(
            lambda: child.out.read_bytes() or not child.alive, f"{name} serves", START_SECONDS_MAX
        )
        assert child.alive or child.expected_end, child.trouble()

    def worker_processes(self) -> list[psutil.Process]:
        # Not one that is starting: SIGTERM would find it without a handler.
        return [c.handle for c in self.children if c.alive and c.out.read_bytes()]

    def times_up(self) -> int:
        return len(self.children)

    async def bring_back(self, times_up: int) -> None:
        self.children[-1].expected_end = True
        await self.children[-1].ended()
        await self.start()

    def clean_up(self) -> None:
        super().clean_up()
        self._keeper.close()


class SupervisedHost(Host):
    """The service with its supervisor, which starts workers again by itself."""

    async def start(self) -> None:
        argv = ["tests.history.worker", "supervisor"]
        environment = {**self._environment, "LATCHKEY_LISTEN": "127.0.0.1:0"}
        child = Child(self._folder, self.name, argv, environment)
        self.children.append(child)

        def welcome() -> re.Match[str] | bool | None:
            match = re.search(r"serves on (127\.0\.0\.1:\d+)", child.out.read_text())
            return match or not child.alive

        match = await eventually(welcome, f"{self.name} serves", START_SECONDS_MAX)
        assert isinstance(match, re.Match), child.trouble()
        self.address = match[1]

    def worker_processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [p for p in self.children[-1].handle.children() if _is_worker(p)]
        return []

    def times_up(self) -> int:
        return self.children[-1].err.read_text().count('"worker up"')

    async def bring_back(self, times_up: int) -> None:
        await eventually(
            lambda: self.times_up() > times_up,
            f"a worker of {self.name} is back",
            START_SECONDS_MAX,
        )


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[-1:] == ["worker"]
    return False

"""Starts, stops, kills and ends the hosts of a run by pid, and leaves none behind."""

import contextlib
import json
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import latchkey
import psutil

from tests.helpers.child_processes import Child
from tests.helpers.waiting import eventually

__all__ = ["Host", "LoneHost", "SupervisedHost", "tell_if_strange"]

# Twenty processes that start at once on two cores need some time.
START_SECONDS_MAX = 60.0


def tell_if_strange(error: latchkey.LatchkeyError) -> None:
    """Write errors that no outage explains to standard error; the report shows how often each
    occurred.
    """
    if not isinstance(error, latchkey.Unavailable | latchkey.ResourceExhausted):
        print(f"strange: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201


class Host:
    """One address with one or more workers of the service behind it."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, str], workers: int) -> None:
        self.name = name
        self.workers = workers
        self.address = ""
        self.children: list[Child] = []
        self._folder = folder
        self._settings = {
            "data_dir": str(folder / "unused"),
            "grace_seconds": "2",
            "workers": str(workers),
            **settings,
        }

    async def start(self) -> None:
        """Start it and wait until it serves."""
        raise NotImplementedError

    def worker_processes(self) -> list[psutil.Process]:
        """Return the processes that serve."""
        raise NotImplementedError

    def times_up(self) -> int:
        """Return how many workers have started to serve so far."""
        raise NotImplementedError

    async def bring_back(self, times_up: int) -> None:
        """Wait until a new worker has replaced one that was ended; start it if no supervisor
        does. `times_up` is the value from before the end.
        """
        raise NotImplementedError

    async def end(self) -> None:
        """Shut it down cleanly."""
        child = self.children[-1]
        child.terminate()
        await child.ended()

    def clean_up(self) -> None:
        for child in self.children:
            child.clean_up()


class LoneHost(Host):
    """A worker without a supervisor: the test restarts it, on the same port."""

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: Mapping[str, str],
        peppers: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name, folder, settings, workers=1)
        # Keeps the port while the worker is down, as the supervisor does.
        self._keeper = socket.socket()
        self._keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._keeper.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._keeper.getsockname()[1]}"
        self._environment = environment or {}
        # A supervisor sends settings, peppers and a policy to a worker. Here the policy is absent.
        given = json.dumps(self._settings | {"listen": self.address})
        self._handed = f"{given}\n{peppers}null\n".encode()

    async def start(self) -> None:
        name = f"{self.name}.{len(self.children)}"
        child = Child(self._folder, name, ["tests.history.worker"], self._environment, self._handed)
        self.children.append(child)
        await eventually(
            lambda: child.out.read_bytes() or not child.alive, f"{name} serves", START_SECONDS_MAX
        )
        assert child.alive or child.expected_end, child.trouble()

    def worker_processes(self) -> list[psutil.Process]:
        # Excludes a worker that is starting, because it has no handler for SIGTERM yet.
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
    """The service with its supervisor, which restarts workers itself."""

    async def start(self) -> None:
        argv = ["tests.history.worker", "supervisor"]
        given = self._settings | {"listen": "127.0.0.1:0"}
        environment = {f"LATCHKEY_{name.upper()}": value for name, value in given.items()}
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
        return self.children[-1].err.read_text().count('"worker ready"')

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

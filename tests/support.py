"""Shared by tests that break things: bounded waits, a breakable Postgres, and Latchkey as a
process."""

import asyncio
import contextlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import psutil
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from latchkey_service.audit.audit_log import AuditContext
from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.coherence.verifier_state import ReadBegan
from latchkey_service.postgres.embedded_cluster import EmbeddedPostgres

# Far longer than any step here takes; only a failing test waits this long.
WAIT_SECONDS = 20.0
POLL_SECONDS = 0.02
# As in nice(2).
FAVOUR = -10
# The service works again within this time after Postgres' return: the guarantee, plus a margin for
# a busy machine.
RESUME_SECONDS = 2.0 + 0.7
# A separate channel for each test, which reconnects at once, because the tests measure the server.
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # Despite its name this limits how long a connection attempt may take.
    ("grpc.min_reconnect_backoff_ms", round(WAIT_SECONDS * 1000)),
    ("grpc.max_reconnect_backoff_ms", 100),
)


async def eventually(check: Callable[[], Any], what: str, within: float = WAIT_SECONDS) -> Any:
    """Call `check` until it returns a true value, and return that.

    A failed assertion and a failed call in it count as "not yet".
    """
    give_up = time.monotonic() + within
    while True:
        last: object
        try:
            last = check()
            if inspect.isawaitable(last):
                last = await last
            if last:
                return last
        except (AssertionError, grpc.aio.AioRpcError) as error:
            last = error
        assert time.monotonic() < give_up, f"not within {within} s: {what}; at last: {last!r}"
        await asyncio.sleep(POLL_SECONDS)


class BelievedReads(LeasedReads):
    """Believes every read: for tests of one database, without a verifier that holds a lease."""

    def __init__(self) -> None:
        """Needs nothing."""

    async def begin(self, deadline: float) -> ReadBegan:
        """Return at once."""
        return ReadBegan(0, 0)

    async def accept(self, snapshot: Snapshot, began: ReadBegan, deadline: float) -> None:
        """Return at once."""


def audit_context(method: str = "Create") -> AuditContext:
    """The audit context for a change that bypasses the servicer."""
    return AuditContext("", f"/latchkey.v1.TokenService/{method}", "unix:", "request", "", "")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a call for its caller."""

    code: grpc.StatusCode
    seconds: float
    response: Any = None
    details: tuple[Any, ...] = ()

    @property
    def ok(self) -> bool:
        return self.code is grpc.StatusCode.OK

    @property
    def retry_info(self) -> bool:
        return any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in self.details)


async def outcome(call: Awaitable[Any]) -> Outcome:
    """Wait for a call and return its outcome."""
    start = time.monotonic()
    try:
        response = await call
    except grpc.aio.AioRpcError as error:
        packed = [v for k, v in error.trailing_metadata() or () if k == "grpc-status-details-bin"]
        status = status_pb2.Status.FromString(packed[0] if packed else b"")
        return Outcome(error.code(), time.monotonic() - start, None, tuple(status.details))
    return Outcome(grpc.StatusCode.OK, time.monotonic() - start, response)


def server_only_deadline(timeout: float | None) -> dict[str, Any]:
    """Send the server a deadline that this side does not enforce, because the test checks whether
    the server answers by then, and not whether a busy caller notices in time."""
    if timeout is None:
        return {}
    return {"metadata": (("grpc-timeout", f"{round(timeout * 1000)}m"),)}


async def is_serving(channel: grpc.aio.Channel) -> bool:
    """Return whether the health service reports SERVING. Raises AioRpcError if it does not
    answer."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextlib.asynccontextmanager
async def session(url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Open a connection for the test, under an application name other than the service's."""
    connection = await asyncpg.connect(
        url, timeout=WAIT_SECONDS, server_settings={"application_name": "test"}
    )
    try:
        yield connection
    finally:
        connection.terminate()


async def drop_database(url: str, name: str) -> None:
    """Drop a database through a connection to another one, even if clients are connected to it."""

    async def drop() -> bool:
        async with session(url) as connection:
            try:
                await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
            except asyncpg.InsufficientPrivilegeError:
                # Only a superuser may end autovacuum, which ends by itself.
                return False
        return True

    await eventually(drop, f"{name} is dropped")


async def backends(url: str) -> list[Any]:
    """Return the activity of the service's connections to this database."""
    async with session(url) as connection:
        return list(
            await connection.fetch(
                "SELECT pid, state, wait_event_type FROM pg_stat_activity"
                " WHERE application_name = 'latchkey' AND datname = current_database()"
            )
        )


class BreakablePostgres:
    """An embedded Postgres that a test may stop, kill, freeze, and bring back.

    Slow operations do not block the event loop, in which the server under test runs. The exception
    is `start`, which must run on the main thread.
    """

    def __init__(self, data_dir: Path) -> None:
        self._postgres = EmbeddedPostgres(data_dir)
        self._data_dir = data_dir
        self._frozen: list[psutil.Process] = []

    @property
    def log_path(self) -> Path:
        return self._data_dir / "postgres.log"

    def start(self) -> str:
        return self._postgres.start()

    async def stop(self) -> None:
        await asyncio.to_thread(self._postgres.stop)

    async def kill(self) -> None:
        """SIGKILL the postmaster; its children notice by themselves."""
        assert self._postgres.pid is not None
        os.kill(self._postgres.pid, signal.SIGKILL)
        await eventually(lambda: self._postgres.poll() is not None, "the postmaster is dead")

    async def crash(self) -> None:
        """SIGKILL all of its processes at once, as in a power failure: none writes anything."""
        await self.freeze()
        for process in self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._frozen = []
        await eventually(lambda: self._postgres.poll() is not None, "the postmaster is dead")

    async def freeze(self) -> None:
        """SIGSTOP the postmaster, so that it starts no more children, and then the children."""
        assert self._postgres.pid is not None
        postmaster = psutil.Process(self._postgres.pid)
        postmaster.suspend()
        self._frozen = [postmaster]
        for child in postmaster.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.suspend()
                self._frozen.append(child)

    def configure(self, lines: str) -> None:
        """Apply these settings on top of the existing ones, instead of those of the last call."""
        (path,) = self._data_dir.rglob("postgresql.auto.conf")
        path.write_text(f"{lines}\n")
        assert self._postgres.pid is not None
        os.kill(self._postgres.pid, signal.SIGHUP)

    def thaw(self) -> None:
        """SIGCONT all frozen processes."""
        for process in reversed(self._frozen):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self._frozen = []

    @contextlib.asynccontextmanager
    async def broken_by(self, fault: str) -> AsyncIterator[Callable[[], None]]:
        """Break it; the yielded function restores it, and so does the end of the block."""
        try:
            await {"stopped": self.stop, "killed": self.kill, "frozen": self.freeze}[fault]()
            yield self.bring_back
        finally:
            self.bring_back()

    def bring_back(self) -> None:
        self.thaw()
        self.start()

    def close(self) -> None:
        self.thaw()
        self._postgres.stop()


class Service:
    """`python -m latchkey_service` as a separate process, with its settings in the environment.

    It always ends with everything that it started, also when a test fails.
    """

    # A subclass that replaces it belongs to the tests.
    module = "latchkey_service"

    def __init__(self, folder: Path, **settings: object) -> None:
        folder.mkdir(exist_ok=True)
        self._out, self._err = folder / "out", folder / "err"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LATCHKEY_")}
        environment |= {f"LATCHKEY_{k.upper()}": str(v) for k, v in settings.items()}
        if self.module.startswith("tests."):
            environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module],
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

    async def welcome(self) -> str:
        """Wait until it prints that it serves; return the address that it prints."""

        def said() -> str | None:
            match = re.search(
                r"^Latchkey serves on (\S+) \(.*Press Ctrl-C to stop", self.out, re.MULTILINE
            )
            if match is None:
                assert self._process.poll() is None, f"it ended: {self.err}"
                return None
            return match[1]

        try:
            address: str = await eventually(said, "the welcome line")
        except AssertionError:
            print(self.err, file=sys.stderr)  # noqa: T201 - pytest shows it with the failure
            raise
        self.family()
        return address

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
        return self._process.returncode

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
def service(folder: Path, **settings: object) -> Iterator[Service]:
    """Run Latchkey as a process."""
    running = Service(folder, **settings)
    try:
        yield running
    finally:
        running.clean_up()

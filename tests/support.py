"""What tests that break things share: bounded waits, a Postgres to break, Latchkey as a process."""

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

# Far above what anything here takes; only a failing test waits it out.
WAIT_SECONDS = 20.0
POLL_SECONDS = 0.02
# As nice(2) has it.
FAVOUR = -10
# Service is back within this of Postgres' return: the promise, and what a busy machine adds.
RESUME_SECONDS = 2.0 + 0.7
# A channel of its own for each test, which connects again at once: what is measured is the server.
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # Despite its name this is how long an attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", round(WAIT_SECONDS * 1000)),
    ("grpc.max_reconnect_backoff_ms", 100),
)


async def eventually(check: Callable[[], Any], what: str, within: float = WAIT_SECONDS) -> Any:
    """Try `check` until it answers with something true, and return that.

    An assertion that fails in it and a call that fails in it count as "not yet".
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
        """Need nothing."""

    async def begin(self, deadline: float) -> ReadBegan:
        """Return at once."""
        return ReadBegan(0, 0)

    async def accept(self, snapshot: Snapshot, began: ReadBegan, deadline: float) -> None:
        """Return at once."""


def audit_context(method: str = "Create") -> AuditContext:
    """What a change below the servicer is written down with."""
    return AuditContext("", f"/latchkey.v1.TokenService/{method}", "unix:", "request", "", "")


@dataclass(frozen=True)
class Outcome:
    """How a call ended for its caller."""

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
    """Wait for a call and tell how it ended."""
    start = time.monotonic()
    try:
        response = await call
    except grpc.aio.AioRpcError as error:
        packed = [v for k, v in error.trailing_metadata() or () if k == "grpc-status-details-bin"]
        status = status_pb2.Status.FromString(packed[0] if packed else b"")
        return Outcome(error.code(), time.monotonic() - start, None, tuple(status.details))
    return Outcome(grpc.StatusCode.OK, time.monotonic() - start, response)


def told_alone(timeout: float | None) -> dict[str, Any]:
    """Tell the server of a deadline that this side does not watch: what is looked at is whether the
    server answers by then, and not whether a busy caller hears of it in time."""
    if timeout is None:
        return {}
    return {"metadata": (("grpc-timeout", f"{round(timeout * 1000)}m"),)}


async def is_serving(channel: grpc.aio.Channel) -> bool:
    """Tell what the health service says. Raises AioRpcError where it does not answer."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextlib.asynccontextmanager
async def session(url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection of the test's own, under a name that is not the service's."""
    connection = await asyncpg.connect(
        url, timeout=WAIT_SECONDS, server_settings={"application_name": "test"}
    )
    try:
        yield connection
    finally:
        connection.terminate()


async def drop_database(url: str, name: str) -> None:
    """Drop a database by way of another one, whoever is connected to it."""

    async def drop() -> bool:
        async with session(url) as connection:
            try:
                await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
            except asyncpg.InsufficientPrivilegeError:
                # Autovacuum is there, which only a superuser may end. It ends by itself.
                return False
        return True

    await eventually(drop, f"{name} is dropped")


async def backends(url: str) -> list[Any]:
    """What the service's connections to this database do."""
    async with session(url) as connection:
        return list(
            await connection.fetch(
                "SELECT pid, state, wait_event_type FROM pg_stat_activity"
                " WHERE application_name = 'latchkey' AND datname = current_database()"
            )
        )


class BreakablePostgres:
    """An embedded Postgres that a test may stop, kill, freeze, and bring back.

    What takes time leaves the event loop free, where the server under test runs; but for `start`,
    which has to be on the main thread.
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
        """SIGKILL all of it at once, as a machine does that loses power: nobody writes a thing."""
        await self.freeze()
        for process in self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._frozen = []
        await eventually(lambda: self._postgres.poll() is not None, "the postmaster is dead")

    async def freeze(self) -> None:
        """SIGSTOP the postmaster, so that it makes no more children, and then the children."""
        assert self._postgres.pid is not None
        postmaster = psutil.Process(self._postgres.pid)
        postmaster.suspend()
        self._frozen = [postmaster]
        for child in postmaster.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.suspend()
                self._frozen.append(child)

    def configure(self, lines: str) -> None:
        """Put these settings on top of those that it has, in place of what was put there before."""
        (path,) = self._data_dir.rglob("postgresql.auto.conf")
        path.write_text(f"{lines}\n")
        assert self._postgres.pid is not None
        os.kill(self._postgres.pid, signal.SIGHUP)

    def thaw(self) -> None:
        """SIGCONT whatever was frozen."""
        for process in reversed(self._frozen):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self._frozen = []

    @contextlib.asynccontextmanager
    async def broken_by(self, fault: str) -> AsyncIterator[Callable[[], None]]:
        """Break it; the function that is yielded brings it back, and so does the end."""
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
    """`python -m latchkey_service` as a process of its own, with its settings in the environment.

    Always ended with all that it started, also when a test fails.
    """

    # Another one in a subclass is of the tests.
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
                # Not the checkout, where a developer's .env may lie.
                cwd=folder,
                # What a terminal has: Ctrl-C goes to the group.
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
        """Its log lines that are whole, in order."""
        lines = []
        for line in self.err.splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    @property
    def worker_pids(self) -> list[int]:
        """Of all workers that have come up, in order."""
        return [line["pid"] for line in self.log if line["event"] == "worker ready"]

    def postmaster(self) -> psutil.Process:
        """Its embedded Postgres."""
        for process in psutil.Process(self.pid).children():
            if process.cmdline()[0].endswith("/postgres"):
                return process
        raise AssertionError("no embedded Postgres")

    async def welcome(self) -> str:
        """Wait until it says that it serves; return the address that it names."""

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
        """The process and all that it has started and that was ever seen."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            self._family |= {process, *process.children(recursive=True)}
        return self._family

    def favour(self) -> None:
        """Have it run before other programs, where the system allows that: whether it answers in
        time is no question of what else a machine is busy with."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess, PermissionError):
                for thread in process.threads():
                    # One may have ended since.
                    with contextlib.suppress(ProcessLookupError):
                        # Linux keeps it for each thread.
                        os.setpriority(os.PRIO_PROCESS, thread.id, FAVOUR)

    def alive(self) -> list[psutil.Process]:
        """Who of the family still runs."""
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
        """Its exit code, or None while it runs."""
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

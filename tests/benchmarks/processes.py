"""The measured processes: their cores, start and end, and CPU time."""

import contextlib
import ctypes
import itertools
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from latchkey_service.postgres.embedded_cluster import EmbeddedPostgres

from tests.helpers.repository import ROOT

__all__ = [
    "Child",
    "Cores",
    "Server",
    "ceiling",
    "child",
    "cores",
    "cpu_seconds",
    "end_with_parent",
    "ended",
    "latchkey",
    "meter",
    "on",
    "postgres",
    "spread",
]

# Importing, migrating and listening take about a second; a busy machine takes longer.
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 15.0
POLL_SECONDS = 0.02
_ADDRESS = re.compile(r"serves on (127\.0\.0\.1:\d+)")
_PR_SET_PDEATHSIG = 1
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Cores:
    """The core of each part."""

    server: int
    load: int
    postgres: int


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its address, and the processes that serve."""

    address: str
    workers: tuple[int, ...]

    @property
    def pid(self) -> int:
        """Return the process that serves, or the first of them."""
        return self.workers[0]


class Child:
    """A script that is controlled by lines on standard input, and ends when the input closes."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._name = name
        self._process = process
        self._log = log
        self._heard = b""

    @property
    def pid(self) -> int:
        """Return its process."""
        return self._process.pid

    def tell(self, line: str) -> None:
        """Send it a line."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def hear(self, seconds: float) -> str:
        """Return its next line. Raises RuntimeError if it has not come in so many seconds."""
        assert self._process.stdout is not None, "it is a pipe"
        out, give_up = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._heard:
            ready, _, _ = select.select([out], [], [], max(0.0, give_up - time.monotonic()))
            chunk = os.read(out, 4_096) if ready else b""
            if not chunk:
                said = self._log.read_text("utf-8", "replace")[-2_000:]
                raise RuntimeError(f"{self._name} does not answer; its log ends:\n{said}")
            self._heard += chunk
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def freeze(self) -> None:
        """Suspend it (SIGSTOP)."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume it (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)

    def dismiss(self) -> None:
        """Close its standard input."""
        assert self._process.stdin is not None, "it is a pipe"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def end(self) -> None:
        """Let it end by itself, and kill it if it does not."""
        if self._process.poll() is None:
            self.thaw()
        self.dismiss()
        ended(self._process)
        assert self._process.stdout is not None, "it is a pipe"
        self._process.stdout.close()


def cores(placing: str) -> Cores:
    """Choose the cores. `placing` says where Postgres runs: `load`, `server` or `auto`.

    The benchmark measures one core of Latchkey, so the server has a dedicated core without
    Postgres, which in production is on another machine. If there is a third core, Postgres has it.
    With two, it shares the load's core, which is idle three quarters of the time; on the server's
    core it would take time from the measurement.
    """
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        raise SystemExit("the benchmarks need two cores: one for the server, one for the load")
    server, load = available[:2]
    beside = available[2] if len(available) > 2 else load
    return Cores(server, load, {"auto": beside, "load": load, "server": server}[placing])


@contextlib.contextmanager
def on(cores: Collection[int]) -> Iterator[None]:
    """Run the block on certain cores; processes that it starts stay there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def postgres(
    data_dir: Path, cores: Collection[int], **settings: object
) -> Iterator[tuple[str, int]]:
    """Run an embedded Postgres with these settings, and yield its URL and the postmaster's pid."""
    server = EmbeddedPostgres(data_dir)
    try:
        with on(cores):
            url = server.start()
            if settings:
                server.stop()
                with (data_dir / "postgres/postgresql.conf").open("a", encoding="utf-8") as file:
                    file.writelines(f"{name} = {value}\n" for name, value in settings.items())
                url = server.start()
        assert server.pid is not None, "it has just started"
        yield url, server.pid
    finally:
        server.stop()


@contextlib.contextmanager
def latchkey(
    scratch: Path, name: str, settings: Mapping[str, str], cores: Collection[int]
) -> Iterator[Server]:
    """Run the service as its users do, with one worker by default; yield it once it answers."""
    environment = {
        "LATCHKEY_LISTEN": "127.0.0.1:0",
        "LATCHKEY_DATA_DIR": str(scratch / "unused"),
        "LATCHKEY_GRACE_SECONDS": "1",
    } | {f"LATCHKEY_{key}": value for key, value in settings.items()}
    argv = [sys.executable, "-m", "latchkey_service"]
    with _started(scratch, name, argv, environment, cores) as (address, pid):
        workers, wanted = _children(pid), int(settings.get("WORKERS", "1"))
        if len(workers) != wanted:
            raise RuntimeError(f"{name} has {len(workers)} processes instead of {wanted} workers")
        yield Server(address, tuple(workers))


@contextlib.contextmanager
def ceiling(scratch: Path, transport: str, core: int) -> Iterator[Server]:
    """Run the server that answers everything with one constant."""
    argv = [sys.executable, str(Path(__file__).with_name("ceiling.py")), transport]
    with _started(scratch, f"ceiling-{transport}", argv, {}, {core}) as (address, pid):
        yield Server(address, (pid,))


@contextlib.contextmanager
def child(
    scratch: Path, module: str, arguments: Sequence[object], cores: Collection[int]
) -> Iterator[Child]:
    """Run one of these benchmarks' scripts."""
    log = scratch / f"{module}.{next(_numbers)}.log"
    with log.open("wb") as file, on(cores):
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{module}", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            cwd=ROOT,
            env=_environment({}),
            start_new_session=True,
            preexec_fn=end_with_parent(),  # noqa: PLW1509 - only makes a system call
        )
    running = Child(module, process, log)
    try:
        yield running
    finally:
        running.end()


def meter(server: Server, postmaster: int) -> Callable[[], tuple[float, ...]]:
    """Return a function that reads the CPU seconds used so far by the server and by all of
    Postgres.

    Backends that start or end between two readings distort the second figure by their start-up or
    shut-down; pooled connections live longer than a stretch.
    """

    def read() -> tuple[float, ...]:
        backends = [postmaster, *_children(postmaster)]
        return cpu_seconds(server.pid), sum(map(cpu_seconds, backends))

    return read


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used so far; 0 if it is gone."""
    # clock_getcpuclockid(3), whose number has this form on Linux: nanoseconds, whereas /proc's stat
    # counts hundredths of a second.
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


@contextlib.contextmanager
def spread(postmaster: int, cores: Collection[int]) -> Iterator[None]:
    """Let Postgres run on these cores for the block, and then on its previous ones."""
    before = os.sched_getaffinity(postmaster)
    try:
        _move(postmaster, cores)
        yield
    finally:
        _move(postmaster, before)


def _move(postmaster: int, cores: Collection[int]) -> None:
    # The postmaster first, because its new children inherit its cores.
    for pid in (postmaster, *_children(postmaster)):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(pid, cores)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii")
    return [int(child) for child in text.split()]


@contextlib.contextmanager
def _started(
    scratch: Path,
    name: str,
    argv: Sequence[str],
    environment: Mapping[str, str],
    cores: Collection[int],
) -> Iterator[tuple[str, int]]:
    """Run a process that prints its address; yield the address and its pid; end it."""
    output = scratch / f"{name}.out"
    with output.open("wb") as out, (scratch / f"{name}.log").open("wb") as log, on(cores):
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            cwd=scratch,
            env=_environment(environment),
            # Ctrl-C must reach only this process, which shuts the others down.
            start_new_session=True,
            preexec_fn=end_with_parent(),  # noqa: PLW1509 - only makes a system call
        )
    try:
        yield _wait_for_address(process, output, name), process.pid
    finally:
        process.terminate()
        ended(process)


def ended(process: "subprocess.Popen[bytes]") -> None:
    """Wait, within a bound, for the end of a process that was asked to end."""
    try:
        process.wait(STOP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_SECONDS_MAX)


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the developer's shell variables and .env settings for
    servers."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LATCHKEY_")}
    return {**inherited, **settings}


def _wait_for_address(process: "subprocess.Popen[bytes]", output: Path, name: str) -> str:
    give_up = time.monotonic() + START_SECONDS_MAX
    while (match := _ADDRESS.search(output.read_text("utf-8"))) is None:
        if process.poll() is not None or time.monotonic() > give_up:
            log = output.with_suffix(".log").read_text("utf-8", "replace")
            raise RuntimeError(f"{name} did not start; its log ends:\n{log[-2000:]}")
        time.sleep(POLL_SECONDS)
    return match[1]


def end_with_parent() -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl  # Before the fork: the child only calls.

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

    return tie

"""The processes under measurement: where they run, how they start and end, what CPU they took."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from latchkey_service.embedded import EmbeddedPostgres

__all__ = ["Cores", "Server", "ceiling", "cores", "latchkey", "meter", "postgres"]

# Importing, migrating and listening take about a second; a busy machine takes longer.
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 15.0
POLL_SECONDS = 0.02
_ADDRESS = re.compile(r"serves on (127\.0\.0\.1:\d+)")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Cores:
    """Which core each part has."""

    server: int
    load: int
    postgres: int


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is up: where it listens, and the process that serves."""

    address: str
    pid: int


def cores(placing: str) -> Cores:
    """Choose the cores. `placing` says where Postgres runs: `load`, `server` or `auto`.

    The figure asked for is what one core of Latchkey does, so the server has a core of its own,
    and Postgres, which in production is on another machine, is not on it. With a third core it
    has that one. With two it shares the load's, which is idle three quarters of the time; on the
    server's it would take time from the core that is being measured.
    """
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        raise SystemExit("the benchmarks need two cores: one for the server, one for the load")
    server, load = available[:2]
    beside = available[2] if len(available) > 2 else load
    return Cores(server, load, {"auto": beside, "load": load, "server": server}[placing])


@contextlib.contextmanager
def _on_core(core: int) -> Iterator[None]:
    """Run the block on a core, and for good what it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def postgres(data_dir: Path, core: int) -> Iterator[tuple[str, int]]:
    """Run an embedded Postgres, and yield its URL and the postmaster's pid."""
    server = EmbeddedPostgres(data_dir)
    try:
        with _on_core(core):
            url = server.start()
        assert server.pid is not None, "it has just started"
        yield url, server.pid
    finally:
        server.stop()


@contextlib.contextmanager
def latchkey(scratch: Path, name: str, settings: Mapping[str, str], core: int) -> Iterator[Server]:
    """Run the service as its users do, with one worker, and yield it when it answers."""
    environment = {
        "LATCHKEY_LISTEN": "127.0.0.1:0",
        "LATCHKEY_DATA_DIR": str(scratch / "unused"),
        "LATCHKEY_GRACE_SECONDS": "1",
        "LATCHKEY_LOG_FORMAT": "json",
    } | {f"LATCHKEY_{key}": value for key, value in settings.items()}
    argv = [sys.executable, "-m", "latchkey_service"]
    with _started(scratch, name, argv, environment, core) as (address, pid):
        workers = _children(pid)
        if len(workers) != 1:
            raise RuntimeError(f"{name} has {len(workers)} processes where one worker was expected")
        yield Server(address, workers[0])


@contextlib.contextmanager
def ceiling(scratch: Path, transport: str, core: int) -> Iterator[Server]:
    """Run the server that answers everything with one constant."""
    argv = [sys.executable, str(Path(__file__).with_name("ceiling.py")), transport]
    with _started(scratch, f"ceiling-{transport}", argv, {}, core) as (address, pid):
        yield Server(address, pid)


def meter(server: Server, postmaster: int) -> Callable[[], tuple[float, ...]]:
    """Return what tells the CPU seconds used so far by the server and by all of Postgres.

    Backends that came or went between two readings distort the second figure by what they took
    to come or go; pooled connections live longer than a stretch.
    """

    def read() -> tuple[float, ...]:
        backends = [postmaster, *_children(postmaster)]
        return _cpu_seconds(server.pid), sum(map(_cpu_seconds, backends))

    return read


def _cpu_seconds(pid: int) -> float:
    # clock_getcpuclockid(3), whose number has this form on Linux: nanoseconds, where /proc's stat
    # counts in hundredths of a second.
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii")
    return [int(child) for child in text.split()]


@contextlib.contextmanager
def _started(
    scratch: Path, name: str, argv: Sequence[str], environment: Mapping[str, str], core: int
) -> Iterator[tuple[str, int]]:
    """Run a process that prints where it serves; yield that and its pid; end it."""
    # Nothing that the developer's shell or a .env file sets may reach the servers.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LATCHKEY_")}
    output = scratch / f"{name}.out"
    with output.open("wb") as out, (scratch / f"{name}.log").open("wb") as log, _on_core(core):
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            cwd=scratch,
            env={**inherited, **environment},
            # Ctrl-C is for this process, which ends the others in order.
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )
    try:
        yield _wait_for_address(process, output, name), process.pid
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS_MAX)


def _wait_for_address(process: "subprocess.Popen[bytes]", output: Path, name: str) -> str:
    give_up = time.monotonic() + START_SECONDS_MAX
    while (match := _ADDRESS.search(output.read_text("utf-8"))) is None:
        if process.poll() is not None or time.monotonic() > give_up:
            log = output.with_suffix(".log").read_text("utf-8", "replace")
            raise RuntimeError(f"{name} did not start; its log ends:\n{log[-2000:]}")
        time.sleep(POLL_SECONDS)
    return match[1]


def _end_with_parent() -> Callable[[], None]:
    prctl = ctypes.CDLL(None).prctl  # Before the fork: the child only calls.

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

    return tie

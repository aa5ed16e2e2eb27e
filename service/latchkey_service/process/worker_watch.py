"""Watches the workers from outside, and kills one that uses too much memory or hangs.

A worker cannot do this itself: whatever blocks its event loop would block the check as well. The
supervisor starts another worker, and counts the restarts by reason.

**Memory.** `native` (0.5.0) buffers a message of any size, and decompresses it, before it can be
rejected. It also keeps the answers for clients that do not read. The worker is killed at once: it
cannot give the memory back, and continuing would only use more. A kernel limit on mapped memory
(RLIMIT_DATA, RLIMIT_AS) would not work. `native` maps memory for a message by the size in its first
five bytes, up to 4 GiB, so any client could kill a worker with five bytes.

**Heartbeats.** The event loop of each worker writes a byte to a pipe at short intervals. A worker
that stays silent hangs. It answers nothing, and its lease ends without our help.
"""

import asyncio
import contextlib
import enum
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from latchkey_service.settings.logs import logger
from latchkey_service.settings.settings import Settings

__all__ = ["HEARTBEAT_VARIABLE", "Reason", "Vitals", "WorkerWatch", "beat", "memory_max_bytes"]

MIB: Final = 1024 * 1024
# Decompression fills about 500 MB a second, so detection is about 50 MB late. A check takes 10 µs.
LOOK_SECONDS: Final = 0.1
# A check that comes later than this was itself delayed: the machine was suspended, the container
# was frozen, or this process got no CPU. The workers were probably delayed for the same reason.
LOOK_SECONDS_MAX: Final = 0.3
BEAT_SECONDS: Final = 0.5
# Longer than any stall of a worker that still works: a full garbage collection among a million
# cached verdicts takes 0.3 s, a loaded machine may add seconds. Longer than the longest lease (5 s)
# too, so no client still counts on the worker.
SILENCE_SECONDS_MAX: Final = 10.0
# An idle worker uses about 100 MB. The rest is for messages and answers in transit.
BASE_MIB: Final = 1024
# Twice their real size, because an allocator cannot return all freed memory.
ENTRY_BYTES: Final = 1_000
CONNECTION_BYTES: Final = 100_000
# In a worker's environment: the number of the file to which it writes heartbeats.
HEARTBEAT_VARIABLE: Final = "LATCHKEY_HEARTBEAT_FILE"
# More than a worker writes between two checks. The rest would count at the next check.
_READ_BYTES: Final = 4096


class Reason(enum.StrEnum):
    """Why a worker was killed."""

    MEMORY = "too much memory"
    SILENCE = "unresponsive"


def memory_max_bytes(settings: Settings) -> int:
    """Return the limit of a worker's resident memory; 0: no limit."""
    if settings.memory_mib is not None:
        return settings.memory_mib * MIB
    listeners = 1 if settings.tls_listen is None else 2
    return (
        BASE_MIB * MIB
        + settings.cache_entries * ENTRY_BYTES
        + settings.connections_max * listeners * CONNECTION_BYTES
    )


async def beat() -> None:
    """In a worker: write heartbeats until cancelled. Does nothing without a supervisor."""
    number = os.environ.get(HEARTBEAT_VARIABLE)
    if number is None:
        return
    file = int(number)
    os.set_blocking(file, False)
    while True:
        # The pipe is full if the supervisor is blocked, and broken if it has exited. This worker
        # ignores both, because it watches its stdin.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(file, b".")
        await asyncio.sleep(BEAT_SECONDS)


class Vitals:
    """Decides about one worker. Pure."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        # None before the first heartbeat: the start of a worker has its own time limit.
        self._silent_seconds: float | None = None

    def judge(self, passed_seconds: float, *, heartbeat: bool, resident: int) -> Reason | None:
        """Return why to kill the worker, or None.

        `passed_seconds` is the time since the last check, `heartbeat` says whether the worker has
        written since then, and `resident` is its memory in bytes, or 0 if unknown.
        """
        if heartbeat:
            self._silent_seconds = 0.0
        elif self._silent_seconds is not None:
            self._silent_seconds += min(passed_seconds, LOOK_SECONDS_MAX)
            if self._silent_seconds > SILENCE_SECONDS_MAX:
                return Reason.SILENCE
        return Reason.MEMORY if 0 < self._bytes_max < resident else None


class _Watched:
    """One worker: its heartbeats, memory and process. Owns the files. Watching thread only."""

    def __init__(
        self, process: asyncio.subprocess.Process, heartbeats: int, bytes_max: int
    ) -> None:
        self.reason: Reason | None = None
        self._failed_with = ""
        self._process = process
        self._vitals = Vitals(bytes_max)
        self._bytes_max = bytes_max
        self._heartbeats = heartbeats
        os.set_blocking(heartbeats, False)
        self._loop = asyncio.get_running_loop()
        # These files stay bound to the process, even if another process gets its pid.
        self._memory = self._handle = -1
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # it has ended already
                self._memory = os.open(f"/proc/{process.pid}/statm", os.O_RDONLY)
                self._handle = os.pidfd_open(process.pid)

    def look(self, passed_seconds: float) -> None:
        """Kill the worker if there is a reason to."""
        if self.reason is not None:
            return
        resident = self._resident()
        self.reason = self._vitals.judge(
            passed_seconds, heartbeat=self._has_heartbeat(), resident=resident
        )
        if self.reason is None:
            return
        logger().critical(
            f"worker killed: {self.reason}",
            pid=self._process.pid,
            mib=resident // MIB,
            limit_mib=self._bytes_max // MIB,
        )
        with contextlib.suppress(ProcessLookupError):
            # Not a graceful stop: its loop does not run, or there is no memory left for it.
            if self._handle < 0:
                self._loop.call_soon_threadsafe(self._process.kill)
            else:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def report(self, error: Exception) -> None:
        """Log that a check failed. Repeated failures of the same kind are logged once."""
        kind = type(error).__name__
        if kind != self._failed_with:
            self._failed_with = kind
            logger().error("worker not watched", pid=self._process.pid, error=kind)

    def close(self) -> None:
        """Close the files."""
        for file in (self._heartbeats, self._memory, self._handle):
            if file >= 0:
                os.close(file)

    def _has_heartbeat(self) -> bool:
        try:
            return bool(os.read(self._heartbeats, _READ_BYTES))
        except BlockingIOError:
            return False

    def _resident(self) -> int:
        if self._memory < 0:
            return 0
        try:
            # The fields are total pages, resident pages, ...
            return int(os.pread(self._memory, 100, 0).split()[1]) * os.sysconf("SC_PAGESIZE")
        except ProcessLookupError:  # it has ended
            return 0


class WorkerWatch:
    """Watches the workers of a supervisor from a thread.

    A thread, because a restart of Postgres blocks the supervisor's event loop.
    """

    def __init__(self, bytes_max: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_max = bytes_max
        self._clock = clock
        # Held while files are in use: a closed file's number may be reused at once.
        self._lock = threading.Lock()
        self._workers: dict[asyncio.subprocess.Process, _Watched] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker watch", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def add(self, process: asyncio.subprocess.Process, heartbeats: int) -> None:
        """Watch a worker that writes its heartbeats to a pipe. Closes `heartbeats` in the end."""
        with self._lock:
            self._workers[process] = _Watched(process, heartbeats, self._bytes_max)

    def remove(self, process: asyncio.subprocess.Process) -> Reason | None:
        """Stop watching a worker that has ended. Return the reason if it was killed by the
        watch.
        """
        with self._lock:
            watched = self._workers.pop(process, None)
            if watched is None:
                return None
            watched.close()
            return watched.reason

    def _run(self) -> None:
        last = self._clock()
        while not self._stopped.wait(LOOK_SECONDS):
            now = self._clock()
            passed, last = now - last, now
            with self._lock:
                for watched in self._workers.values():
                    try:
                        watched.look(passed)
                    except Exception as error:  # noqa: BLE001 - the others must still be watched
                        watched.report(error)

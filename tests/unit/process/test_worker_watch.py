"""When the supervisor kills a worker: its memory, and the silence of its event loop."""

import asyncio
import os
import signal
import sys
import time

import psutil
import pytest
from latchkey_coherence.lease import LEASE_SECONDS_MAX
from latchkey_service.process.worker_watch import (
    BEAT_SECONDS,
    LOOK_SECONDS,
    SILENCE_SECONDS_MAX,
    Reason,
    Vitals,
    WorkerWatch,
)
from structlog.testing import capture_logs

from tests.helpers.waiting import POLL_SECONDS, WAIT_SECONDS, eventually

MAX = 1_000


def silence(vitals: Vitals, looks: int, seconds: float = LOOK_SECONDS) -> Reason | None:
    """Look at a worker that writes nothing, until there is a reason to kill it."""
    for _ in range(looks):
        found = vitals.judge(seconds, heartbeat=False, resident=1)
        if found is not None:
            return found
    return None


def test_a_silent_worker_hangs() -> None:
    """A worker that falls silent is killed soon after its lease has ended, and not earlier. Each
    heartbeat starts the time again.
    """
    assert SILENCE_SECONDS_MAX > LEASE_SECONDS_MAX + BEAT_SECONDS
    vitals = Vitals(MAX)
    looks = int(SILENCE_SECONDS_MAX / LOOK_SECONDS)
    for _ in range(3):
        assert vitals.judge(LOOK_SECONDS, heartbeat=True, resident=1) is None
        assert silence(vitals, looks - 1) is None
    assert silence(vitals, 3) is Reason.SILENCE


def test_a_starting_worker_does_not_hang() -> None:
    """The silence before the first heartbeat does not count: the start has its own limit."""
    assert silence(Vitals(MAX), 10_000) is None


def test_a_frozen_machine_is_not_a_hang() -> None:
    """If the checks themselves come late, however late, the worker was probably frozen as well."""
    vitals = Vitals(MAX)
    assert vitals.judge(LOOK_SECONDS, heartbeat=True, resident=1) is None
    for pause in (SILENCE_SECONDS_MAX * 2, 3_600.0, 86_400.0):
        assert silence(vitals, 3, pause) is None
        assert vitals.judge(LOOK_SECONDS, heartbeat=True, resident=1) is None


def test_memory() -> None:
    """A worker above the limit is killed, whether it works, hangs or starts. 0 means no limit."""
    assert Vitals(MAX).judge(0.1, heartbeat=True, resident=MAX) is None
    for heartbeat in (True, False):
        found = Vitals(MAX).judge(0.1, heartbeat=heartbeat, resident=MAX + 1)
        assert found is Reason.MEMORY
        assert Vitals(0).judge(0.1, heartbeat=heartbeat, resident=2**60) is None


def has_ended(pid: int) -> bool:
    """Wait for the end of a child while the event loop is blocked."""
    give_up = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < give_up:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:  # a thread of asyncio has reaped it (Python 3.11)
            return True
        time.sleep(POLL_SECONDS)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="memory is checked only on Linux")
async def test_the_watch_works_while_the_supervisor_is_blocked() -> None:
    """The supervisor's event loop is blocked while it restarts Postgres. The watch kills a worker
    meanwhile, and reports the reason afterwards. A worker that ended by itself has none."""
    watch = WorkerWatch(bytes_max=1)
    processes = []
    for program in ("cat", "true"):
        processes.append(
            await asyncio.create_subprocess_exec(program, stdin=asyncio.subprocess.PIPE)
        )
        read, write = os.pipe()
        os.close(write)
        if program == "true":
            await processes[-1].wait()
        watch.add(processes[-1], read)
    watch.start()
    ended = has_ended(processes[0].pid)
    watch.stop()
    if not ended:
        # Not otherwise: it would take the exit code away from asyncio, which then reports 255.
        processes[0].kill()
    assert await processes[0].wait() == -signal.SIGKILL
    assert ended
    assert [watch.remove(process) for process in processes] == [Reason.MEMORY, None]
    assert watch.remove(processes[0]) is None


@pytest.mark.skipif(sys.platform != "linux", reason="memory is checked only on Linux")
async def test_a_worker_that_cannot_be_examined_leaves_the_others_watched() -> None:
    """If the check of one worker fails, whatever the reason, the next one is killed nevertheless.
    The log contains one line for each kind of failure, and not one for each check."""
    watch = WorkerWatch(bytes_max=1)
    processes = []
    for _ in range(2):
        processes.append(await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE))
        read, write = os.pipe()
        os.close(write)
        watch.add(processes[-1], read)

    def fail() -> int:
        raise ZeroDivisionError

    watch._workers[processes[0]]._resident = fail  # type: ignore[method-assign]
    watch.start()
    with capture_logs() as lines:
        try:
            assert await asyncio.to_thread(has_ended, processes[1].pid)
            await eventually(lambda: watch._workers[processes[1]].reason is not None, "it is noted")
        finally:
            watch.stop()
            processes[0].kill()
            for process in processes:
                await process.wait()
    assert [watch.remove(process) for process in processes] == [None, Reason.MEMORY]
    failed = [line["error"] for line in lines if line["event"] == "worker not watched"]
    assert failed == ["ZeroDivisionError"]

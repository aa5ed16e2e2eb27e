"""Loops of the processes: a failure for one item does not stop the others."""

import asyncio
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from latchkey_service.access.authenticator import ActivePolicy
from latchkey_service.access.policy import Policy
from latchkey_service.postgres.circuit_breaker import jittered
from latchkey_service.process import periodic, worker_process
from latchkey_service.process.metrics_server import WorkerReports
from latchkey_service.transport import connection_guard
from latchkey_service.transport.transports import Limits

from tests.helpers.waiting import eventually


def fail(*_: object) -> Any:
    raise ZeroDivisionError


async def test_idle_connections_are_closed_beside_one_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If one idle connection cannot be closed, the next one is, again and again."""
    monkeypatch.setattr(periodic, "REST_SECONDS", 0.0)
    closed: list[int] = []
    task = asyncio.create_task(periodic.rest([fail, lambda: closed.append(1)]))
    await eventually(lambda: len(closed) > 2, "the other one is closed")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_failed_summary_does_not_end_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A summary that cannot be made does not end the worker, and the next one is tried."""
    monkeypatch.setattr(periodic, "SUMMARY_SECONDS", 0.0)
    made: list[int] = []

    def log(*_: object) -> None:
        made.append(1)
        raise ZeroDivisionError

    monkeypatch.setattr(periodic, "log_counts", log)
    counts: Any = None
    task = asyncio.create_task(periodic.log_counts_regularly(counts, dict))
    await eventually(lambda: len(made) > 2, "it is tried again")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_hourly_work_comes_soon_after_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is replaced every half an hour still removes what is old. Otherwise, the pauses
    are as long as they should be."""
    pauses: list[float] = []
    done: list[int] = []

    def pause(seconds: float, randomness: float) -> float:
        # Servers that tests share have loops of their own here.
        if asyncio.current_task() is not task:
            return jittered(seconds, randomness)
        pauses.append(seconds)
        return 0.0

    async def purge(_: int) -> int:
        done.append(len(pauses))
        return 0

    monkeypatch.setattr(periodic, "jittered", pause)
    table: Any = SimpleNamespace(purge=purge)
    task = asyncio.create_task(periodic.purge_rates(table))
    await eventually(lambda: len(done) > 2, "it is done again")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert pauses[:3] == [periodic.FIRST_SECONDS, periodic.PURGE_SECONDS, periodic.PURGE_SECONDS]
    assert done[:3] == [1, 2, 3]
    assert periodic.FIRST_SECONDS <= periodic.PURGE_SECONDS / 10


def test_each_part_learns_of_a_new_policy() -> None:
    """If one part of a worker cannot take a new policy, the others take it. Then the worker starts
    again, because of the error."""
    active = ActivePolicy(Policy({}, {}))
    told: list[int] = []
    active.on_change(fail)
    active.on_change(lambda: told.append(1))
    with pytest.raises(ZeroDivisionError):
        active.replace(Policy({}, {}))
    assert told == [1]


def test_a_broken_pipe_counts_as_unread() -> None:
    """A worker that cannot be sent a policy is killed like one that reads none, and the next worker
    is sent it."""
    broken: Any = SimpleNamespace(pid=1, stdin=SimpleNamespace(writelines=fail))
    assert worker_process.send(broken, b"policy") == sys.maxsize


async def test_metrics_of_other_workers_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker prints by mistake in place of its metrics costs only its own metrics."""
    reports: Any = WorkerReports(3, "1.0", Counter())
    lines = {0: 5, 1: [["no_such_metric", []]], 2: []}

    async def ask(worker: int) -> Any:
        return lines[worker]

    monkeypatch.setattr(reports, "_ask", ask)
    found = {metric.name: metric for metric in await reports.collect()}
    up = [sample.labels["worker"] for sample in found["latchkey_worker_up"].samples]
    assert up == ["0", "1", "2"]
    assert "latchkey_build_info" in found


@pytest.mark.skipif(sys.platform != "linux", reason="the guard works only on Linux")
async def test_the_guard_continues_after_any_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """An inspection that fails, whatever the reason, is followed by others."""
    monkeypatch.setattr(connection_guard, "COUNT_SECONDS", 0.0)
    guard = connection_guard.ConnectionGuard(["127.0.0.1:1"], Limits(handshake=0.0))
    tried: list[int] = []

    def inspect() -> None:
        tried.append(1)
        raise ZeroDivisionError

    monkeypatch.setattr(guard, "inspect", inspect)
    task = asyncio.create_task(guard.run())
    await eventually(lambda: len(tried) > 2, "it is tried again")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

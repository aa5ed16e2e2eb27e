"""How the service distinguishes a busy event loop from a slow database."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from latchkey_service import loop_delay
from latchkey_service.errors import BUSY, NO_ANSWER, Overloaded, StoreUnavailable
from latchkey_service.loop_delay import LATE_SECONDS, TICK_SECONDS, LoopWatch
from latchkey_service.process import doctor_listeners
from latchkey_service.rpc.admission import BURST, STUCK_FIRST_SECONDS, ConcurrencyLimiter
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens.batched_lookup import WAITING_MAX, Lookup
from structlog.testing import capture_logs

from tests.helpers.waiting import eventually

KEYRING = Keyring([Pepper(bytes(32))])
# Of a statement. Tests extend the constants of `postgres/connections.py`.
LONGEST_LIMIT_SECONDS = 2.0


class Loop:
    """An event loop that ticks when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.watch = LoopWatch(lambda: self.now)
        self.watch._ticked_at = self.now

    def run(self, seconds: float) -> None:
        """Let time pass with ticks in time."""
        for _ in range(round(seconds / TICK_SECONDS)):
            self.now += TICK_SECONDS
            self.watch.tick()

    def block(self, seconds: float) -> None:
        """Let time pass without a tick."""
        self.now += seconds


def test_the_clock_pauses_while_the_loop_is_late() -> None:
    """A delay does not count, neither while it lasts nor afterwards. Other time does."""
    loop = Loop()
    began = loop.watch.clock()
    loop.run(1.0)
    assert loop.watch.clock() - began == pytest.approx(1.0)
    loop.block(3.0)
    assert loop.watch.clock() - began == pytest.approx(1.0 + TICK_SECONDS)
    loop.watch.tick()
    loop.run(1.0)
    assert loop.watch.clock() - began == pytest.approx(2.0 + TICK_SECONDS)


def test_the_longest_delay_is_kept_for_a_while() -> None:
    """The metric shows a delay until a scrape must have seen it, and one that still lasts."""
    loop = Loop()
    assert loop.watch.longest_seconds() == 0.0
    loop.block(2.0 + TICK_SECONDS)
    assert loop.watch.longest_seconds() == pytest.approx(2.0)
    loop.watch.tick()
    loop.block(0.5)
    loop.watch.tick()
    loop.run(loop_delay.KEPT_SECONDS - 1)
    assert loop.watch.longest_seconds() == pytest.approx(2.0)
    loop.run(2.0)
    assert loop.watch.longest_seconds() < LATE_SECONDS


def test_delays_are_logged_rarely() -> None:
    """A late loop is logged once in ten seconds, with its cause. A short delay is not logged."""
    loop = Loop()
    with capture_logs() as lines:
        for _ in range(20):
            loop.block(0.4)
            loop.watch.tick()
        loop.block(0.1)
        loop.watch.tick()
    assert [line["event"] for line in lines] == ["the event loop is late"]
    assert "the database is not the cause" in lines[0]["what_to_do"]


async def test_a_blocked_loop_is_measured() -> None:
    """The watch of a real loop measures how long a callback blocks it."""
    watch = LoopWatch()
    task = asyncio.create_task(watch.run())
    await eventually(lambda: watch._ticked_at is not None, "it runs")
    time.sleep(0.3)  # noqa: ASYNC251 - blocks the loop on purpose
    await eventually(lambda: watch.longest_seconds() >= 0.2, "it is measured")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(("late", "error"), [(True, Overloaded), (False, StoreUnavailable)])
async def test_calls_in_the_queue_blame_the_right_part(late: bool, error: type[Exception]) -> None:
    """When no call has ended for long, further ones are rejected as overload if the event loop was
    late, and because of the database if it was not."""
    loop = Loop()
    limiter = ConcurrencyLimiter(1, 1_000, lambda: loop.now, loop.watch.clock)
    held = limiter.slot(10.0)
    await held.__aenter__()
    waiting = []
    for _ in range(BURST):
        waiting.append(asyncio.create_task(limiter.acquire(10.0, "", False)))
        await asyncio.sleep(0)
    (loop.block if late else loop.run)(STUCK_FIRST_SECONDS + 0.1)
    with pytest.raises(error) as found:
        limiter.check()
    assert type(found.value) is error
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize(("late", "error"), [(True, Overloaded), (False, StoreUnavailable)])
async def test_look_ups_blame_the_right_part(late: bool, error: type[Exception]) -> None:
    """Verifies that read the database are rejected in the same way."""
    loop = Loop()
    blocked = asyncio.Event()

    async def connect() -> Any:
        await blocked.wait()

    lookup = Lookup(connect, lambda: loop.now, KEYRING, loop.watch.clock)
    first = lookup._enqueue([b"d"] * 1_000, loop.now + 10)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting = [lookup._enqueue([b"d"] * 1_000, loop.now + 10) for _ in range(WAITING_MAX // 1_000)]
    (loop.block if late else loop.run)(1.0)
    with pytest.raises(error) as found:
        lookup._enqueue([b"d"], loop.now + 10)
    assert type(found.value) is error
    await lookup.close()
    await asyncio.gather(first, *waiting, return_exceptions=True)


def test_time_outs_of_a_busy_process_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A statement that timed out while the event loop was late did not fail because of the
    database. A broken connection did."""
    loop = Loop()
    monkeypatch.setattr(loop_delay, "WATCH", loop.watch)
    assert loop_delay.reason_for(TimeoutError()) == NO_ANSWER
    loop.block(1.0)
    assert loop_delay.reason_for(TimeoutError()) == BUSY
    assert loop_delay.reason_for(ConnectionResetError()) == NO_ANSWER


def test_an_old_delay_does_not_excuse_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that hangs is named, although the event loop was late a few seconds before."""
    loop = Loop()
    monkeypatch.setattr(loop_delay, "WATCH", loop.watch)
    loop.block(1.0)
    loop.watch.tick()
    loop.run(LONGEST_LIMIT_SECONDS)
    assert loop_delay.reason_for(TimeoutError()) == BUSY
    loop.run(LONGEST_LIMIT_SECONDS)
    assert loop_delay.reason_for(TimeoutError()) == NO_ANSWER


@pytest.mark.parametrize("status", ["SERVING", "NOT_SERVING"])
def test_the_doctor_names_a_late_loop(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    """A service that answers late is overloaded, whatever it reports about itself."""
    clock = iter((0.0, 1.2))
    monkeypatch.setattr(doctor_listeners, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(doctor_listeners, "_closed", lambda *_: None)
    monkeypatch.setattr(doctor_listeners, "ask", lambda _: status)
    found = doctor_listeners._plaintext("127.0.0.1:50051")
    assert found.state == "warning"
    assert "took 1.2 s" in found.text
    assert "event loop is late" in found.what_to_do

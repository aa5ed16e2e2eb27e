"""A stream's messages count against its caller's rate, and are heard later rather than refused."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from latchkey_service.access.policy import Caller
from latchkey_service.access.rates import BURST_SECONDS, RateLimits
from latchkey_service.calls import Calls

WATCH = "/latchkey.v1.TokenService/Watch"
RATE = 5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that moves only while something sleeps."""
    times = [100.0]
    sleep = asyncio.sleep

    async def slept(seconds: float) -> None:
        times[0] += seconds
        await sleep(0)

    monkeypatch.setattr("latchkey_service.calls.asyncio.sleep", slept)
    return times


def calls(clock: list[float]) -> Calls:
    unused: object = type("Unused", (), {"refuse": None})()
    return Calls(
        unused,  # type: ignore[arg-type]  # nothing is counted
        unused,  # type: ignore[arg-type]  # nor audited
        unused,  # type: ignore[arg-type]  # nor refused
        0.0,
        lambda: clock[0],
    )


async def said(count: int) -> AsyncIterator[int]:
    for n in range(count):
        yield n


@pytest.mark.parametrize("rates", [None, RateLimits({"manager": 1})])
async def test_without_a_limit_nothing_waits(clock: list[float], rates: RateLimits | None) -> None:
    """Where the policy has none, or one for another role."""
    caller = Caller("a", frozenset(), rates=rates)
    heard = [n async for n in calls(clock)._paced(WATCH, caller, said(1_000))]
    assert heard == list(range(1_000))
    assert clock[0] == 100.0


async def test_messages_are_heard_at_the_caller_s_rate(clock: list[float]) -> None:
    """All of them, in order, after a burst: a Delete may be waiting for what one confirms."""
    caller = Caller("a", frozenset(), rates=RateLimits({"verifier": RATE}))
    heard = [n async for n in calls(clock)._paced(WATCH, caller, said(100))]
    assert heard == list(range(100))
    least = (100 - 1) / RATE - BURST_SECONDS
    assert least - 0.5 <= clock[0] - 100.0 <= least + 1.0

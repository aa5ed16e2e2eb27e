"""Messages of a stream above its caller's rate are read later, not rejected."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from latchkey_service.access.methods import rule_of
from latchkey_service.access.policy import Caller
from latchkey_service.access.rates import BURST_SECONDS, RateLimits
from latchkey_service.rpc.streams import Streams

RULE = rule_of("/latchkey.v1.TokenService/Watch")
RATE = 5


@pytest.fixture
def clock() -> list[float]:
    """A clock that moves only while a stream is delayed."""
    return [100.0]


def streams(clock: list[float]) -> Streams:
    async def sleep(seconds: float) -> None:
        clock[0] += seconds
        await asyncio.sleep(0)

    unused: Any = None
    return Streams(unused, lambda: clock[0], sleep)


async def messages(count: int) -> AsyncIterator[int]:
    for n in range(count):
        yield n


@pytest.mark.parametrize("rates", [None, RateLimits({"manager": 1})])
async def test_messages_without_a_limit_are_not_delayed(
    clock: list[float], rates: RateLimits | None
) -> None:
    """If the policy has no limit for this role, messages are read at once."""
    caller = Caller("a", frozenset(), rates=rates)
    received = [n async for n in streams(clock)._paced(RULE, caller, messages(1_000))]
    assert received == list(range(1_000))
    assert clock[0] == 100.0


async def test_messages_are_read_at_the_callers_rate(clock: list[float]) -> None:
    """After a burst, all messages are read in order: a Delete may wait for one of them."""
    caller = Caller("a", frozenset(), rates=RateLimits({"verifier": RATE}))
    received = [n async for n in streams(clock)._paced(RULE, caller, messages(100))]
    assert received == list(range(100))
    least = (100 - 1) / RATE - BURST_SECONDS
    assert least - 0.5 <= clock[0] - 100.0 <= least + 1.0

"""Messages of a stream above its caller's rate are read later, not rejected. A stream that would
cost the event loop too much time is ended."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from latchkey_service.access.methods import rule_of
from latchkey_service.access.policy import Caller
from latchkey_service.access.rates import BURST_SECONDS, RateLimits
from latchkey_service.coherence.use_reports import DEBT_MAX, USES_IN_REPORT_MAX, USES_PER_SECOND
from latchkey_service.errors import Overloaded
from latchkey_service.rpc.streams import (
    MESSAGE_BYTES,
    STREAM_BYTES_BURST,
    STREAM_BYTES_PER_SECOND,
    Streams,
)

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


async def messages(count: int, size: int = 4) -> AsyncIterator[bytes]:
    for n in range(count):
        yield n.to_bytes(size, "big")


@pytest.mark.parametrize("rates", [None, RateLimits({"manager": 1})])
async def test_messages_without_a_limit_are_not_delayed(
    clock: list[float], rates: RateLimits | None
) -> None:
    """If the policy has no limit for this role, messages are read at once."""
    caller = Caller("a", frozenset(), rates=rates)
    paced = streams(clock)._paced(RULE, caller, messages(1_000))
    assert [int.from_bytes(data, "big") async for data in paced] == list(range(1_000))
    assert clock[0] == 100.0


async def test_messages_are_read_at_the_callers_rate(clock: list[float]) -> None:
    """After a burst, all messages are read in order: a Delete may wait for one of them."""
    caller = Caller("a", frozenset(), rates=RateLimits({"verifier": RATE}))
    paced = streams(clock)._paced(RULE, caller, messages(100))
    assert [int.from_bytes(data, "big") async for data in paced] == list(range(100))
    least = (100 - 1) / RATE - BURST_SECONDS
    assert least - 0.5 <= clock[0] - 100.0 <= least + 1.0


@pytest.mark.parametrize("size", [4, RULE.bytes_max])
async def test_a_stream_that_sends_too_much_is_ended(clock: list[float], size: int) -> None:
    """However large its messages are, a client can have only so many bytes parsed at once."""
    limited = streams(clock)._limited(messages(1_000_000, size))
    for _ in range(STREAM_BYTES_BURST // (size + MESSAGE_BYTES)):
        await anext(limited)
    with pytest.raises(Overloaded):
        await anext(limited)


async def test_a_client_that_reports_all_its_uses_is_not_ended(clock: list[float]) -> None:
    """The largest reports fit, as many and as often as a client may send them."""
    burst = DEBT_MAX // USES_IN_REPORT_MAX
    count = 0
    async for _ in streams(clock)._limited(messages(1_000, RULE.bytes_max)):
        count += 1
        if count > burst:
            clock[0] += USES_IN_REPORT_MAX / USES_PER_SECOND
    assert count == 1_000
    assert STREAM_BYTES_PER_SECOND < STREAM_BYTES_BURST

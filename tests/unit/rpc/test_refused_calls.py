"""Calls without an identity: how slowly they are refused, and how many may be open."""

import asyncio
import math

import pytest
from latchkey_service.rpc import refused_calls
from latchkey_service.rpc.admission import REJECTIONS_AT_ONCE
from latchkey_service.rpc.refused_calls import PER_SECOND, SECONDS_MAX, RefusedCalls

# The service's own limits, divided by this: each open call is a task.
SMALLER = 20
OPEN_MAX = refused_calls.OPEN_MAX // SMALLER
OPEN_PER_ADDRESS_MAX = refused_calls.OPEN_PER_ADDRESS_MAX // SMALLER
ENDING_MAX = refused_calls.ENDING_MAX // SMALLER
# The simultaneous calls of one address.
CALLS = 50


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that few calls reach."""
    monkeypatch.setattr(refused_calls, "OPEN_MAX", OPEN_MAX)
    monkeypatch.setattr(refused_calls, "OPEN_PER_ADDRESS_MAX", OPEN_PER_ADDRESS_MAX)
    monkeypatch.setattr(refused_calls, "ENDING_MAX", ENDING_MAX)


class Scene:
    """Refused calls that wait until the test ends them."""

    def __init__(self) -> None:
        self.calls = RefusedCalls(lambda: 1_000.0, self._sleep)
        self.ended: list[str] = []
        self.calls.end_connection = self._end_connection
        self._end = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def _end_connection(self, peer: str) -> bool:
        self.ended.append(peer)
        return not peer.startswith("unix:")

    async def _sleep(self, _seconds: float) -> None:
        await self._end.wait()

    async def come(self, peer: str, count: int) -> int:
        """Let calls arrive. Return how many of them were refused at once."""
        tasks = [asyncio.create_task(self.calls.wait(peer)) for _ in range(count)]
        await asyncio.sleep(0)
        self._tasks += tasks
        return sum(task.done() for task in tasks)

    async def leave(self) -> None:
        """Let half of the calls end, and the clients of the others leave."""
        for task in self._tasks[::2]:
            task.cancel()
        self._end.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def test_refusals_are_paced() -> None:
    """A burst of calls without an identity is refused at once. The others wait their turn, at the
    documented rate, but none for longer than the maximum."""
    calls = RefusedCalls(lambda: 1_000.0)
    delays = [calls.delay_seconds() for _ in range(20_000)]
    assert delays[:REJECTIONS_AT_ONCE] == [0.0] * REJECTIONS_AT_ONCE
    rate = 1 / (delays[REJECTIONS_AT_ONCE + 2] - delays[REJECTIONS_AT_ONCE + 1])
    assert rate == pytest.approx(PER_SECOND)
    assert max(delays) == pytest.approx(SECONDS_MAX, abs=0.1)


async def test_open_calls_of_an_address_are_bounded() -> None:
    """An address loses the connections of its calls above the limit. Another address has its own
    share. Calls that have ended do not count."""
    scene = Scene()
    first = await scene.come("ipv4:192.0.2.1:1", OPEN_PER_ADDRESS_MAX)
    assert first == REJECTIONS_AT_ONCE + 1
    assert await scene.come("ipv4:192.0.2.1:2", first) == 0
    assert scene.ended == []
    assert await scene.come("ipv4:192.0.2.1:3", 2) == 0
    assert scene.ended == ["ipv4:192.0.2.1:3"] * 2
    assert await scene.come("ipv4:192.0.2.2:1", 10) == 0
    assert scene.calls.excess == 2
    await scene.leave()
    assert scene.calls.open == 0
    assert not scene.calls._open_of


async def test_open_calls_of_a_worker_are_bounded() -> None:
    """However many addresses call, a limited number of calls is open. Peers without an address,
    such as those of `native`, have only this limit."""
    scene = Scene()
    for number in range(40):
        await scene.come(f"ipv4:192.0.2.{number}:1", CALLS)
    excess = 40 * CALLS - OPEN_MAX - (REJECTIONS_AT_ONCE + 1)
    assert scene.ended[-1] == "ipv4:192.0.2.39:1"
    assert len(scene.ended) == scene.calls.excess == excess
    assert len(set(scene.ended)) == math.ceil(excess / CALLS)
    # A connection that cannot be ended has its calls refused at once.
    assert await scene.come("unix:", 3) == 3
    await scene.leave()
    assert scene.calls.open == 0


async def test_connections_that_do_not_end_are_bounded() -> None:
    """If the connections above a limit do not end in time, their further calls are refused at
    once."""
    scene = Scene()
    for number in range((REJECTIONS_AT_ONCE + ENDING_MAX) // CALLS + 1):
        await scene.come(f"ipv4:192.0.2.{number}:1", CALLS)
    assert scene.calls.open == ENDING_MAX
    assert await scene.come("ipv4:192.0.2.99:1", 3) == 3
    await scene.leave()
    assert scene.calls.open == 0


async def test_peers_without_an_address_have_no_share() -> None:
    """`native` passes calls of unknown methods on over a UNIX socket, so all look alike. They have
    only the limit of the worker."""
    scene = Scene()
    assert await scene.come("unix:", OPEN_PER_ADDRESS_MAX + CALLS) == REJECTIONS_AT_ONCE + 1
    assert scene.ended == []
    await scene.leave()

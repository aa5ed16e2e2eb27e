"""How the `native` transport starts calls: in turns, from queues per role, within limits."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import pygrpc_native.aio
import pytest
from latchkey_service import queue_limit
from latchkey_service.transport import native, native_queues
from pygrpc_native import STREAM_CLOSED, STREAM_FULL, STREAM_SENT

from tests.helpers.waiting import eventually
from tests.unit.transport.fronts import (
    BATCH,
    CALL,
    CREATE,
    HEALTH,
    PATHS,
    STATUS,
    VERIFY,
    Server,
    turn,
)


async def test_single_call_starts_at_once(server: Server) -> None:
    """With empty queues, a call does not wait."""
    server.come(VERIFY, [1])
    assert server.started == [1]
    await turn()
    server.come(VERIFY, [2])
    assert server.started == [1, 2]


async def test_each_turn_starts_calls_from_both_queues(server: Server) -> None:
    """However many verifies wait, each turn also starts some Creates, and vice versa, each in order
    of arrival."""
    verifies, creates = list(range(80)), list(range(100, 120))
    server.come(VERIFY, verifies)
    assert server.started == verifies[: native_queues.VERIFIES_IN_TURN]
    # Even if they arrive in many small batches between two turns.
    for number in creates:
        server.come(CREATE, [number])
    assert len(server.started) == native_queues.VERIFIES_IN_TURN
    await turn()
    in_turn = server.started[native_queues.VERIFIES_IN_TURN :]
    assert in_turn == [*verifies[16:32], *creates[:4]]
    for _ in range(5):
        await turn()
    assert sorted(server.started) == verifies + creates
    assert [n for n in server.started if n < 100] == verifies
    assert [n for n in server.started if n >= 100] == creates


async def test_health_checks_do_not_queue(server: Server) -> None:
    """A health check starts before all queued calls and is never rejected."""
    server.come(VERIFY, range(native_queues.BURST * 2))
    assert server.rejected
    server.come(HEALTH, [-1])
    assert server.started[-1] == -1


async def test_queues_are_bounded(server: Server) -> None:
    """Calls above the burst limit are rejected. A standing queue is kept short. No call in the
    other queue is rejected, and no call that was accepted."""
    room = native_queues.BURST + native_queues.VERIFIES_IN_TURN
    server.come(VERIFY, range(room + 3))
    assert server.front.failed == [
        (number, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]) for number in range(room, room + 3)
    ]
    server.clock += queue_limit.STANDING_SECONDS + 0.1
    server.come(CREATE, [-1])
    server.come(VERIFY, [room + 3])
    assert server.rejected == [VERIFY] * 4
    while server._in_turn:
        await turn()
    assert len(server.started) == room + 1
    server.come(VERIFY, range(1_000_000, 1_000_200))
    kept = native_queues.STANDING + native_queues.VERIFIES_IN_TURN
    assert len(server.rejected) == 4 + 200 - kept


async def test_cancelled_call_never_starts(server: Server) -> None:
    """Cancelling a queued call removes it. Cancelling a call that has started reaches that call."""
    server.come(VERIFY, range(20))
    server.leave(18)
    server.leave(3)
    await turn()
    assert 18 not in server.started
    assert server.cancelled == [3]


async def test_rejection_may_be_delayed(server: Server) -> None:
    """Rejections go out when they are due. A cancelled call gets none."""
    server.delay_seconds = 0.01
    rejected = native_queues.BURST + native_queues.VERIFIES_IN_TURN
    server.come(VERIFY, range(rejected + 2))
    assert server.front.failed == []
    server.leave(rejected)
    await eventually(lambda: len(server.front.failed) > 0, "the other one is sent")
    assert [number for number, _ in server.front.failed] == [rejected + 1]


async def test_calls_that_arrive_in_a_busy_turn_are_fetched(server: Server) -> None:
    """A busy server fetches new calls itself, so that the limit applies to all of them."""
    server.come(VERIFY, range(80))
    room = native_queues.BURST + native_queues.VERIFIES_IN_TURN
    server.front.come = [
        (CALL, number, 0, b"", None, ((), "", None)) for number in range(100, 100 + room)
    ]
    while server._in_turn:
        await turn()
    assert len(server.started) == 80 + room
    assert not server.front.come


async def test_stop_lets_queued_calls_run(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls in the queue when the stop begins still start, and get the grace period."""
    started_before: list[int] = []

    async def stop(server: Server, _grace: float | None) -> None:
        started_before.extend(server.started)

    monkeypatch.setattr(pygrpc_native.aio.Server, "stop", stop)
    server.come(VERIFY, range(100))
    server.come(CREATE, [200])
    await server.stop(1.0)
    assert sorted(started_before) == [*range(100), 200]


async def test_flood_of_one_role_does_not_affect_others(server: Server) -> None:
    """While the managers' queue is full, an operator's call and a batch start soon."""
    server.come(CREATE, range(native_queues.BURST + native_queues.OTHERS_IN_TURN + 1))
    assert server.rejected == [CREATE]
    server.come(STATUS, [-1])
    server.come(BATCH, [-2, -3])
    await turn()
    assert {-1, -2} <= set(server.started)
    assert -3 not in server.started, "one batch per turn"
    await turn()
    assert -3 in server.started
    assert server.rejected == [CREATE]


async def test_cancellation_may_overtake_its_call(server: Server) -> None:
    """A call that arrives after its cancellation does not start. The number of such cancellations
    is bounded, and those whose calls never arrive do no harm."""
    server.leave(7)
    server.come(VERIFY, [7, 8])
    server.come(HEALTH, [9])
    assert server.started in ([9, 8], [8, 9])
    for number in range(10, 10 + native.CANCELLED_MAX * 2):
        server.leave(number)
    assert len(server._cancelled) == native.CANCELLED_MAX


async def test_queueing_counts_against_the_deadline(server: Server) -> None:
    """When a queued call starts, its remaining time is shorter by the wait."""
    left: dict[int, float | None] = {}

    def begin(_: Server, events: Sequence[Any]) -> None:
        left.update({event[1]: event[5][2] for event in events})

    pygrpc_native.aio.Server._on_events = begin  # type: ignore[method-assign, assignment]  # the fixture undoes it
    events = [
        (CALL, number, 0, b"", None, ((), "", seconds))
        for number, seconds in enumerate([2.0] * native_queues.VERIFIES_IN_TURN + [2.0, None, 0.1])
    ]
    server._on_events(events)
    server.clock += 0.5
    await turn()
    first = native_queues.VERIFIES_IN_TURN
    assert left[0] == 2.0
    assert left[first] == pytest.approx(1.5)
    assert left[first + 1] is None
    assert left[first + 2] == 0.0


async def test_verifies_alone_have_larger_turns(server: Server) -> None:
    """If no other call has arrived for a while, each turn starts more verifies."""
    server.clock += native_queues.ALONE_SECONDS + 0.01
    server.come(VERIFY, range(200))
    assert len(server.started) == native_queues.VERIFIES_ALONE
    await turn()
    assert len(server.started) == 2 * native_queues.VERIFIES_ALONE
    server.come(CREATE, [1_000])
    await turn()
    assert (
        len(server.started) == 2 * native_queues.VERIFIES_ALONE + native_queues.VERIFIES_IN_TURN + 1
    )


async def test_failed_fetch_does_not_stop_the_turns(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If new calls cannot be fetched, those in the queues start nevertheless."""
    faults: list[Any] = []
    monkeypatch.setattr(asyncio.get_running_loop(), "default_exception_handler", faults.append)

    def fail_to_fetch(*_: object) -> None:
        del server.front.recv_batch_details
        raise MemoryError

    server.front.recv_batch_details = fail_to_fetch  # type: ignore[assignment,method-assign]
    calls = range(10, 10 + 2 * native.FETCH_AFTER)
    server.come(VERIFY, calls)
    while not faults:
        await turn()
    for _ in calls:
        await turn()
    # All of them start, even if no further call arrives.
    assert sorted(server.started) == [*calls]


async def test_answers_are_sent_before_the_close(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing the library's Rust part discards unsent answers. It is closed a moment after the last
    answer was passed to it."""
    order: list[object] = []

    async def sleep(seconds: float) -> None:
        await turn()
        order.append(seconds)

    monkeypatch.setattr(native, "sleep", sleep)
    monkeypatch.setattr(server.front, "close", lambda: order.append("closed"))
    server.come(VERIFY, [1])
    await server.stop(1.0)
    assert order[:2] == [native.ANSWERS_OUT_SECONDS, "closed"]


async def test_verifies_are_answered_until_connections_close(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients use a connection until it closes. In a stopping server, verifies, batches and health
    checks that still arrive start, and calls that change something are rejected without effect."""
    left = asyncio.Event()

    async def wait(_seconds: float) -> None:
        await left.wait()

    monkeypatch.setattr(native, "sleep", wait)
    stop = asyncio.create_task(server.stop(1.0))
    await turn()
    for number, path in enumerate(PATHS):
        server.come(path, [number])
        await turn()
    late = {PATHS.index(path) for path in (VERIFY, BATCH, HEALTH)}
    assert set(server.started) == late
    assert set(server.rejected) == set(PATHS) - {VERIFY, BATCH, HEALTH}
    assert {code for _, code in server.front.failed} == {grpc.StatusCode.UNAVAILABLE.value[0]}
    assert not server.front.closed
    left.set()
    await stop
    assert server.front.closed


class Stream:
    """Stands in for the context of a streaming call."""

    def __init__(self) -> None:
        self.aborted: grpc.StatusCode | None = None

    async def abort(self, code: grpc.StatusCode, _details: str) -> None:
        self.aborted = code
        raise grpc.aio.AbortError


@pytest.mark.parametrize("end", [STREAM_SENT, STREAM_CLOSED])
async def test_message_waits_for_room(server: Server, end: int) -> None:
    """A message is sent once when there is room. The result shows whether the client has left."""
    ends = [STREAM_FULL, STREAM_FULL, end]
    sent: list[bytes] = []

    def try_send(_: int, data: bytes) -> int:
        sent.append(data)
        return ends[len(sent) - 1]

    server.front.stream_try_send = try_send  # type: ignore[attr-defined]
    assert await server._send(a_stream(), Stream(), b"sent") is (end == STREAM_SENT)
    assert sent == [b"sent"] * 3


async def test_unread_stream_is_ended(server: Server) -> None:
    """A message that finds no room for too long ends its stream."""
    looked: list[float] = []

    def try_send(_: int, __: bytes) -> int:
        looked.append(server.clock)
        server.clock += native.UNREAD_SECONDS / 2
        return STREAM_FULL

    server.front.stream_try_send = try_send  # type: ignore[attr-defined]
    stream = Stream()
    with pytest.raises(grpc.aio.AbortError):
        await server._send(a_stream(), stream, b"sent")
    assert (len(looked), stream.aborted) == (2, grpc.StatusCode.UNAVAILABLE)


def a_stream() -> Any:
    """A call whose answers are bytes that need no encoding."""
    return SimpleNamespace(call_id=1, handler=SimpleNamespace(response_serializer=None))

"""How the `native` transport's calls are begun: in turns, by lanes, and not too many."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import pygrpc_native.aio
import pytest
from latchkey_service import admission, native
from latchkey_service.errors import Overloaded, StatusParts, status_of
from pygrpc_native import EVENT_CANCEL, STREAM_CLOSED, STREAM_FULL, STREAM_SENT

VERIFY = "/latchkey.v1.TokenService/Verify"
CREATE = "/latchkey.v1.TokenService/Create"
HEALTH = "/grpc.health.v1.Health/Check"
BATCH = "/latchkey.v1.TokenService/BatchVerify"
STATUS = "/latchkey.v1.StatusService/GetStatus"
PATHS = (VERIFY, CREATE, HEALTH, BATCH, STATUS)
CALL = 0


class Front:
    """Stands in for the part in Rust."""

    def __init__(self) -> None:
        self.come: list[Any] = []
        self.failed: list[tuple[int, int]] = []

    def recv_batch_details(self, most: int, _timeout_ms: int) -> list[Any]:
        batch, self.come = self.come[:most], self.come[most:]
        return batch

    def fail(self, call_id: int, code: int, _message: str, trailing_metadata: Any) -> None:
        assert [key for key, _ in trailing_metadata] == ["grpc-status-details-bin"]
        self.failed.append((call_id, code))


class Server(native.Server):
    """The server without its transport: what is begun is noted by the turn that it was begun in."""

    def __init__(self) -> None:
        self.clock = 1_000.0
        self.delay_seconds = 0.0
        super().__init__([], self.refuse_all, lambda: self.clock)
        self.front = self._front = Front()  # type: ignore[assignment]
        self._lane_of = [self._lane(path) for path in PATHS]
        self._table = [(path, None) for path in PATHS]  # type: ignore[misc]
        # As where other calls come, too.
        self._others_at = self.clock
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self.refused: list[str] = []

    def refuse_all(self, path: str, seconds: float | None) -> tuple[StatusParts, float]:
        assert seconds is None
        self.refused.append(path)
        return status_of(Overloaded("busy"), "id"), self.delay_seconds

    def come(self, path: str, ids: Sequence[int]) -> None:
        """Let calls come."""
        events = [(CALL, number, PATHS.index(path), b"", None, ((), "", None)) for number in ids]
        self._on_events(events)

    def leave(self, number: int) -> None:
        self._on_events([(EVENT_CANCEL, number, 0, None, None, None)])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    def begin(server: Server, events: Sequence[Any]) -> None:
        for event in events:
            done = server.cancelled if event[0] == EVENT_CANCEL else server.begun
            done.append(event[1])

    monkeypatch.setattr(pygrpc_native.aio.Server, "_on_events", begin)
    return Server()


async def turn() -> None:
    await asyncio.sleep(0)


async def test_one_call_is_begun_at_once(server: Server) -> None:
    """Where nothing waits nothing is waited for."""
    server.come(VERIFY, [1])
    assert server.begun == [1]
    await turn()
    server.come(VERIFY, [2])
    assert server.begun == [1, 2]


async def test_each_turn_has_its_share_of_both_lanes(server: Server) -> None:
    """However many verifies wait, some Creates are begun in each turn, and the other way round;
    each in the order in which they came."""
    verifies, creates = list(range(80)), list(range(100, 120))
    server.come(VERIFY, verifies)
    assert server.begun == verifies[: native.VERIFIES_IN_TURN]
    # Also if they come in many small batches between two turns.
    for number in creates:
        server.come(CREATE, [number])
    assert len(server.begun) == native.VERIFIES_IN_TURN
    await turn()
    in_turn = server.begun[native.VERIFIES_IN_TURN :]
    assert in_turn == [*verifies[16:32], *creates[:4]]
    for _ in range(5):
        await turn()
    assert sorted(server.begun) == verifies + creates
    assert [n for n in server.begun if n < 100] == verifies
    assert [n for n in server.begun if n >= 100] == creates


async def test_health_does_not_wait(server: Server) -> None:
    """A health check is begun before all that waits, and never refused."""
    server.come(VERIFY, range(native.BURST * 2))
    assert server.refused
    server.come(HEALTH, [-1])
    assert server.begun[-1] == -1


async def test_what_waits_is_bounded(server: Server) -> None:
    """A burst past the bound is refused; and where the lane stands, a short one is kept. Nobody of
    the other lane is, and nobody who was let in."""
    room = native.BURST + native.VERIFIES_IN_TURN
    server.come(VERIFY, range(room + 3))
    assert server.front.failed == [
        (number, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]) for number in range(room, room + 3)
    ]
    server.clock += admission.STANDING_SECONDS + 0.1
    server.come(CREATE, [-1])
    server.come(VERIFY, [room + 3])
    assert server.refused == [VERIFY] * 4
    while server._in_turn:
        await turn()
    assert len(server.begun) == room + 1
    server.come(VERIFY, range(1_000_000, 1_000_200))
    kept = native.STANDING + native.VERIFIES_IN_TURN
    assert len(server.refused) == 4 + 200 - kept


async def test_who_leaves_is_not_begun(server: Server) -> None:
    """A call that is given up while it waits costs nothing more; one that is begun is told."""
    server.come(VERIFY, range(20))
    server.leave(18)
    server.leave(3)
    await turn()
    assert 18 not in server.begun
    assert server.cancelled == [3]


async def test_a_refusal_may_be_told_later(server: Server) -> None:
    """Refusals go out when they are due, and one for a call that was given up does no harm."""
    server.delay_seconds = 0.01
    server.come(VERIFY, range(native.BURST + native.VERIFIES_IN_TURN + 1))
    refused = native.BURST + native.VERIFIES_IN_TURN
    assert server.front.failed == []
    server.leave(refused)
    await asyncio.sleep(0.02)
    assert [number for number, _ in server.front.failed] == [refused]


async def test_what_has_come_meanwhile_is_counted(server: Server) -> None:
    """While it is busy it fetches what has come by itself, so that the bound is on all of it."""
    server.come(VERIFY, range(80))
    room = native.BURST + native.VERIFIES_IN_TURN
    server.front.come = [
        (CALL, number, 0, b"", None, ((), "", None)) for number in range(100, 100 + room)
    ]
    while server._in_turn:
        await turn()
    assert len(server.begun) == 80 + room
    assert not server.front.come


async def test_a_stop_turns_nobody_away_who_was_there(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits when the stop begins is begun, and has the grace with all others."""
    begun_before: list[int] = []

    async def stop(server: Server, _grace: float | None) -> None:
        begun_before.extend(server.begun)

    monkeypatch.setattr(pygrpc_native.aio.Server, "stop", stop)
    server.come(VERIFY, range(100))
    server.come(CREATE, [200])
    await server.stop(1.0)
    assert sorted(begun_before) == [*range(100), 200]


async def test_a_flood_of_one_role_is_nobody_elses(server: Server) -> None:
    """While the lane of management is full, an operator's call, and a batch, are begun soon."""
    server.come(CREATE, range(native.BURST + native.OTHERS_IN_TURN + 1))
    assert server.refused == [CREATE]
    server.come(STATUS, [-1])
    server.come(BATCH, [-2, -3])
    await turn()
    assert {-1, -2} <= set(server.begun)
    assert -3 not in server.begun, "a batch is a turn's share"
    await turn()
    assert -3 in server.begun
    assert server.refused == [CREATE]


async def test_a_cancellation_may_overtake_its_call(server: Server) -> None:
    """A call that comes after it was cancelled is not begun; of such cancellations only so many
    are kept, and those of calls that never come do no harm."""
    server.leave(7)
    server.come(VERIFY, [7, 8])
    server.come(HEALTH, [9])
    assert server.begun == [9, 8] or server.begun == [8, 9]
    for number in range(10, 10 + native.CANCELLED_MAX * 2):
        server.leave(number)
    assert len(server._cancelled) == native.CANCELLED_MAX


async def test_the_wait_counts_against_the_deadline(server: Server) -> None:
    """A call that waited has as much less time when it is begun."""
    left: dict[int, float | None] = {}

    def begin(_: Server, events: Sequence[Any]) -> None:
        left.update({event[1]: event[5][2] for event in events})

    pygrpc_native.aio.Server._on_events = begin  # type: ignore[method-assign, assignment]  # the fixture undoes it
    events = [
        (CALL, number, 0, b"", None, ((), "", seconds))
        for number, seconds in enumerate([2.0] * native.VERIFIES_IN_TURN + [2.0, None, 0.1])
    ]
    server._on_events(events)
    server.clock += 0.5
    await turn()
    first = native.VERIFIES_IN_TURN
    assert left[0] == 2.0
    assert left[first] == pytest.approx(1.5)
    assert left[first + 1] is None
    assert left[first + 2] == 0.0


async def test_verifies_alone_have_larger_turns(server: Server) -> None:
    """Where no other call has come for a while more verifies are begun in a turn."""
    server.clock += native.ALONE_SECONDS + 0.01
    server.come(VERIFY, range(200))
    assert len(server.begun) == native.VERIFIES_ALONE
    await turn()
    assert len(server.begun) == 2 * native.VERIFIES_ALONE
    server.come(CREATE, [1_000])
    await turn()
    assert len(server.begun) == 2 * native.VERIFIES_ALONE + native.VERIFIES_IN_TURN + 1


async def test_a_fault_holds_up_nobody_else(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the library raises when calls are begun, or fetched, is not the end of all turns."""
    begin = pygrpc_native.aio.Server._on_events

    def fail_once(*_: object) -> None:
        monkeypatch.setattr(pygrpc_native.aio.Server, "_on_events", begin)
        raise MemoryError

    monkeypatch.setattr(pygrpc_native.aio.Server, "_on_events", fail_once)
    with pytest.raises(MemoryError):
        server.come(VERIFY, [1])
    server.come(CREATE, [2])
    await turn()
    assert server.begun == [2]
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
    # All of them, also if nothing else comes.
    assert sorted(server.begun) == [2, *calls]


async def test_answers_are_out_before_it_ends(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's part, which ends with what it has not sent, is ended a moment after the last
    answer was given to it."""
    order: list[object] = []
    monkeypatch.setattr(native, "time", SimpleNamespace(sleep=order.append))
    monkeypatch.setattr(server.front, "close", lambda: order.append("closed"), raising=False)
    server.come(VERIFY, [1])
    await server.stop(1.0)
    assert order == [native.ANSWERS_OUT_SECONDS, "closed"]


class Stream:
    """Stands in for the context of a call that is answered with a stream."""

    def __init__(self) -> None:
        self.aborted: grpc.StatusCode | None = None

    async def abort(self, code: grpc.StatusCode, _details: str) -> None:
        self.aborted = code
        raise grpc.aio.AbortError


@pytest.mark.parametrize("end", [STREAM_SENT, STREAM_CLOSED])
async def test_a_message_waits_until_there_is_room(server: Server, end: int) -> None:
    """It is sent once when there is room for it, and it is told when its client has left."""
    ends = [STREAM_FULL, STREAM_FULL, end]
    sent: list[bytes] = []

    def try_send(_: int, data: bytes) -> int:
        sent.append(data)
        return ends[len(sent) - 1]

    server.front.stream_try_send = try_send  # type: ignore[attr-defined]
    assert await server._send(a_stream(), Stream(), b"told") is (end == STREAM_SENT)
    assert sent == [b"told"] * 3


async def test_a_stream_that_nobody_reads_is_ended(server: Server) -> None:
    """A message that finds no room for long ends its stream."""
    looked: list[float] = []

    def try_send(_: int, __: bytes) -> int:
        looked.append(server.clock)
        server.clock += native.UNREAD_SECONDS / 2
        return STREAM_FULL

    server.front.stream_try_send = try_send  # type: ignore[attr-defined]
    stream = Stream()
    with pytest.raises(grpc.aio.AbortError):
        await server._send(a_stream(), stream, b"told")
    assert (len(looked), stream.aborted) == (2, grpc.StatusCode.UNAVAILABLE)


def a_stream() -> Any:
    """A call that is answered with bytes as they are."""
    return SimpleNamespace(call_id=1, handler=SimpleNamespace(response_serializer=None))

"""What the `native` transport does with an event that it cannot handle."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pygrpc_native.aio
import pytest
from latchkey_service.transport import native, native_queues
from pygrpc_native import EVENT_CANCEL

from tests.unit.transport.fronts import CALL, CREATE, VERIFY, Server, turn

INTERNAL = grpc.StatusCode.INTERNAL.value[0]
BAD = 13
DETAILS = ((("authorization", "Bearer x"),), "ipv4:10.0.0.1:5", None)


def server_with_a_poor_screen() -> Server:
    def screen(metadata: Any) -> str:
        if ("bad", "") in metadata:
            raise ZeroDivisionError
        return "a"

    return Server(screen)


async def all_started(server: Server) -> list[int]:
    while server._in_turn:
        await turn()
    return sorted(server.started)


@pytest.mark.usefixtures("unstarted")
async def test_call_that_cannot_be_queued_is_answered_alone() -> None:
    """If one call of a batch cannot be queued, it is answered INTERNAL, and the others start."""
    server = server_with_a_poor_screen()
    server.come(VERIFY, range(native_queues.VERIFIES_IN_TURN), [("a", "")])
    bad = (CALL, 100, 0, b"", None, ((("bad", ""),), "", None))
    server._on_events([bad, (CALL, 101, 0, b"", None, DETAILS), (CALL, 102, 1, b"", None, DETAILS)])
    assert server.front.failed == [(100, INTERNAL)]
    assert server.rejected == [VERIFY]
    assert await all_started(server) == [*range(native_queues.VERIFIES_IN_TURN), 101, 102]


@pytest.mark.parametrize("bad", [0, 2, 4])
async def test_call_that_cannot_start_is_answered_alone(
    unstarted: None, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    """If the library fails to start one call of a turn, that one is answered, and the others
    start."""
    begin = pygrpc_native.aio.Server._on_events

    def fail_at_one(server: Server, events: Sequence[Any]) -> None:
        for event in events:
            if event[1] == bad:
                server._calls[bad] = event
                raise MemoryError
            begin(server, [event])

    monkeypatch.setattr(pygrpc_native.aio.Server, "_on_events", fail_at_one)
    server = Server()
    server.come(VERIFY, range(5))
    others = [number for number in range(5) if number != bad]
    assert server.started == others
    assert server.front.failed == [(bad, INTERNAL)]
    assert server._calls == {}
    server.come(CREATE, [9])
    assert await all_started(server) == [*others, 9]


async def test_library_that_takes_no_event_does_not_loop(
    unstarted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the library fails before it takes an event, each call is answered once."""

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pygrpc_native.aio.Server, "_on_events", fail)
    server = Server()
    server.come(VERIFY, range(3))
    assert server.front.failed == [(number, INTERNAL) for number in range(3)]


async def test_call_is_answered_although_its_rejection_fails(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call whose rejection cannot be reported gets a plain answer, and others are served."""
    faults: list[Any] = []
    monkeypatch.setattr(asyncio.get_running_loop(), "call_exception_handler", faults.append)
    answered: list[tuple[int, int]] = []

    def fail(call_id: int, code: int, _message: str, trailing_metadata: Any) -> None:
        assert trailing_metadata == []
        answered.append((call_id, code))

    def reject(*_: object, **__: object) -> Any:
        raise ZeroDivisionError

    server.front.fail = fail  # type: ignore[method-assign]
    server._reject_call = reject
    room = native_queues.BURST + native_queues.VERIFIES_IN_TURN
    server.come(VERIFY, range(room + 1))
    assert answered == [(room, INTERNAL)]
    assert len(faults) == 1
    assert len(await all_started(server)) == room


async def test_cancellation_that_fails_does_not_lose_calls(
    unstarted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation that cannot be handled is reported, and the calls behind it start."""
    faults: list[Any] = []
    monkeypatch.setattr(asyncio.get_running_loop(), "call_exception_handler", faults.append)
    begin = pygrpc_native.aio.Server._on_events

    def fail_to_cancel(server: Server, events: Sequence[Any]) -> None:
        for event in events:
            if event[0] == EVENT_CANCEL:
                raise MemoryError
            begin(server, [event])

    monkeypatch.setattr(pygrpc_native.aio.Server, "_on_events", fail_to_cancel)
    server = Server()
    server._on_events([(EVENT_CANCEL, BAD, 0, None, None, None), (CALL, 1, 0, b"", None, DETAILS)])
    assert server.started == [1]
    assert server.front.failed == []
    assert len(faults) == 1


async def test_fetching_continues_after_a_failure(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's thread fetches further events after a batch that it could not fetch."""
    monkeypatch.setattr(native, "DISPATCH_AGAIN_SECONDS", 0.0)
    outcomes: list[Any] = [MemoryError(), ZeroDivisionError(), None]

    def dispatch(_: object) -> None:
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    monkeypatch.setattr(pygrpc_native.aio.Server, "_dispatch", dispatch)
    server._dispatch()
    assert outcomes == []

"""How the `native` transport divides its queues: among callers, and between kinds of calls."""

from typing import Any

import grpc
import pytest
from latchkey_service.access.methods import METHODS
from latchkey_service.errors import Unauthenticated
from latchkey_service.fair_queue import SMALL_BYTES
from latchkey_service.transport import native, native_queues

from tests.helpers.waiting import eventually
from tests.unit.transport.fronts import (
    BATCH,
    CREATE,
    DELETE,
    HEALTH,
    VERIFY,
    Server,
    turn,
)

pytestmark = pytest.mark.usefixtures("unstarted")


def screened(metadata: Any) -> str:
    """Return the caller that the metadata name."""
    for key, value in metadata:
        if key == "authorization":
            return str(value)
    raise Unauthenticated("anonymous", "CALLER_ANONYMOUS")


def server() -> Server:
    return Server(screened)


def by(name: str) -> list[tuple[str, str]]:
    return [("authorization", name)]


async def test_anonymous_calls_take_no_place() -> None:
    """However many anonymous verifies arrive, those of a known caller are accepted and start in the
    next turn. Every anonymous one is refused."""
    one = server()
    one.come(VERIFY, range(native_queues.VERIFIES_IN_TURN), by("a"))
    one.come(VERIFY, range(1_000, 1_000 + 2 * native_queues.BURST))
    one.come(VERIFY, [1], by("a"))
    assert len(one.front.failed) == 2 * native_queues.BURST
    await turn()
    assert one.started[-1] == 1


@pytest.mark.parametrize("path", [VERIFY, BATCH, CREATE])
async def test_large_anonymous_calls_reach_no_handler(path: str) -> None:
    """A handler would keep the request until its answer, which may be delayed by half a minute. So
    a large one is refused first, even without load. That of a known caller starts."""
    one = server()
    data = bytes(SMALL_BYTES + 1)
    one.come(path, [1], data=data)
    assert one.started == []
    assert one.front.failed == [(1, grpc.StatusCode.UNAUTHENTICATED.value[0])]
    one.come(path, [2], by("a"), data)
    assert one.started == [2]


async def test_a_full_queue_is_shared() -> None:
    """A caller whose calls fill a queue loses its newest ones to another caller, up to an equal
    share."""
    one = server()
    one.come(CREATE, range(native_queues.BURST + native_queues.OTHERS_IN_TURN), by("flood"))
    assert one.rejected == []
    one.come(CREATE, range(-20, 0), by("other"))
    # The first ones take the places of those that have started.
    assert one.rejected == [CREATE] * (20 - native_queues.OTHERS_IN_TURN)
    await turn()
    await turn()
    await turn()
    assert len([number for number in one.started if number < 0]) >= 3


async def test_delayed_rejections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a limited number of rejections waits for its time. Further ones go out at once."""
    monkeypatch.setattr(native, "DELAYED_MAX", 3)
    one = server()
    one.delay_seconds = 0.01
    one.come(VERIFY, range(native_queues.VERIFIES_IN_TURN), by("a"))
    one.come(VERIFY, range(100, 105))
    assert [number for number, _ in one.front.failed] == [103, 104]
    await eventually(lambda: len(one.front.failed) == 5, "all are rejected")
    assert one._delayed == {}


async def test_rejections_of_clients_that_left_are_dropped() -> None:
    """If a client leaves before its delayed rejection is due, the rejection is dropped and takes no
    more memory.
    """
    one = server()
    one.delay_seconds = 30.0
    one.come(VERIFY, range(native_queues.VERIFIES_IN_TURN), by("a"))
    one.come(VERIFY, range(100, 103))
    timers = list(one._delayed.values())
    assert len(timers) == 3
    one.leave(101)
    assert [timer.cancelled() for timer in timers] == [False, True, False]
    assert set(one._delayed) == {100, 102}
    assert not one._cancelled
    for timer in timers:
        timer.cancel()


async def test_removals_go_first() -> None:
    """A Delete starts in the next turn, however many Creates of the same caller wait."""
    one = server()
    one.come(CREATE, range(2 * native_queues.BURST), by("a"))
    assert one.rejected
    one.come(DELETE, [-1], by("a"))
    await turn()
    assert -1 in one.started


async def test_large_requests_do_not_wait_whole() -> None:
    """A queued request is cut after one byte more than its method accepts."""
    one = server()
    one.come(VERIFY, range(native_queues.VERIFIES_IN_TURN), by("a"))
    large = METHODS[VERIFY].bytes_max + 1
    one.come(VERIFY, [1], by("a"), bytes(1024 * 1024))
    ((_, event),) = one._queues.verifies.waiting.take(2)
    assert len(event[3]) == large


async def test_the_bytes_of_a_queue_are_bounded() -> None:
    """Large requests fill a queue before it has as many calls as it may."""
    one = server()
    data = bytes(METHODS[BATCH].bytes_max)
    fit = native_queues.QUEUED_BYTES_MAX // len(data)
    one.come(BATCH, range(fit + 5), by("a"), data)
    assert len(one.rejected) == 5


async def test_health_checks_are_bounded() -> None:
    """A flood of health checks waits in a queue like others, and is rejected when that is full."""
    one = server()
    one.come(HEALTH, range(3 * native_queues.BURST))
    assert len(one.started) == native_queues.OPEN_IN_TURN
    assert one.rejected
    one.come(VERIFY, [-1], by("a"))
    await turn()
    assert -1 in one.started


def test_every_method_has_a_queue() -> None:
    """Only the methods that need no identity share the queue of health checks."""
    one = server()
    for path, rule in METHODS.items():
        assert (one._queues.of(path) is one._queues.open) == (rule.role is None), path

"""When the rows that a Delete reads prove anything."""

import asyncio
import math
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from latchkey_coherence.lease import boottime
from latchkey_service.coherence import ack_waiter
from latchkey_service.coherence.ack_rules import (
    PAUSE_SECONDS_MAX,
    Acknowledgements,
    VerifierRow,
)
from latchkey_service.coherence.ack_waiter import AckWaiter
from latchkey_service.coherence.rows import RowId
from latchkey_service.coherence.verifier_table import Rows
from latchkey_service.errors import NotConfirmed
from latchkey_service.postgres.connections import REST_SECONDS

from tests.helpers.positions import at
from tests.helpers.waiting import eventually

OWN = "ver_own"


class Scene:
    """A ack_waiter on a database whose rows a test chooses."""

    def __init__(self) -> None:
        self.rows: list[VerifierRow] = []
        self.looks_at_own_history = math.inf
        self.looks = 0
        self.now = 100.0
        self.closed = 0
        self.rows_complete_at = -math.inf
        self.own_row: RowId | None = RowId(OWN, 1)
        unused: Any = SimpleNamespace()
        self.ack_waiter = AckWaiter(
            unused,
            self._connect,
            lambda: None,
            lambda: self.now,
            lambda: self.rows_complete_at,
            lambda: self.own_row,
            notify=False,
        )

    async def _connect(self) -> Any:
        def terminate() -> None:
            self.closed += 1

        return SimpleNamespace(is_closed=lambda: False, terminate=terminate, used_at=boottime())

    async def read_rows(self, _connection: object, positions: set[Any]) -> Rows:
        self.looks += 1
        own_history = self.looks <= self.looks_at_own_history
        return Rows(frozenset(positions if own_history else ()), self.rows)

    async def looked(self) -> None:
        """Wait for two more polls: the first one may be in progress."""
        seen = self.looks
        await eventually(lambda: self.looks >= seen + 2, "the rows were read")


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    scene = Scene()
    monkeypatch.setattr(ack_waiter, "read_rows", scene.read_rows)
    yield scene
    await scene.ack_waiter.close()


async def test_a_database_without_this_row_confirms_nothing(scene: Scene) -> None:
    """A restored backup may lack this process's row, and with it those of others that still hold
    a lease. Nothing is confirmed before this process has registered there."""
    waiting = asyncio.create_task(scene.ack_waiter.wait(at(5), math.inf))
    await scene.looked()
    scene.rows = [VerifierRow("ver_other", 1, 1, 5, 3.0)]
    await scene.looked()
    assert not waiting.done()
    scene.rows = [*scene.rows, VerifierRow(OWN, 1, 1, 5, 3.0)]
    assert await waiting == Acknowledgements(2, 0)


async def test_nothing_is_confirmed_before_the_rows_are_complete(scene: Scene) -> None:
    """After a change of history the rows count only once earlier leases have ended."""
    scene.rows, scene.rows_complete_at = [VerifierRow(OWN, 1, 1, 5, 3.0)], 100.5
    waiting = asyncio.create_task(scene.ack_waiter.wait(at(5), math.inf))
    await scene.looked()
    assert not waiting.done()
    scene.rows_complete_at = 100.0
    assert await waiting == Acknowledgements(1, 0)


async def test_looks_at_another_history_come_ever_less_often(scene: Scene) -> None:
    """A deposed primary says nothing about a deletion, so the number of verifiers that had
    acknowledged before does not shorten the pauses until the next look. Each look opens a
    connection."""
    scene.rows = [VerifierRow(OWN, 1, 1, 5, 3.0), VerifierRow("ver_other", 1, 1, 4, 3.0)]
    scene.looks_at_own_history = 1
    waiting = asyncio.create_task(scene.ack_waiter.wait(at(5), math.inf))
    await eventually(
        lambda: scene.ack_waiter._pause_seconds == PAUSE_SECONDS_MAX, "the pauses are long"
    )
    waiting.cancel()


async def test_the_wait_is_measured_by_its_result(scene: Scene) -> None:
    """A Delete counts as acknowledged, as outwaited, or as unconfirmed, with its duration."""
    seconds = scene.ack_waiter.seconds
    scene.rows = [VerifierRow(OWN, 1, 1, 5, 3.0)]
    await scene.ack_waiter.wait(at(5), math.inf)
    assert sum(seconds[ack_waiter.ACKNOWLEDGED].counts) == 1
    with pytest.raises(NotConfirmed):
        await scene.ack_waiter.wait(at(6), 100.05)
    assert sum(seconds[ack_waiter.UNCONFIRMED].counts) == 1
    waiting = asyncio.create_task(scene.ack_waiter.wait(at(7), math.inf))
    await scene.looked()
    assert len(scene.ack_waiter) == 1
    scene.rows = [VerifierRow(OWN, 1, 1, 7, 3.0, clients_outwaited=1)]
    await waiting
    assert sum(seconds[ack_waiter.OUTWAITED].counts) == 1


async def test_an_idle_connection_is_closed(scene: Scene) -> None:
    """A worker that has confirmed a Delete gives its connection back later, and not while another
    Delete waits.
    """
    scene.rows = [VerifierRow(OWN, 1, 1, 5, 3.0)]
    await scene.ack_waiter.wait(at(5), math.inf)
    await eventually(lambda: scene.ack_waiter._poller is None, "the poller has ended")
    scene.ack_waiter.rest()
    assert scene.closed == 0
    waiting = asyncio.create_task(scene.ack_waiter.wait(at(6), math.inf))
    await scene.looked()
    scene.now = boottime() + REST_SECONDS + 1.0
    scene.ack_waiter.rest()
    assert scene.closed == 0
    scene.rows = [VerifierRow(OWN, 1, 1, 6, 3.0)]
    await waiting
    await eventually(lambda: scene.ack_waiter._poller is None, "the poller has ended")
    scene.ack_waiter.rest()
    assert scene.closed == 1

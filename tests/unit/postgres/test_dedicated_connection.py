"""`DedicatedConnection`: when it keeps, tests and replaces its connection."""

from typing import Any

import pytest
from latchkey_coherence.lease import boottime
from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres.connections import IDLE_SECONDS, DedicatedConnection


class FakeConnection:
    """A connection that can end, and that can have been idle for long."""

    def __init__(self) -> None:
        self.ended = self.broken = False
        self.used_at = boottime()

    def is_closed(self) -> bool:
        return self.ended

    def terminate(self) -> None:
        self.ended = True

    async def execute(self, *_: object, timeout: float) -> None:  # noqa: ASYNC109 - asyncpg's
        if self.broken:
            raise TimeoutError


@pytest.fixture
def made() -> list[FakeConnection]:
    """The connections that were made, oldest first."""
    return []


@pytest.fixture
def dedicated(made: list[FakeConnection]) -> DedicatedConnection:
    """A dedicated connection that is not made yet."""

    async def connect() -> Any:
        made.append(FakeConnection())
        return made[-1]

    return DedicatedConnection(connect)


async def test_it_is_made_once(dedicated: DedicatedConnection, made: list[FakeConnection]) -> None:
    """The first use makes the connection, and later uses get the same one."""
    assert not made
    first = await dedicated.get()
    assert await dedicated.get() is first
    assert dedicated.current is first
    assert len(made) == 1


async def test_it_is_replaced(dedicated: DedicatedConnection, made: list[FakeConnection]) -> None:
    """A connection that has ended, was dropped, or no longer answers after a long pause is
    terminated and replaced."""
    await dedicated.get()
    made[0].ended = True
    await dedicated.get()
    dedicated.drop()
    await dedicated.get()
    assert [connection.ended for connection in made] == [True, True, False]
    made[2].used_at, made[2].broken = -2 * IDLE_SECONDS, True
    await dedicated.get()
    assert [connection.ended for connection in made] == [True, True, True, False]


async def test_a_failure_to_connect_leaves_nothing_behind() -> None:
    """The error reaches the caller, and the next use tries again."""
    failures = [StoreUnavailable("away")]

    async def connect() -> Any:
        if failures:
            raise failures.pop()
        return FakeConnection()

    dedicated = DedicatedConnection(connect)
    with pytest.raises(StoreUnavailable):
        await dedicated.get()
    assert dedicated.current is None
    dedicated.drop()
    assert await dedicated.get() is dedicated.current

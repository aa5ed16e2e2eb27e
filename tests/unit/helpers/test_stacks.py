"""A hung test is reported with the line that waits."""

import asyncio
from collections.abc import AsyncIterator

from tests.helpers.stacks import task_stacks


async def _outer(gate: asyncio.Event) -> None:
    async for _ in _generator(gate):
        pass


async def _generator(gate: asyncio.Event) -> AsyncIterator[None]:
    await _inner(gate)
    yield


async def _inner(gate: asyncio.Event) -> None:
    await gate.wait()


async def test_a_suspended_task_shows_every_await() -> None:
    """The stack of a task that waits names each coroutine and generator down to the wait, and a
    finished task is not listed."""
    gate = asyncio.Event()
    task = asyncio.create_task(_outer(gate), name="hung")
    await asyncio.sleep(0)
    (stack,) = [part for part in task_stacks().split("Task ") if part.startswith("hung\n")]
    assert [line.strip() for line in stack.splitlines() if not line.startswith("  File")][1:4] == [
        "async for _ in _generator(gate):",
        "await _inner(gate)",
        "await gate.wait()",
    ]
    gate.set()
    await task
    assert "Task hung\n" not in task_stacks()

"""Runs one task for copies of a request that arrive together, as by a double click."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

__all__ = ["Once"]

T = TypeVar("T")


class Once(Generic[T]):
    """The running tasks, by key. Belongs to one event loop."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[T]] = {}

    async def run(self, key: str, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the task that runs under `key`, or of a new one.

        The task continues when the caller is cancelled: a browser that disconnects does not leave
        a change half done.
        """
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(start())
            task.add_done_callback(lambda _: self._tasks.pop(key))
        return await asyncio.shield(task)

"""An open loop: calls start at a fixed rate, whether or not earlier ones were answered, as users'
calls do."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tests.helpers.calls import Outcome, outcome

__all__ = ["Call", "OpenLoop"]


@dataclass(frozen=True)
class Call:
    """A call of the open loop: its start on the test's clock, and its outcome."""

    kind: str
    began: float
    end: Outcome


class OpenLoop:
    """Calls at fixed rates, each in a separate task."""

    def __init__(self, ask: Callable[[str], Awaitable[Any]], rates: dict[str, int]) -> None:
        self.calls: list[Call] = []
        self.under_way = 0
        self._ask = ask
        self._rates = rates
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Make calls during the block. All of them have ended when it ends."""
        loops = [asyncio.create_task(self._keep_asking(*each)) for each in self._rates.items()]
        try:
            yield
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            await asyncio.gather(*self._tasks)

    async def _keep_asking(self, kind: str, rate: int) -> None:
        for number in itertools.count():
            if number == 0:
                began = time.monotonic()
            # If the loop is late it catches up, to keep the rate.
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            task = asyncio.create_task(self._one(kind))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _one(self, kind: str) -> None:
        began = time.monotonic()
        self.under_way += 1
        end = await outcome(self._ask(kind))
        self.under_way -= 1
        self.calls.append(Call(kind, began, end))

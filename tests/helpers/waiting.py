"""Bounded waits for a condition."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

import grpc

__all__ = ["POLL_SECONDS", "RESUME_SECONDS", "WAIT_SECONDS", "eventually"]

# Far longer than any step here takes; only a failing test waits this long.
WAIT_SECONDS = 20.0
POLL_SECONDS = 0.02
# The service works again within this time after Postgres' return: the guarantee, plus a margin for
# a busy machine.
RESUME_SECONDS = 2.0 + 0.7


async def eventually(
    check: Callable[[], Any],
    what: str,
    within: float = WAIT_SECONDS,
    pause: float = POLL_SECONDS,
) -> Any:
    """Call `check` until it returns a true value, and return that. Wait `pause` between calls.

    A failed assertion and a failed call in it count as "not yet".
    """
    give_up = time.monotonic() + within
    while True:
        last: object
        try:
            last = check()
            if inspect.isawaitable(last):
                last = await last
            if last:
                return last
        except (AssertionError, grpc.aio.AioRpcError) as error:
            last = error
        assert time.monotonic() < give_up, f"not within {within} s: {what}; at last: {last!r}"
        await asyncio.sleep(pause)

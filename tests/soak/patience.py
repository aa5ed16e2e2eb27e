"""Repeats a call that the service refuses because of load, as docs/errors.md asks of callers."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2

__all__ = ["patiently"]

T = TypeVar("T")

BUSY = frozenset({"OVERLOADED", "DATABASE_UNAVAILABLE", "UNAVAILABLE"})


async def patiently(
    call: Callable[[float], Awaitable[T]], seconds: float, refused: Counter[str], kind: str
) -> T:
    """Return the answer of `call(seconds left)`, and count its failures by `kind` and reason.

    Repeats what the service asks to repeat, because of its load or that of the database: on a busy
    machine, the disk may take seconds for a commit. A soak looks for growth and wrong answers. It
    continues until `seconds` have passed, as `latchkey import` does for longer: the library's five
    attempts may not outlast a busy machine.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return await call(max(0.0, end - time.monotonic()))
        except grpc.aio.AioRpcError as error:
            asked = request_of(error)
            if asked is None:
                raise
            reason, pause = asked
            refused[f"{kind}, {reason}"] += 1
            if time.monotonic() + pause >= end:
                raise
        await asyncio.sleep(pause)


def request_of(error: grpc.aio.AioRpcError) -> tuple[str, float] | None:
    """Return the reason of a failure and the delay before another attempt, if the service asks for
    one."""
    info, retry, asked = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), False
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                detail.Unpack(info)
                asked |= detail.Unpack(retry)
    if not asked or info.reason not in BUSY:
        return None
    return info.reason, retry.retry_delay.ToTimedelta().total_seconds()

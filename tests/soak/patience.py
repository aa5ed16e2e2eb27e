"""Repeats a call that the service refuses because of load, as docs/errors.md asks of callers."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2

__all__ = ["ATTEMPTS_MAX", "patiently"]

T = TypeVar("T")

# As many as the client library makes.
ATTEMPTS_MAX = 5


async def patiently(
    call: Callable[[float], Awaitable[T]], seconds: float, refused: Counter[str], kind: str
) -> T:
    """Return the answer of `call(seconds left)`, and count its refusals under `kind`.

    Only OVERLOADED is repeated: nothing was done, and the service says when to return. No part of
    a soak makes the database unavailable, so DATABASE_UNAVAILABLE would be a wrong reason.
    """
    end = time.monotonic() + seconds
    for attempt in range(1, ATTEMPTS_MAX + 1):
        try:
            return await call(max(0.0, end - time.monotonic()))
        except grpc.aio.AioRpcError as error:
            pause = pause_seconds(error)
            if pause is None:
                raise
            refused[kind] += 1
            if attempt == ATTEMPTS_MAX or time.monotonic() + pause >= end:
                raise
        await asyncio.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def pause_seconds(error: grpc.aio.AioRpcError) -> float | None:
    """Return the delay of RetryInfo if the service was overloaded, otherwise None."""
    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        return None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                detail.Unpack(info)
                detail.Unpack(retry)
    if info.reason != "OVERLOADED":
        return None
    return retry.retry_delay.ToTimedelta().total_seconds()

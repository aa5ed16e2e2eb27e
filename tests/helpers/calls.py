"""What a call gave its caller, and channels that reconnect at once."""

import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.helpers.waiting import WAIT_SECONDS

__all__ = ["CHANNEL_OPTIONS", "Outcome", "is_serving", "outcome", "server_only_deadline"]

# A separate channel for each test, which reconnects at once, because the tests measure the server.
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # Despite its name this limits how long a connection attempt may take.
    ("grpc.min_reconnect_backoff_ms", round(WAIT_SECONDS * 1000)),
    ("grpc.max_reconnect_backoff_ms", 100),
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a call for its caller."""

    code: grpc.StatusCode
    seconds: float
    response: Any = None
    details: tuple[Any, ...] = ()

    @property
    def ok(self) -> bool:
        return self.code is grpc.StatusCode.OK

    @property
    def retry_info(self) -> bool:
        return any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in self.details)


async def outcome(call: Awaitable[Any]) -> Outcome:
    """Wait for a call and return its outcome."""
    start = time.monotonic()
    try:
        response = await call
    except grpc.aio.AioRpcError as error:
        packed = [v for k, v in error.trailing_metadata() or () if k == "grpc-status-details-bin"]
        status = status_pb2.Status.FromString(packed[0] if packed else b"")
        return Outcome(error.code(), time.monotonic() - start, None, tuple(status.details))
    return Outcome(grpc.StatusCode.OK, time.monotonic() - start, response)


def server_only_deadline(timeout: float | None) -> dict[str, Any]:
    """Send the server a deadline that this side does not enforce, because the test checks whether
    the server answers by then, and not whether a busy caller notices in time."""
    if timeout is None:
        return {}
    return {"metadata": (("grpc-timeout", f"{round(timeout * 1000)}m"),)}


async def is_serving(channel: grpc.aio.Channel) -> bool:
    """Return whether the health service reports SERVING. Raises AioRpcError if it does not
    answer."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

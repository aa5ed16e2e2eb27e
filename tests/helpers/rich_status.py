"""Parses the rich status of a rejected call, as a client would."""

import math
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True)
class Refusal:
    """The error details that a caller receives."""

    code: grpc.StatusCode
    message: str
    reason: str
    fields: list[str]
    retry_seconds: float | None
    request_id: str
    text: str


async def refusal(call: Awaitable[Any]) -> Refusal:
    """Await a call that must be rejected, and check the details that every rejection carries."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    metadata = dict(tuple(error.trailing_metadata() or ()))
    raw = metadata.get("grpc-status-details-bin")
    assert isinstance(raw, bytes), f"no details: {error.code()} {error.details()}"
    status = status_pb2.Status.FromString(raw)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    bad, request = error_details_pb2.BadRequest(), error_details_pb2.RequestInfo()
    found = set()
    for detail in status.details:
        for message in (info, retry, bad, request):
            if detail.Unpack(message):
                found.add(type(message))
    assert error_details_pb2.ErrorInfo in found
    assert info.domain == "latchkey"
    assert info.reason == info.reason.upper() != ""
    assert request.request_id
    has_retry = error_details_pb2.RetryInfo in found
    transient = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert has_retry == (error.code() in transient)
    # gRPC's own retries read the same delay here, in whole milliseconds. `native` cannot send it.
    delay_ms = math.ceil(retry.retry_delay.ToNanoseconds() / 1e6)
    assert metadata.get("grpc-retry-pushback-ms") in (None, *([str(delay_ms)] * has_retry))
    is_bad = error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error_details_pb2.BadRequest in found) == is_bad
    return Refusal(
        error.code(),
        error.details() or "",
        info.reason,
        [violation.field for violation in bad.field_violations],
        retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None,
        request.request_id,
        str(status) + str(metadata),
    )

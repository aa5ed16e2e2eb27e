"""The id under which the service logs a call, in every answer."""

from __future__ import annotations

import re
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.rich_status import refusal

TOKENS = "/latchkey.v1.TokenService/"
SUCCESSFUL = {
    TOKENS + "Verify": pb.VerifyRequest(secret="x"),
    TOKENS + "BatchVerify": pb.BatchVerifyRequest(requests=[pb.VerifyRequest(secret="x")]),
    TOKENS + "List": pb.ListRequest(account_id="acme"),
    TOKENS + "Create": pb.CreateRequest(account_id="acme", name="id", scope=pb.SCOPE_READ),
    "/latchkey.v1.StatusService/GetStatus": status_pb.GetStatusRequest(),
    "/grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest(),
}


async def id_of(channel: grpc.aio.Channel, path: str, sent: str | None) -> str:
    """Make a successful call, and return the id that came with the answer."""
    metadata = () if sent is None else (("x-request-id", sent),)
    method: Any = channel.unary_unary(path)
    call = method(SUCCESSFUL[path].SerializeToString(), metadata=metadata, timeout=10)
    await call
    ids = [value for key, value in await call.trailing_metadata() if key == "x-request-id"]
    assert len(ids) == 1, path
    return str(ids[0])


@pytest.mark.parametrize("path", SUCCESSFUL)
async def test_successful_answers_carry_an_id(channel: grpc.aio.Channel, path: str) -> None:
    """It is the caller's own id if that is well-formed, and otherwise one that no other call
    has."""
    if path == TOKENS + "Create":
        assert await id_of(channel, path, "abc-123") == "abc-123"
        return
    assert await id_of(channel, path, "abc-123") == "abc-123"
    made = {await id_of(channel, path, sent) for sent in (None, None, "x" * 65, "<script>")}
    assert len(made) == 4
    assert all(re.fullmatch(r"[0-9a-f]{12}-\d+", each) for each in made)


@pytest.mark.parametrize("path", [TOKENS + "Verify", TOKENS + "Get"])
async def test_refusals_carry_the_id_as_metadata_too(channel: grpc.aio.Channel, path: str) -> None:
    """The metadata has the same id as the details of the error."""
    method: Any = channel.unary_unary(path)
    call = method(b"\xff", timeout=10)
    error = await refusal(call)
    assert dict(tuple(await call.trailing_metadata()))["x-request-id"] == error.request_id

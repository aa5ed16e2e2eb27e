"""What the native transport keeps of calls."""

import asyncio
import contextlib

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.config import Settings
from latchkey_service.native import Server

from tests.conftest import serving_as
from tests.support import eventually

CALLS = 300


@pytest.mark.parametrize("transport", ["native"])
async def test_calls_that_are_cancelled_at_once_leave_nothing(settings: Settings) -> None:
    """A client that cancels its calls as soon as they are sent leaves none of them behind."""
    async with (
        serving_as(settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        (native,) = server._servers
        assert isinstance(native, Server)
        stub = pb_grpc.TokenServiceStub(channel)
        await stub.Verify(pb.VerifyRequest(secret=""), timeout=5)
        for number in range(CALLS):
            call = stub.List(pb.ListRequest(account_id="acme"))
            await asyncio.sleep(0.0002 * (number % 10))
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await call
        await eventually(lambda: not native._calls, "all calls are forgotten", 5.0)
        assert (await stub.Verify(pb.VerifyRequest(secret=""), timeout=5)).verdict

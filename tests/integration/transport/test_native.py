"""What the native transport keeps in memory for each call."""

import asyncio
import contextlib
import time
from pathlib import Path

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.settings.settings import Settings
from latchkey_service.transport.native import Server

from tests.helpers import raw_http2 as http2
from tests.helpers.callers import policy_text
from tests.helpers.servers import serving_as
from tests.helpers.waiting import eventually

CALLS = 300
# More than the number of threads, on any machine.
WATCHES = 64


@pytest.mark.parametrize("transport", ["native"])
async def test_calls_that_are_cancelled_at_once_leave_nothing(settings: Settings) -> None:
    """A client that cancels its calls right after sending them leaves nothing behind for any of
    them."""
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


@pytest.mark.parametrize("transport", ["native"])
async def test_unread_streams_block_nothing(settings: Settings, tmp_path: Path) -> None:
    """However many health watches a client opens without reading them (health requires no
    identity), a removed permission takes effect at once, and the server stops within its grace
    period."""
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text())
    settings = settings.model_copy(update={"policy": policy, "grace_seconds": 0.5})
    async with contextlib.AsyncExitStack() as stack:
        async with serving_as(settings) as server:
            raw = await stack.enter_async_context(http2.connected(server.address))
            await raw.open({http2.INITIAL_WINDOW_SIZE: 0})
            for _ in range(WATCHES):
                raw.call("/grpc.health.v1.Health/Watch", b"")
            (native,) = server._servers
            assert isinstance(native, Server)
            await eventually(lambda: len(native._calls) == WATCHES, "all of them are there")
            # More changes than the library buffers messages.
            for number in range(10):
                server.set_serving(bool(number % 2))
                await asyncio.sleep(0.01)
            async with asyncio.timeout(5):
                await asyncio.to_thread(str)
                await server.replace_policy(policy_text(["operator"]))
            began = time.monotonic()
        # Otherwise the stop would wait for as long as the client likes.
        assert time.monotonic() - began < 10

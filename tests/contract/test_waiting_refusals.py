"""Calls without an identity that wait for their refusal, on each path through the service."""

import asyncio
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.rpc import refused_calls
from latchkey_service.settings.settings import Settings

from tests.helpers.callers import credential, policy_text
from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.servers import serving_as
from tests.helpers.waiting import eventually

CALLS: dict[str, Callable[[Any], Any]] = {
    "Verify": lambda stub: stub.Verify(pb.VerifyRequest(secret="x"), timeout=30),
    "Get": lambda stub: stub.Get(pb.GetRequest(account_id="acme", id="x"), timeout=30),
    "Watch": lambda stub: stub.Watch(timeout=30).read(),
}
OPEN_MAX = 3


@pytest.mark.parametrize("method", CALLS)
async def test_waiting_refusals_are_bounded(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """However slowly anonymous calls arrive, only a limited number of them waits. Calls that end
    make room."""
    monkeypatch.setattr(refused_calls, "OPEN_MAX", OPEN_MAX)
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text())
    async with (
        serving_as(settings.model_copy(update={"policy": policy})) as server,
        grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel,
    ):
        refused = server.refused
        # Every refusal waits as long as any may.
        refused._pacer._due = math.inf
        monkeypatch.setattr(refused, "end_connection", lambda _peer: False)
        stub: Any = pb_grpc.TokenServiceStub(channel)
        waiting = []
        for number in range(OPEN_MAX):
            waiting.append(asyncio.ensure_future(CALLS[method](stub)))
            await eventually(partial(_is_open, refused, number + 1), "the call waits")
        with pytest.raises(grpc.aio.AioRpcError) as further:
            await CALLS[method](stub)
        assert further.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert refused.excess == 1
        assert not any(call.done() for call in waiting)
        for call in waiting:
            call.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await eventually(partial(_is_open, refused, 0), "all have left")


def _is_open(refused: refused_calls.RefusedCalls, count: int) -> bool:
    return refused.open == count


async def test_an_address_above_its_limit_loses_connections(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard ends the connection of an anonymous call that is one too many, on both transports.
    A known caller on another connection is answered."""
    monkeypatch.setattr(refused_calls, "OPEN_PER_ADDRESS_MAX", OPEN_MAX)
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text())
    async with (
        serving_as(settings.model_copy(update={"policy": policy})) as server,
        grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as first,
        grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as second,
    ):
        refused = server.refused
        refused._pacer._due = math.inf
        stub: Any = pb_grpc.TokenServiceStub(first)
        waiting = []
        for number in range(OPEN_MAX):
            waiting.append(asyncio.ensure_future(CALLS["Verify"](stub)))
            await eventually(partial(_is_open, refused, number + 1), "the call waits")
        with pytest.raises(grpc.aio.AioRpcError) as further:
            await CALLS["Verify"](stub)
        assert further.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.guard.ended == {"refused": 1}
        await asyncio.gather(*waiting, return_exceptions=True)
        await eventually(partial(_is_open, refused, 0), "its other calls have ended")
        metadata = (("authorization", f"Bearer {credential('verifier')}"),)
        known: Any = pb_grpc.TokenServiceStub(second)
        await known.Verify(pb.VerifyRequest(secret="x"), timeout=5, metadata=metadata)

"""Connections that needlessly occupy a place in Envoy, with the documented configuration."""

import asyncio
import time
from pathlib import Path

import grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers import raw_http2 as http2
from tests.helpers.raw_http2 import connected
from tests.helpers.waiting import WAIT_SECONDS
from tests.integration.transport.test_envoy import (
    CONFIGURATION,
    channel_to,
    envoy_before_latchkey,
    in_its_place,
    tls_of,
)

IDLE_SECONDS, HEALTH_SECONDS, DRAIN_SECONDS = 1, 3, 1


async def test_idle_connections_end(
    postgres_url: str, template_url: str, pepper_file: Path, scratch: Path, tmp_path: Path
) -> None:
    """Envoy ends a connection on which HTTP/2 never begins, or on which there is no call. It ends a
    health Watch some time, which would keep a connection. A Watch stays open."""
    text = in_its_place(CONFIGURATION, "{ idle_timeout: 60s,", f"{{ idle_timeout: {IDLE_SECONDS}s,")
    text = in_its_place(
        text, "max_stream_duration: 660s", f"max_stream_duration: {HEALTH_SECONDS}s"
    )
    text = in_its_place(text, "drain_timeout: 30s", f"drain_timeout: {DRAIN_SECONDS}s")
    async with envoy_before_latchkey(postgres_url, pepper_file, scratch, "idle", text) as (
        target,
        _,
    ):
        context = tls_of("verifier", tmp_path)
        began = time.monotonic()
        async with (
            channel_to(target, "verifier") as channel,
            connected(target, tls=context) as silent,
            connected(target, tls=context) as idle,
            connected(target, tls=context) as watching,
        ):
            stream = pb_grpc.TokenServiceStub(channel).Watch(timeout=WAIT_SECONDS)
            await stream.write(pb.WatchRequest(number=1))
            assert await stream.read() is not grpc.aio.EOF
            await idle.open()
            await watching.open()
            health = watching.begin(http2.headers("/grpc.health.v1.Health/Watch"))
            watching.send(http2.DATA, http2.END_STREAM, health, http2.message(b""))
            await watching.until(http2.DATA, health)
            assert await silent.closed() == []
            assert any(frame.kind == http2.GOAWAY for frame in await idle.closed())
            ends = [frame for frame in await watching.closed() if frame.stream == health]
            assert ends
            assert time.monotonic() - began >= HEALTH_SECONDS
            await asyncio.sleep(max(0.0, began + 2 * HEALTH_SECONDS - time.monotonic()))
            await stream.write(pb.WatchRequest(number=2))
            assert not stream.done()

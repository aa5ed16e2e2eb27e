"""A flood of anonymous calls fills no worker of the service, started as users start it."""

import asyncio
import contextlib
import ssl
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers import raw_http2 as http2
from tests.helpers.callers import ca_pem, credential
from tests.helpers.calls import CHANNEL_OPTIONS, is_serving
from tests.helpers.service_process import PYTHON, Service
from tests.helpers.waiting import eventually
from tests.integration.rpc.tls_service import tls_service

pytestmark = pytest.mark.slow("fills the memory of a worker")

# An idle worker uses 80 MiB. Each open call takes 17 kB: the flood would need 250 MiB more.
MEMORY_MIB = 320
CONNECTIONS, CALLS = 150, 100
# Far longer than the guard needs, on a machine that is busy with the flood.
ENDED_SECONDS_MAX = 60.0


async def test_anonymous_calls_end_their_connections_and_not_the_worker(
    folder: Path, database_url: str
) -> None:
    """When anonymous calls use much of a worker's memory, their connections end. The worker
    survives, and a caller with a credential keeps its connection and is answered on it."""
    limited: dict[str, object] = {"memory_mib": MEMORY_MIB, "grace_seconds": 0.5}
    with tls_service(folder, database_url, *PYTHON, **limited) as (running, target):
        await running.welcome()
        workers = running.worker_pids
        credentials = grpc.ssl_channel_credentials(ca_pem())
        async with grpc.aio.secure_channel(target, credentials, options=CHANNEL_OPTIONS) as channel:
            await eventually(partial(is_serving, channel), "health is up")
            stub: Any = pb_grpc.TokenServiceStub(channel)

            async def verified() -> None:
                answer = await stub.Verify(
                    pb.VerifyRequest(secret="x"),
                    timeout=ENDED_SECONDS_MAX,
                    metadata=(("authorization", f"Bearer {credential('verifier')}"),),
                )
                assert answer.verdict == pb.VERDICT_MALFORMED

            await verified()
            context = ssl.create_default_context(cadata=ca_pem().decode())
            context.set_alpn_protocols(["h2"])
            host, _, port = target.rpartition(":")
            burst = http2.PREFACE + http2.Frame(http2.SETTINGS, 0, 0).encoded()
            for stream in range(1, 2 * CALLS, 2):
                block = http2.headers("/unknown/Method")
                frame = http2.Frame(http2.HEADERS, http2.END_HEADERS, stream, block)
                burst += frame.encoded()
            flood: list[asyncio.StreamWriter] = []
            try:
                for _ in range(CONNECTIONS):
                    if ended(running):
                        break
                    # The guard may end it in the middle of its handshake.
                    with contextlib.suppress(OSError):
                        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
                        flood.append(writer)
                        writer.write(burst)
                        await writer.drain()
                await eventually(partial(ended, running), "connections end", ENDED_SECONDS_MAX)
                await verified()
            finally:
                for writer in flood:
                    writer.transport.abort()
        assert running.worker_pids == workers, running.err


def ended(running: Service) -> int:
    """Return how many connections have ended because of memory, as far as the log says."""
    lines = (line for line in running.log if line["event"] == "connections closed")
    return sum(line.get("memory", 0) for line in lines)

"""What refused calls leave behind in a worker of the service, started as users start it."""

import asyncio
import ssl
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.access.methods import METHODS
from latchkey_service.rpc import handlers
from latchkey_service.settings.settings import Settings

from tests.helpers import raw_http2 as http2
from tests.helpers.callers import (
    ca_pem,
    channel_credentials,
    policy_text,
    spiffe_identity,
    uri,
    write_server_files,
)
from tests.helpers.calls import CHANNEL_OPTIONS, is_serving
from tests.helpers.flood import Peer
from tests.helpers.free_ports import free_port
from tests.helpers.rich_status import refusal
from tests.helpers.servers import serving_as
from tests.helpers.service_process import PYTHON
from tests.helpers.waiting import eventually
from tests.integration.rpc.tls_service import tls_service

BATCH_VERIFY = "/latchkey.v1.TokenService/BatchVerify"
MIB = 1024 * 1024
# Two million questions without a secret. Parsed, they would take 130 MiB.
LARGE = b"\x0a\x00" * (2 * MIB)
CALLS, SETTLING = 50, 5
# Buffers of the transport, which it reuses. One message takes 4 MiB.
GROWTH_BYTES_MAX = 40 * MIB


async def test_refused_calls_leave_no_memory_behind(folder: Path, database_url: str) -> None:
    """Fifty anonymous calls of 4 MiB on one TLS connection are refused, and the worker keeps
    nothing of them."""
    with tls_service(folder, database_url, *PYTHON) as (running, target):
        await running.welcome()
        credentials = grpc.ssl_channel_credentials(ca_pem())
        async with grpc.aio.secure_channel(target, credentials, options=CHANNEL_OPTIONS) as channel:
            await eventually(partial(is_serving, channel), "health is up")
            (pid,) = running.worker_pids
            worker = psutil.Process(pid)
            call: Any = channel.unary_unary(BATCH_VERIFY)
            resident = []
            for _ in range(CALLS):
                error = await refusal(call(LARGE, timeout=10))
                assert error.reason == "CALLER_ANONYMOUS"
                resident.append(worker.memory_info().rss)
        assert running.worker_pids == [pid]
        growth = max(resident) - resident[SETTLING]
        assert growth < GROWTH_BYTES_MAX, [size // MIB for size in resident]


@pytest.mark.parametrize("path", [BATCH_VERIFY, "/unknown/Method"])
async def test_large_metadata_end_the_connection(
    folder: Path, database_url: str, path: str
) -> None:
    """A client that ignores the limit on metadata loses its connection at once. It sends large
    metadata in few bytes, as references to a header that it has sent before."""
    blocks = http2.headers(path, *[("x-large", "v" * 3_900)] * 1_000)
    burst = http2.PREFACE + http2.Frame(http2.SETTINGS, 0, 0).encoded()
    # grpcio itself refuses some of them, at random.
    for stream in range(1, 40, 2):
        burst += http2.Frame(http2.HEADERS, http2.END_HEADERS, stream, blocks).encoded()
    context = ssl.create_default_context(cadata=ca_pem().decode())
    context.set_alpn_protocols(["h2"])
    with tls_service(folder, database_url) as (running, target):
        await running.welcome()
        port = target.rpartition(":")[2]
        peer = await asyncio.to_thread(Peer, f"127.0.0.1:{port}", tls=context)
        try:
            # It may have ended before all is sent.
            await asyncio.to_thread(peer.send, burst)
            await eventually(lambda: not peer.is_open(), "the connection has ended")
        finally:
            peer.close()


@pytest.fixture
def identified_by_certificate(settings: Settings, folder: Path) -> Settings:
    """Settings of a TLS listener whose callers' certificates identify them."""
    policy = folder / "policy.toml"
    policy.write_text(policy_text())
    more = {"policy": policy, "tls_listen": f"localhost:{free_port()}"}
    return settings.model_copy(update=more | write_server_files(folder))


def context_of(name: str, folder: Path) -> ssl.SSLContext:
    """Return the TLS context of a client with the certificate of `name`."""
    identity = spiffe_identity(uri(name))
    pem = folder / f"{name}.pem"
    pem.write_bytes(identity.certificate + identity.key)
    context = ssl.create_default_context(cadata=ca_pem().decode())
    context.load_cert_chain(pem)
    context.set_alpn_protocols(["h2"])
    return context


async def test_messages_of_unknown_certificates_are_not_received(
    identified_by_certificate: Settings, folder: Path
) -> None:
    """Where certificates identify the callers, a call with a certificate of nobody is refused
    although most of its message is still to come, for each unary method that needs an identity.
    A known caller's large message is received."""
    context = context_of("stranger", folder)
    async with serving_as(identified_by_certificate) as server:
        assert server.tls_address is not None
        async with http2.connected(server.tls_address, tls=context) as raw:
            await raw.open()
            for path, rule in METHODS.items():
                if rule.role is None or rule.audited or path.endswith("/Watch"):
                    continue
                stream = raw.begin(http2.headers(path))
                raw.send(http2.DATA, 0, stream, http2.message(bytes(4 * MIB))[:1_000])
                # The initial metadata may come first.
                while not (await raw.until(http2.HEADERS, stream)).flags & http2.END_STREAM:
                    pass
        known = channel_credentials(spiffe_identity(uri("verifier")))
        address = server.tls_address
        async with grpc.aio.secure_channel(address, known, options=CHANNEL_OPTIONS) as channel:
            stub: Any = pb_grpc.TokenServiceStub(channel)
            answer = await stub.Verify(pb.VerifyRequest(secret="x" * MIB), timeout=10)
            assert answer.verdict == pb.VERDICT_MALFORMED
            asked = pb.BatchVerifyRequest(requests=[pb.VerifyRequest(secret="x")] * 1_000)
            assert len((await stub.BatchVerify(asked, timeout=10)).responses) == 1_000
            # Above the transport's own limit.
            with pytest.raises(grpc.aio.AioRpcError) as large:
                await stub.Get(pb.GetRequest(id="x" * 6 * MIB), timeout=10)
            assert large.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            call: Any = channel.stream_unary("/latchkey.v1.TokenService/Verify")
            with pytest.raises(grpc.aio.AioRpcError) as empty:
                await call(iter(()), timeout=10)
            assert empty.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_that_does_not_arrive_ends_the_call(
    identified_by_certificate: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known caller that never sends the message of its call, and has set no deadline, gets an
    answer. Its next call is served."""
    monkeypatch.setattr(handlers, "MESSAGE_SECONDS", 0.2)
    async with serving_as(identified_by_certificate) as server:
        assert server.tls_address is not None
        context = context_of("verifier", folder)
        async with http2.connected(server.tls_address, tls=context) as raw:
            await raw.open()
            for sent in (b"", http2.message(bytes(1_000))[:10]):
                stream = raw.begin(http2.headers("/latchkey.v1.TokenService/Verify"))
                raw.send(http2.DATA, 0, stream, sent)
                while not (await raw.until(http2.HEADERS, stream)).flags & http2.END_STREAM:
                    pass
        known = channel_credentials(spiffe_identity(uri("verifier")))
        address = server.tls_address
        async with grpc.aio.secure_channel(address, known, options=CHANNEL_OPTIONS) as channel:
            stub: Any = pb_grpc.TokenServiceStub(channel)
            answer = await stub.Verify(pb.VerifyRequest(secret="x"), timeout=10)
            assert answer.verdict == pb.VERDICT_MALFORMED

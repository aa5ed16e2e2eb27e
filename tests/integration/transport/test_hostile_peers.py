"""What peers without a credential can do to a service with its own processes."""

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.access.methods import METHODS
from latchkey_service.rpc import refused_calls
from latchkey_service.rpc.streams import OPEN_STREAMS_PER_ADDRESS_MAX as SHARE
from latchkey_service.settings.settings import Settings
from latchkey_service.transport import connection_shares
from latchkey_service.transport.connection_guard import ConnectionGuard
from latchkey_service.transport.transports import Limits

from tests.helpers import raw_http2 as http2
from tests.helpers.anonymous_flood import flooding
from tests.helpers.callers import ca_pem, credential, policy_text, write_server_files
from tests.helpers.calls import CHANNEL_OPTIONS, is_serving, outcome
from tests.helpers.flood import Peer, calls, open_count
from tests.helpers.free_ports import free_port
from tests.helpers.servers import serving_as
from tests.helpers.service_process import PYTHON, Service, service
from tests.helpers.waiting import eventually
from tests.integration.transport.listener import ECHO, Serve, call

MIB = 1024 * 1024
# Addresses of this machine, so the peers and an ordinary client have different ones.
STRANGER = "127.0.0.9"
CODE = grpc.StatusCode
# Well-formed, and of nobody.
UNKNOWN = credential("nobody")
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="latchkey-test-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@contextlib.asynccontextmanager
async def running(
    folder: Path, database_url: str, *python: str, **more: object
) -> AsyncIterator[tuple[Service, str]]:
    """Run a service, with PYTHON where its memory matters."""
    given: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "database_url": database_url,
        "data_dir": folder / "data",
        "log_format": "json",
    }
    with service(folder / "service", python or None, **(given | more)) as one:
        yield one, await one.welcome()


@contextlib.contextmanager
def peers(address: str, count: int, first: bytes) -> Iterator[list[Peer]]:
    """Open connections from another address, each with these first bytes."""
    made: list[Peer] = []
    try:
        for _ in range(count):
            with contextlib.suppress(OSError):
                made.append(Peer(address, STRANGER))
                made[-1].send(first)
        yield made
    finally:
        for peer in made:
            peer.close()


@pytest.mark.parametrize("path", ["/no.Such/Method", "/latchkey.v1.TokenService/Get"])
async def test_a_flood_from_one_address_does_not_end_a_worker(
    database_url: str, folder: Path, transport: str, path: str
) -> None:
    """Hundreds of connections from one address, each with as many calls as it may have, of an
    unknown method or endless, end no worker. Most of them are closed, and another address is
    served."""
    settings = {"transport": transport, "memory_mib": 600, "connections_per_address": 40}
    async with running(folder, database_url, *PYTHON, **settings) as (one, address):
        (pid,) = one.worker_pids
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            await eventually(partial(is_serving, channel), "it serves")
            with peers(address, 200, calls(path, 100)) as made:
                await eventually(lambda: open_count(made) <= 40, "the others are closed")
                stub = pb_grpc.TokenServiceStub(channel)

                async def is_answered() -> bool:
                    return (await outcome(stub.Verify(pb.VerifyRequest(secret="x"), timeout=5))).ok

                await eventually(is_answered, "another address is served")
        assert one.worker_pids == [pid]


async def test_idle_connections_keep_nobody_out(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """When a listener is full of connections that do nothing, the longest idle one makes room for a
    newcomer, and busy ones stay."""
    monkeypatch.setattr(connection_shares, "IDLE_SECONDS", 0.5)
    async with serve(transport, connections_max=8) as listener, listener.channel() as busy:
        assert (await call(busy, ECHO)).ok
        with peers(listener.address, 7, calls(ECHO, 0)) as idle:
            assert isinstance(listener.guard, ConnectionGuard)
            await asyncio.to_thread(listener.guard.inspect)
            for _ in range(7):
                await asyncio.sleep(0.1)
                assert (await call(busy, ECHO)).ok
            async with listener.channel() as newcomer:
                assert (await call(newcomer, ECHO, wait_for_ready=True)).ok
                await eventually(lambda: open_count(idle) == 6, "an idle one is closed")
                assert (await call(newcomer, ECHO)).ok
        assert (await call(busy, ECHO)).ok
        assert len(listener.peers) == 2


async def test_connections_per_address(serve: Serve, transport: str) -> None:
    """An address above its limit loses connections; another address connects and is served."""
    async with serve(transport, connections_per_address=5) as listener:
        with peers(listener.address, 12, calls(ECHO, 0)) as made:
            await eventually(lambda: open_count(made) == 5, "the address has its share")
            async with listener.channel() as channel:
                assert (await call(channel, ECHO)).ok
            assert open_count(made) == 5


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_one_connection_of_many_is_ended(host: str) -> None:
    """The guard ends the connection of the peer that it is given, as gRPC reports it, and no other
    one of the same address. Behind a proxy, and for a UNIX socket, it ends none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((host, 0), family=family))
        where = listener.getsockname()[:2]
        ends = [stack.enter_context(socket.create_connection(where)) for _ in range(3)]
        accepted = {}
        for _ in ends:
            own, peer = listener.accept()
            accepted[peer[1]] = stack.enter_context(own)
        address = f"[{host}]:{where[1]}"
        number = ends[1].getsockname()[1]
        peer = f"ipv6:%5B{host}%5D:{number}" if ":" in host else f"ipv4:{host}:{number}"
        assert not ConnectionGuard([address], Limits(), [address]).end(peer)
        guard = ConnectionGuard([address], Limits())
        assert not guard.end("unix:")
        assert guard.end(peer)
        await asyncio.to_thread(guard.inspect)
        assert guard.ended == {"refused": 1}
        ends[1].settimeout(5)
        assert ends[1].recv(1) == b""
        for other in (ends[0], ends[2]):
            accepted[other.getsockname()[1]].send(b"x")
            assert other.recv(1) == b"x"


async def test_too_many_refused_calls_end_connections(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """When an address has too many calls of unknown methods open, it loses the connections of
    further ones. Their calls end with them, so memory is bounded. Another address is served."""
    if transport != "grpcio":
        pytest.skip("its peers of unknown methods have no address")
    monkeypatch.setattr(refused_calls, "OPEN_PER_ADDRESS_MAX", 250)
    # Otherwise a slow peer's calls could be refused as fast as they come.
    monkeypatch.setattr(refused_calls, "PER_SECOND", 1)
    async with serving_as(settings) as server:
        refused = server.refused
        with peers(server.address, 4, calls("/no.Such/Method", 100)) as made:
            await eventually(lambda: refused.open == 250 or open_count(made) < 4, "many wait")
            await eventually(lambda: 1 <= open_count(made) <= 3, "a connection is ended")
            await eventually(lambda: refused.open <= 300, "its calls have ended")
            assert refused.excess > 0
            async with grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as one:
                # Health is up once the server has its first lease.
                await eventually(lambda: is_serving(one), "health is up")


@pytest.mark.parametrize("count", [0, 5])
async def test_proxies_have_no_limit_per_address(serve: Serve, count: int) -> None:
    """A listener with a trusted proxy in front has no limit per address, and neither has one whose
    limit is 0."""
    async with serve("native") as listener:
        limits: Any = listener.guard
        limits = limits._limits.__class__(connections_per_address=count)
        shared = [listener.address] if count else []
        guard = ConnectionGuard([listener.address], limits, shared)
        with peers(listener.address, 12, calls(ECHO, 0)) as made:

            async def all_are_seen() -> bool:
                # The server may not have accepted them all yet.
                await asyncio.to_thread(guard.inspect)
                return guard.connections == 12

            await eventually(all_are_seen, "all of them are there")
            assert open_count(made) == 12


async def test_health_watches_are_bounded(database_url: str, folder: Path, transport: str) -> None:
    """One address has a limited number of health watches, and a large request is refused. Another
    address has its own share."""
    async with running(folder, database_url, transport=transport) as (one, address):
        (pid,) = one.worker_pids
        async with contextlib.AsyncExitStack() as stack:
            watches: list[Any] = []
            # A channel holds back calls above the server's limit.
            for _ in range(2):
                channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
                watches.append(
                    (await stack.enter_async_context(channel)).unary_stream(HEALTH_WATCH)
                )
            await eventually(partial(is_serving, channel), "it serves")
            large = b"\x0a\x80\x80\xc0\x02" + bytes(5 * MIB - 100)
            assert (
                await outcome(watches[0](large, timeout=5).read())
            ).code is CODE.INVALID_ARGUMENT
            with peers(address, 5, calls(HEALTH_WATCH, 100, b"")):
                own = [watches[n % 2](b"", timeout=10) for n in range(SHARE + 5)]
                found = [(await outcome(each.read())).code for each in own]
                assert found.count(CODE.OK) == SHARE
                assert found.count(CODE.RESOURCE_EXHAUSTED) == 5
                for each in own:
                    each.cancel()

                async def is_free() -> bool:
                    return (await outcome(watches[0](b"", timeout=10).read())).ok

                await eventually(is_free, "there is room again")
        assert one.worker_pids == [pid]


@pytest.mark.parametrize("listener", ["native", "tls"])
async def test_anonymous_calls_do_not_delay_known_callers(
    database_url: str, folder: Path, listener: str
) -> None:
    """While anonymous peers call as often as they can, on as many calls as they may have, each
    verify of a known caller is answered in time."""
    policy = folder / "policy.toml"
    policy.write_text(policy_text())
    files: dict[str, Any] = write_server_files(folder)
    # With it, callers without a certificate could not connect.
    del files["tls_client_ca"]
    target = f"localhost:{free_port()}"
    async with running(
        folder, database_url, transport="native", policy=policy, tls_listen=target, **files
    ) as (one, address):
        ca = folder / "ca.pem"
        ca.write_bytes(ca_pem())
        if listener == "tls":
            credentials = grpc.ssl_channel_credentials(ca_pem())
            made = grpc.aio.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
        else:
            made = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        async with made as channel:
            await eventually(partial(is_serving, channel), "it serves")
            known = (("authorization", f"Bearer {credential('verifier')}"),)
            stub = pb_grpc.TokenServiceStub(channel)
            where = (target, ca) if listener == "tls" else (address, None)

            async def verified() -> bool:
                request = pb.VerifyRequest(secret="x")
                return (await outcome(stub.Verify(request, metadata=known, timeout=2))).ok

            # More calls at once than releases of grpcio from 1.82 on let wait.
            with flooding(where[0], connections=100, ca=where[1]):
                await eventually(lambda: "CALLER_ANONYMOUS" in one.err, "they are refused")
                # The first calls of all connections at once may take long on a busy machine.
                await eventually(verified, "the first burst is over")
                for _ in range(100):
                    assert await verified()
                    await asyncio.sleep(0.01)
        assert len(one.worker_pids) == 1


async def test_large_anonymous_messages_are_not_received(
    settings: Settings, tmp_path: Path, transport: str
) -> None:
    """`grpcio` refuses a call without a known credential although most of its message is still to
    come, for each unary method that needs one."""
    if transport != "grpcio":
        pytest.skip("it receives the message first")
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text())
    settings = settings.model_copy(update={"policy": policy})
    async with serving_as(settings) as server, http2.connected(server.address) as raw:
        await raw.open()
        for path, rule in METHODS.items():
            if rule.role is None or rule.audited or path.endswith("/Watch"):
                continue
            presented = () if "Verify" in path else (("authorization", f"Bearer {UNKNOWN}"),)
            stream = raw.begin(http2.headers(path, *presented))
            raw.send(http2.DATA, 0, stream, http2.message(bytes(4 * MIB))[:1_000])
            got = await raw.until(http2.HEADERS, stream)
            assert got.flags & http2.END_STREAM, path


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="memory is checked only on Linux")
async def test_too_much_metadata_ends_its_connection(database_url: str, folder: Path) -> None:
    """A client that ignores the settings of `grpcio` cannot fill a worker with metadata of 1.5 MB a
    call: the connection ends, and the worker serves others."""
    async with (
        # What the worker needs, and the 100 calls that grpcio may hand over before the end.
        running(folder, database_url, *PYTHON, transport="grpcio", memory_mib=400) as (
            one,
            address,
        ),
        contextlib.AsyncExitStack() as stack,
    ):
        workers = one.worker_pids
        peer = stack.enter_context(contextlib.closing(Peer(address, STRANGER)))
        peer.send(calls(ECHO, 0))
        field = b"\x10\x01x" + b"\x7f\xe9\x06" + b"a" * 1_000
        block = http2.headers(ECHO) + field * 1_500
        for number in range(100):
            pieces = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
            kinds = [http2.HEADERS] + [http2.CONTINUATION] * (len(pieces) - 1)
            ends = [0] * (len(pieces) - 1) + [http2.END_HEADERS]
            sent = [
                http2.Frame(kind, end, 2 * number + 1, piece).encoded()
                for kind, end, piece in zip(kinds, ends, pieces, strict=True)
            ]
            if not peer.send(b"".join(sent)):
                break
        await eventually(lambda: not peer.is_open(), "the connection has ended")
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            await eventually(partial(is_serving, channel), "it serves")
        assert one.worker_pids == workers, one.err

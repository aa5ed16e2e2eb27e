"""The limits of a whole service: its settings, its client library, and its worker's memory."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import statistics
import zlib
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from latchkey import Client, Scope, Verdict, Verifier
from latchkey.access import Access
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.process import worker
from latchkey_service.settings.settings import Settings
from latchkey_service.transport.transports import FILES_PER_CONNECTION

from tests.helpers import raw_http2 as http2
from tests.helpers.callers import ca_pem, write_server_files
from tests.helpers.calls import CHANNEL_OPTIONS, is_serving
from tests.helpers.captured_log import everything_logged
from tests.helpers.raw_http2 import connected
from tests.helpers.servers import serving_as
from tests.helpers.service_process import PYTHON, service
from tests.helpers.waiting import WAIT_SECONDS, eventually
from tests.helpers.watch_client import watching

VERIFY = "/latchkey.v1.TokenService/Verify"


@pytest.mark.parametrize("listener", ["native", "grpcio", "tls"])
async def test_a_verifier_outlives_its_connections(
    settings: Settings, tmp_path: Path, transport: str, listener: str
) -> None:
    """As its connections reach their maximum age, a client library moves its Watch and its calls to
    new ones. No verify fails, the cache answers nearly all, and Deletes wait for no abandoned
    lease."""
    if listener not in ("tls", transport):
        pytest.skip("the other one")
    files: dict[str, Any] = write_server_files(tmp_path)
    del files["tls_client_ca"]
    old = {"connection_age_seconds": 1.0, "tls_listen": "localhost:0", **files}
    async with serving_as(settings.model_copy(update=old)) as server:
        target = server.tls_address if listener == "tls" else server.address
        assert target is not None
        access = Access()
        if listener == "tls":
            (tmp_path / "ca.pem").write_bytes(ca_pem())
            access = Access(tls_ca=tmp_path / "ca.pem")
        async with (
            Client(target, access=access) as client,
            Verifier(client, timeout_seconds=WAIT_SECONDS) as verifier,
        ):
            created = await client.create("acme", "lives", Scope.READ)

            async def remembers() -> bool:
                await verifier.verify(created.secret, Scope.READ)
                return verifier.stats().hits > 0

            await eventually(remembers, "it answers from memory")
            before, answered = verifier.stats().hits, 0
            while verifier.stats().reconnects < 3:
                found = await verifier.verify(created.secret, Scope.READ)
                assert found.verdict is Verdict.VALID
                answered += 1
                await asyncio.sleep(0.005)
            assert verifier.stats().hits - before > 0.9 * answered
            waits = []
            for number in range(10):
                doomed = await client.create("acme", f"dies {number}", Scope.READ)
                assert (await verifier.verify(doomed.secret)).verdict is Verdict.VALID
                receipt = await client.delete("acme", doomed.token.id)
                assert receipt.effective_time is not None
                waits.append((receipt.effective_time - receipt.commit_time).total_seconds())
                assert (await verifier.verify(doomed.secret)).verdict is Verdict.DELETED
                await asyncio.sleep(0.1)
            assert statistics.median(waits) < settings.lease_seconds / 4


async def test_connections_max(settings: Settings) -> None:
    """The setting applies to each listener separately."""
    two = settings.model_copy(update={"connections_max": 2})
    async with serving_as(two) as server, contextlib.AsyncExitStack() as stack:
        raws = [await stack.enter_async_context(connected(server.address)) for _ in range(2)]
        for raw in raws:
            await raw.open()
        more = await stack.enter_async_context(connected(server.address))
        await more.closed()
        for raw in raws:
            await raw.until(http2.HEADERS, raw.call(VERIFY, b""))


async def test_open_files_per_watch(settings: Settings, transport: str) -> None:
    """A client that watches uses as many of a worker's files as the calculation assumes."""
    async with serving_as(settings) as server, watching(server.address) as first:
        await first.granted()

        def ours() -> int:
            """Sockets of the server, which shares this process with its clients."""
            port = int(server.address.rpartition(":")[2])
            found = psutil.Process().net_connections("all")
            tcp = [c for c in found if c.family != socket.AF_UNIX and c.laddr.port == port]
            # Both ends of the connection: one end has the path, the other no name.
            own = [c for c in found if c.family == socket.AF_UNIX and "pygrpc-native" in c.laddr]
            return len(tcp) + 2 * len(own)

        before = ours()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                client = await stack.enter_async_context(watching(server.address))
                await client.granted()
            assert ours() - before == 5 * FILES_PER_CONNECTION[transport]


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="memory is checked only on Linux")
async def test_a_worker_that_uses_too_much_memory(
    database_url: str, pepper_file: Path, tmp_path: Path
) -> None:
    """A message that decompresses to a gigabyte ends the worker, not the machine. The service logs
    it and starts another worker."""
    with service(
        tmp_path,
        PYTHON,
        database_url=database_url,
        pepper_file=pepper_file,
        data_dir=tmp_path / "data",
        listen="127.0.0.1:0",
        transport="native",
        log_format="json",
        memory_mib=200,
    ) as running:
        address = await running.welcome()
        packer = zlib.compressobj(9, wbits=31)
        zeros = bytes(1 << 20)
        first, other = (packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
        # Compressing each of them would take seconds. Only the checksum at the end is wrong, and a
        # worker that reads it has used too much memory before.
        packed = first + other * 999 + packer.flush()
        async with connected(address) as raw:
            await raw.open()
            # Until then the connection's window is the usual 64 KiB.
            await raw.until(http2.WINDOW_UPDATE)
            stream = raw.begin(http2.headers(VERIFY, ("grpc-encoding", "gzip")))
            message = http2.message(packed, compressed=1)
            for start in range(0, len(message), 16_384):
                raw.send(http2.DATA, 0, stream, message[start : start + 16_384])
            raw.send(http2.DATA, http2.END_STREAM, stream)
            got = await raw.closed()
            assert not any(frame.kind == http2.HEADERS for frame in got)
        (line,) = await eventually(
            lambda: [
                one for one in running.log if one["event"] == "worker killed: too much memory"
            ],
            f"it says so, after {got}",
        )
        # Before the message is fully decompressed, however late memory was measured.
        assert 200 <= line["mib"] < 1_000
        died = await eventually(
            lambda: [one for one in running.log if one["event"] == "worker exited"], "it died"
        )
        assert (died[0]["reason"], died[0]["exit_code"]) == ("too much memory", -signal.SIGKILL)
        await eventually(lambda: len(running.worker_pids) == 2, "another one is up")
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            await eventually(lambda: is_serving(channel), "it serves")
            answer = await pb_grpc.TokenServiceStub(channel).Verify(pb.VerifyRequest(secret="x"))
            assert answer.verdict == pb.VERDICT_MALFORMED


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="files are checked only on Linux")
async def test_a_flood_that_uses_all_files(
    database_url: str, pepper_file: Path, tmp_path: Path, transport: str
) -> None:
    """When connections arrive so fast that no file is left, the server still closes the excess
    ones, and earlier connections are served."""
    most = 10
    with service(
        tmp_path,
        database_url=database_url,
        pepper_file=pepper_file,
        data_dir=tmp_path / "data",
        listen="127.0.0.1:0",
        transport=transport,
        log_format="json",
        connections_max=most,
        # Without this, only root may inspect its files.
        core_dumps="on",
    ) as running:
        address = await running.welcome()
        (pid,) = running.worker_pids
        host, _, port = address.rpartition(":")
        with contextlib.ExitStack() as stack:
            async with connected(address) as raw:
                await raw.open()
                await raw.until(http2.HEADERS, raw.call(VERIFY, b""))
                few = psutil.Process(pid).num_fds() + 2 * most
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, few))
                for _ in range(20 * most):
                    # Without waiting: connections that cannot be accepted for lack of files would
                    # take minutes.
                    flood = stack.enter_context(socket.socket())
                    flood.setblocking(False)
                    flood.connect_ex((host, int(port)))

                def connections() -> int:
                    found = psutil.Process(pid).net_connections("tcp")
                    return sum(c.laddr.port == int(port) and bool(c.raddr) for c in found)

                await eventually(lambda: connections() <= most, "no more than may be")
                await raw.until(http2.HEADERS, raw.call(VERIFY, b""))
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            await eventually(lambda: is_serving(channel), "it serves others again")
        assert running.worker_pids == [pid]


@pytest.mark.parametrize("asked", [True, False])
def test_too_few_files_are_reported(monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    """A worker that may not open enough files for its connections reports it, as a warning if the
    number of connections was set explicitly."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (600, 600))
    given: Any = {"connections_max": 10_000} if asked else {}
    with everything_logged("json", "debug") as written:
        worker._warn_of_files(Settings(**given))
    assert '"connections_max": 100' in written.getvalue()
    assert ('"level": "warning"' in written.getvalue()) == asked

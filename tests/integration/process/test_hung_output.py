"""A service whose output nobody reads, or that has no room for it."""

import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.calls import CHANNEL_OPTIONS, is_serving
from tests.helpers.free_ports import free_port
from tests.helpers.metrics import scrape
from tests.helpers.service_process import OWN_VARIABLES, service
from tests.helpers.waiting import WAIT_SECONDS, eventually

# The smallest pipe that Linux makes: one page, about ten log lines.
PIPE_BYTES = 4_096
# Many more calls than log lines that fit into the pipe.
CALLS = 100


@contextlib.contextmanager
def started(folder: Path, stdout: Any, stderr: Any, **settings: object) -> Iterator[Any]:
    """Run a service with these streams."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(OWN_VARIABLES)}
    environment |= {f"LATCHKEY_{name.upper()}": str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "latchkey_service"],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=environment,
        cwd=folder,
        process_group=0,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(WAIT_SECONDS)


@pytest.fixture
def settings(database_url: str, pepper_file: Path) -> dict[str, object]:
    return {
        "database_url": database_url,
        "pepper_file": pepper_file,
        "listen": f"127.0.0.1:{free_port()}",
        "grace_seconds": 1,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="sets the size of a pipe")
async def test_nobody_reads_the_log(tmp_path: Path, settings: dict[str, object]) -> None:
    """While nobody reads stderr, Verify, Create, Delete and health work, and SIGTERM ends the
    service in time."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    try:
        with started(tmp_path, write, write, **settings) as process:
            options = CHANNEL_OPTIONS
            async with grpc.aio.insecure_channel(
                str(settings["listen"]), options=options
            ) as channel:
                await eventually(lambda: is_serving(channel), "health is up")
                stub = pb_grpc.TokenServiceStub(channel)
                request = pb.CreateRequest(account_id="acme", name="first", scope=pb.SCOPE_READ)
                created = await stub.Create(request, timeout=5)
                for _ in range(CALLS):
                    await stub.List(pb.ListRequest(account_id="acme"), timeout=5)
                verify = pb.VerifyRequest(secret=created.secret)
                assert (await stub.Verify(verify, timeout=5)).verdict == pb.VERDICT_VALID
                delete = pb.DeleteRequest(account_id="acme", id=created.token.id)
                await stub.Delete(delete, timeout=5)
                assert (await stub.Verify(verify, timeout=5)).verdict == pb.VERDICT_DELETED
                assert await is_serving(channel)
            process.terminate()
            assert await asyncio.to_thread(process.wait, WAIT_SECONDS) == 0
        # The pipe is full: the calls above did log more than it holds.
        os.set_blocking(read, False)
        assert len(os.read(read, 2 * PIPE_BYTES)) > PIPE_BYTES - 1_000
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
async def test_no_room_for_the_output(tmp_path: Path, settings: dict[str, object]) -> None:
    """The service starts and stops as usual although the disk is full under stdout and stderr. It
    counts the log lines that are lost."""
    full = os.open("/dev/full", os.O_WRONLY)
    metrics = f"127.0.0.1:{free_port()}"
    with started(tmp_path, full, full, metrics_listen=metrics, **settings) as process:
        os.close(full)
        address = str(settings["listen"])
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            await eventually(lambda: is_serving(channel), "health is up")
        for worker in ("0", "supervisor"):
            now = await scrape(metrics)
            assert now.get("latchkey_log_lines_dropped_total", worker=worker) > 0
        process.terminate()
        assert await asyncio.to_thread(process.wait, WAIT_SECONDS) == 0


@pytest.mark.parametrize("log_format", ["json", "auto"])
async def test_stderr_is_json(tmp_path: Path, settings: dict[str, object], log_format: str) -> None:
    """Each line of stderr is JSON. With LOG_FORMAT=json, stdout stays empty; else it greets
    people."""
    with service(tmp_path / "service", log_format=log_format, **settings) as running:
        await eventually(lambda: '"serving"' in running.err, "it serves")
        assert await running.end() == 0
    for line in running.err.splitlines():
        assert line.startswith("{"), line
    assert ("Latchkey serves on" in running.out) == (log_format == "auto")

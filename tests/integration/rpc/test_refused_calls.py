"""What refused calls leave behind in a worker of the service, started as users start it."""

import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from tests.helpers.callers import ca_pem, policy_text, write_server_files
from tests.helpers.calls import CHANNEL_OPTIONS, is_serving
from tests.helpers.free_ports import free_port
from tests.helpers.rich_status import refusal
from tests.helpers.service_process import PYTHON, service
from tests.helpers.waiting import eventually

BATCH_VERIFY = "/latchkey.v1.TokenService/BatchVerify"
MIB = 1024 * 1024
# Two million questions without a secret. Parsed, they would take 130 MiB.
LARGE = b"\x0a\x00" * (2 * MIB)
CALLS, SETTLING = 50, 5
# Buffers of the transport, which it reuses. One message takes 4 MiB.
GROWTH_BYTES_MAX = 40 * MIB


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="latchkey-test-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


async def test_refused_calls_leave_no_memory_behind(folder: Path, database_url: str) -> None:
    """Fifty anonymous calls of 4 MiB on one TLS connection are refused, and the worker keeps
    nothing of them."""
    policy = folder / "policy.toml"
    policy.write_text(policy_text())
    files = write_server_files(folder)
    # With it, callers without a certificate could not connect.
    del files["tls_client_ca"]
    target = f"localhost:{free_port()}"
    with service(
        folder / "service",
        PYTHON,
        listen="127.0.0.1:0",
        database_url=database_url,
        data_dir=folder / "data",
        log_format="json",
        policy=policy,
        tls_listen=target,
        **files,
    ) as running:
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

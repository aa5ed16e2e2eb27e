"""The metrics of a service with two workers, as Prometheus reads them."""

import asyncio
import contextlib
import math
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.process.metric_families import FAMILIES
from latchkey_service.process.metrics_server import REQUESTS_MAX

from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.metrics import OPENMETRICS, Reading, scrape
from tests.helpers.service_process import Service, service
from tests.helpers.waiting import WAIT_SECONDS, eventually

# Exist only with a policy, TLS, a webhook and traces; tests/contract/test_metrics.py,
# tests/integration/tokens/test_events.py and tests/contract/test_traces.py cover them.
CONDITIONAL = {
    "latchkey_webhook_deliveries",
    "latchkey_webhook_events",
    "latchkey_webhook_oldest_event_seconds",
    "latchkey_policy_callers",
    "latchkey_policy_age_seconds",
    "latchkey_certificate_expiry_seconds",
    "latchkey_trace_calls_limited",
    "latchkey_trace_spans",
}


@pytest.fixture
async def running(
    tmp_path: Path, database_url: str, pepper_file: Path
) -> AsyncIterator[tuple[Service, str, str]]:
    """A service with two workers, its address and that of its metrics."""
    settings = {
        "database_url": database_url,
        "pepper_file": pepper_file,
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        "workers": 2,
        "grace_seconds": 1,
        "log_format": "json",
    }
    with service(tmp_path / "service", **settings) as started:
        address = await started.welcome()
        (line,) = (line for line in started.log if line["event"] == "metrics served")
        yield started, address, line["address"]


async def test_all_workers_at_one_address(running: tuple[Service, str, str]) -> None:
    """One address has every metric of every worker, in both formats, even while a worker hangs and
    after one was killed."""
    started, address, metrics = running
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.TokenServiceStub(channel)

        async def verified() -> bool:
            await stub.Verify(pb.VerifyRequest(secret=""), timeout=1)
            return True

        await eventually(verified, "it serves")
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Get(pb.GetRequest(account_id="acme", id="nothing"), timeout=5)
    for accept in ("text/plain", OPENMETRICS):

        async def counted(accept: str = accept) -> Reading | None:
            # Worker 0 counts tokens that expire soon after its start.
            now = await scrape(metrics, accept)
            return now if now.get("latchkey_tokens_expiring", worker="0") == 0 else None

        now = await eventually(counted, "everything is counted")
        # Of the whole database, so one worker of a host is enough.
        assert math.isnan(now.get("latchkey_tokens_expiring", worker="1"))
        assert now.get("latchkey_workers") == now.get("latchkey_worker_up") == 2
        assert now.get("latchkey_build_info") == 1
        assert now.get("grpc_server_started_total", grpc_method="Verify") == 1
        for worker in ("0", "1", "supervisor"):
            memory = now.get("process_resident_memory_bytes", worker=worker)
            assert 0 < memory < now.get("process_virtual_memory_bytes", worker=worker)
            assert now.get("process_cpu_seconds_total", worker=worker) > 0
            files = now.get("process_open_fds", worker=worker)
            assert 3 <= files <= now.get("process_max_fds", worker=worker)
            age = time.time() - now.get("process_start_time_seconds", worker=worker)
            assert 0 < age < 3 * WAIT_SECONDS
        assert {metric.name for metric in now.metrics} | CONDITIONAL == set(FAMILIES)
        # Prometheus' `increase` does not see the first event of a counter that begins with it.
        assert now.get("latchkey_worker_restarts_total") == 0
        assert now.get("latchkey_failures_total", reason="OVERLOADED") == 0

    first, second = started.worker_pids
    os.kill(first, signal.SIGSTOP)
    try:
        now = await scrape(metrics)
        assert now.get("latchkey_worker_up") == 1
    finally:
        os.kill(first, signal.SIGCONT)
    os.kill(second, signal.SIGKILL)

    async def replaced() -> bool:
        now = await scrape(metrics)
        restarts = now.get("latchkey_worker_restarts_total", reason="exited")
        return restarts == 1 and now.get("latchkey_worker_up") == 2

    await eventually(replaced, "the worker is restarted and counted")


async def test_slow_clients_keep_nobody_out(running: tuple[Service, str, str]) -> None:
    """Clients that connect and send nothing do not keep Prometheus from reading, and the service
    stops in time although they are connected."""
    started, _, metrics = running
    host, _, port = metrics.rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(2 * REQUESTS_MAX):
            stack.enter_context(socket.create_connection((host, int(port)), 5))
        reading = await scrape(metrics)
        assert reading.get("latchkey_workers") == 2
        async with asyncio.timeout(10):
            assert await started.end() == 0


async def test_address_in_use(tmp_path: Path, database_url: str, pepper_file: Path) -> None:
    """The service does not start without its metrics, and names the setting."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        settings = {
            "database_url": database_url,
            "pepper_file": pepper_file,
            "listen": "127.0.0.1:0",
            "metrics_listen": f"127.0.0.1:{other.getsockname()[1]}",
        }
        with service(tmp_path / "service", **settings) as started:
            assert await started.ended() == 1
            assert "LATCHKEY_METRICS_LISTEN chooses another address" in started.err
            assert "Traceback" not in started.err

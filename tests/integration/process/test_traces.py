"""The traces of a service with two workers, as a collector receives them by OTLP."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.process.trace_export import CLOSE_SECONDS

from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.metrics import scrape
from tests.helpers.service_process import service
from tests.helpers.spans import PARENT, TRACE, traceparent
from tests.helpers.trace_collector import Collector, collecting
from tests.helpers.waiting import eventually

SERVICE = "latchkey.v1.TokenService"
# Time limit for the whole shutdown, on a busy machine. The request to a collector that hangs would
# take ten.
STOP_SECONDS = CLOSE_SECONDS + 6


@pytest.fixture
def settings(database_url: str, pepper_file: Path) -> dict[str, object]:
    return {
        "database_url": database_url,
        "pepper_file": pepper_file,
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        "grace_seconds": 1,
        "log_format": "json",
        "traces": "on",
    }


async def token(stub: Any, name: str) -> pb.CreateResponse:
    """Create a token as soon as the service serves."""

    async def created() -> pb.CreateResponse:
        request = pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ)
        answer: pb.CreateResponse = await stub.Create(request, timeout=5)
        return answer

    found: pb.CreateResponse = await eventually(created, "it serves")
    return found


async def test_a_collector_receives_the_traces_of_all_workers(
    tmp_path: Path, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans name the service and the process, continue the caller's trace and have no secret. The
    last ones are sent when the service stops."""
    async with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        with service(tmp_path / "service", workers=2, **settings) as started:
            address = await started.welcome()
            workers: set[str] = set()

            async def one() -> bool:
                # A new connection goes to any worker.
                async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
                    stub = pb_grpc.TokenServiceStub(channel)
                    await stub.Verify(
                        pb.VerifyRequest(secret=created.secret), timeout=5, metadata=traceparent()
                    )
                workers.update(r["service.instance.id"] for r, _ in collector.spans)
                return len(workers) == 2

            async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
                stub: Any = pb_grpc.TokenServiceStub(channel)
                created = await token(stub, "one")
                await eventually(one, "spans of both workers")
                delete = pb.DeleteRequest(account_id="acme", id=created.token.id)
                await stub.Delete(delete, timeout=10, metadata=traceparent())
            assert await started.end() == 0
        assert collector.named(f"{SERVICE}/Delete"), "the last span was lost"
        assert collector.named("wait for verifiers")
        for resource, span in collector.named(f"{SERVICE}/Verify"):
            assert resource["service.name"] == "latchkey"
            assert resource["deployment.environment.name"] == "test"
            assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
        assert created.secret.encode() not in collector.bytes
        assert created.secret.rpartition("_")[2][:12].encode() not in collector.bytes
        for line in started.log:
            if line["event"] == "call" and line["method"].endswith("/Delete"):
                assert line["trace_id"] == TRACE


async def answer_all(collector: Collector, stub: Any, settings: dict[str, object]) -> float:
    """Make recorded calls; return the longest time that a warm verify took."""
    created = await token(stub, "one")
    request, longest = pb.VerifyRequest(secret=created.secret), 0.0
    for _ in range(50):
        began = time.monotonic()
        await stub.Verify(request, timeout=5, metadata=traceparent())
        longest = max(longest, time.monotonic() - began)
    return longest


@pytest.mark.parametrize("fault", ["away", "hangs"])
async def test_a_failing_collector_delays_nothing(
    tmp_path: Path, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """With a failing collector, calls are answered, spans are counted, one log line says so, and
    the service stops.
    """
    async with collecting() as collector:
        # Nobody listens on a port that the system reserves.
        url = "http://127.0.0.1:1" if fault == "away" else collector.url
        collector.gate = asyncio.Event()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        # The library tries again until then.
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "30" if fault == "hangs" else "1")
        with service(tmp_path / "service", **settings) as started:
            address = await started.welcome()
            (line,) = (line for line in started.log if line["event"] == "metrics served")
            async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
                longest = await answer_all(collector, pb_grpc.TokenServiceStub(channel), settings)
            assert longest < 2
            if fault == "hangs":
                await eventually(lambda: collector.requests, "the first spans are sent")
            else:

                async def counted() -> bool:
                    found = await scrape(line["address"])
                    return found.get("latchkey_trace_spans_total", result="failed") > 0

                await eventually(counted, "the spans are counted")
            began = time.monotonic()
            assert await started.end() == 0
            assert time.monotonic() - began < STOP_SECONDS
            collector.gate.set()
        about = ("the collector does not accept traces", "spans not exported")
        events = [line["event"] for line in started.log if line["event"] in about]
        assert len(events) == len(set(events)) > 0
        # Nor does the library log.
        assert "v1/traces" not in started.err


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "must be http/protobuf or unset")],
)
async def test_a_wrong_setting_stops_the_start(
    tmp_path: Path,
    settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    said: str,
) -> None:
    """One sentence says which variable to change."""
    monkeypatch.setenv(variable, value)
    with service(tmp_path / "service", **settings) as started:
        assert await started.ended() != 0
        assert f"{variable}: {said}" in started.err

"""The examples in the client library's README."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import signal
import sys
from typing import TYPE_CHECKING, Any

import httpx
import latchkey
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from latchkey_proto.v1 import token_service_pb2 as pb
from prometheus_client import CollectorRegistry

from tests.helpers.repository import ROOT
from tests.helpers.waiting import WAIT_SECONDS

if TYPE_CHECKING:
    from tests.contract.client.conftest import FakeLatchkey

README = ROOT / "clients" / "python" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
MANAGE, CHANGE, VERIFY, METRICS, SYNC, GRPC, ASGI = EXAMPLES


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (MANAGE, "lk_…(redacted)\nSECRET\nt1 ci Scope.READ\ndead everywhere since 1970-01-01"),
        (
            CHANGE,
            "ci ('orders:read',)\ntook something away, everywhere since 1970-01-01",
        ),
        (VERIFY, "False Verdict.MALFORMED None"),
        (SYNC, "False"),
        (GRPC, ""),
    ],
)
async def test_examples_run(fake: FakeLatchkey, secret: str, example: str, said: str) -> None:
    """Each example runs as printed, except for addresses, and prints the expected output."""
    fake.on("Create", fake.says(pb.CreateResponse(token=fake.token(), secret=secret)))
    fake.on("List", fake.says(pb.ListResponse(tokens=[fake.token()])))
    receipt = pb.Receipt(effective_time=Timestamp())
    fake.on("Delete", fake.says(pb.DeleteResponse(receipt=receipt)))
    changed = fake.token(permissions=["orders:read"])
    fake.on("Update", fake.says(pb.UpdateResponse(token=changed, receipt=receipt)))
    fake.on("Rotate", fake.says(pb.RotateResponse(token=changed, secret=secret, receipt=receipt)))
    retired = pb.RetireSecretsResponse(token=changed, receipt=receipt)
    fake.on("RetireSecrets", fake.says(retired))
    program = (
        example.replace("127.0.0.1:50051", fake.target)
        .replace("127.0.0.1:8080", "127.0.0.1:0")
        .replace("wait_for_termination()", "stop(None)")
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", program),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (process.returncode, err.decode()) == (0, "")
    assert out.decode().startswith(said.replace("SECRET", secret))


async def test_metrics_example_collects(fake: FakeLatchkey, secret: str) -> None:
    """The collector exposes the counters of a verifier, with types that Prometheus accepts."""
    names: dict[str, Any] = {}
    exec(METRICS, names)  # noqa: S102 - our own README
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    registry = CollectorRegistry()
    async with latchkey.Verifier(fake.target, timeout_seconds=WAIT_SECONDS) as verifier:
        registry.register(names["VerifierCollector"](verifier))
        assert registry.get_sample_value("latchkey_verifier_misses_total") == 0
        await verifier.verify(secret)
        assert registry.get_sample_value("latchkey_verifier_misses_total") == 1
        assert registry.get_sample_value("latchkey_verifier_entries") == 0
        fields = {field.name for field in dataclasses.fields(latchkey.VerifierStats)}
        gauges = {metric.name for metric in registry.collect()}
        expected = {f"latchkey_verifier_{name}" for name in fields - {"fallback_reason"}}
        assert gauges == expected


async def test_grpc_example_ends_with_ctrl_c(fake: FakeLatchkey) -> None:
    """The gRPC example ends on the first Ctrl-C, within the grace period for its calls."""
    program = (
        GRPC.replace("127.0.0.1:50051", fake.target)
        .replace("127.0.0.1:8080", "127.0.0.1:0")
        .replace("await server.start()\n", "await server.start(); print('up', flush=True)\n")
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            assert await process.stdout.readline() == b"up\n"
            process.send_signal(signal.SIGINT)
            _, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == -signal.SIGINT
    assert err.decode().endswith("KeyboardInterrupt\n")


async def test_asgi_example_guards(fake: FakeLatchkey, secret: str) -> None:
    """The application requires a token, except for its health check."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    names: dict[str, Any] = {}
    # A timeout for a busy machine.
    arguments = f'"{fake.target}", timeout_seconds={WAIT_SECONDS}'
    exec(ASGI.replace('"127.0.0.1:50051"', arguments), names)  # noqa: S102 - our own README
    transport = httpx.ASGITransport(names["app"])
    async with (
        names["verifier"],
        httpx.AsyncClient(transport=transport, base_url="http://demo") as web,
    ):
        assert (await web.get("/healthz")).text == "Hello, stranger"
        assert (await web.get("/")).status_code == 401
        answer = await web.get("/", headers={"authorization": f"Bearer {secret}"})
        assert answer.text == "Hello, acme"

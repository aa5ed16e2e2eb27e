"""Watches of the health service, which load balancers and client libraries keep open."""

from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.calls import CHANNEL_OPTIONS, is_serving, outcome
from tests.helpers.waiting import eventually

pytestmark = [
    pytest.mark.xdist_group("faults"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

Status = health_pb2.HealthCheckResponse


async def test_each_watch_receives_each_change(
    postgres: BreakablePostgres, channel: grpc.aio.Channel, address: str
) -> None:
    """Watches receive the start and the end of an outage, even after another watch has ended. An
    unknown service is SERVICE_UNKNOWN in a watch and NOT_FOUND in a check."""
    await eventually(lambda: is_serving(channel), "health is up")
    stub: Any = health_pb2_grpc.HealthStub(channel)
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as other:
        other_stub: Any = health_pb2_grpc.HealthStub(other)
        leaves = other_stub.Watch(health_pb2.HealthCheckRequest())
        stays = stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        for watch in (leaves, stays):
            assert (await watch.read()).status == Status.SERVING
        leaves.cancel()
    async with postgres.broken_by("stopped"):
        assert (await stays.read()).status == Status.NOT_SERVING
    assert (await stays.read()).status == Status.SERVING
    stays.cancel()
    nothing = health_pb2.HealthCheckRequest(service="nothing")
    watch = stub.Watch(nothing, timeout=20)
    assert (await watch.read()).status == Status.SERVICE_UNKNOWN
    watch.cancel()
    assert (await outcome(stub.Check(nothing, timeout=5))).code is grpc.StatusCode.NOT_FOUND

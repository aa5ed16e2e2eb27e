"""The dashboard and the alerts against a real Prometheus that scrapes a real service."""

import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.programs import INSTALLS
from tests.helpers.prometheus import ALERTS, JOB, Prometheus
from tests.helpers.repository import ROOT
from tests.helpers.service_process import Service, service
from tests.helpers.waiting import eventually

DASHBOARD = json.loads((ROOT / "deploy/grafana/latchkey.json").read_text("utf-8"))
# What Grafana replaces in a query, with a window that holds a few scrapes of the test.
REPLACED = {"$job": JOB, "$instance": ".*", "$__rate_interval": "10s"}
# Panels say when they have no data.
EMPTY = "Empty "
# A worker counts tokens that expire within seconds of its start, on a busy machine later.
DATA_SECONDS = 60.0

pytestmark = [pytest.mark.slow("runs Prometheus"), INSTALLS]


@pytest.fixture
async def prometheus(
    tmp_path: Path, database_url: str, pepper_file: Path
) -> AsyncIterator[tuple[Prometheus, Service, str]]:
    """A Prometheus that scrapes a service with two workers, that service, and its address."""
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
        running = Prometheus(tmp_path / "prometheus", line["address"])
        try:
            await running.start()
            yield running, started, address
        finally:
            running.stop()


async def use(stub: Any, number: int) -> None:
    """Call methods that a service normally gets."""
    request = pb.CreateRequest(account_id="acme", name=f"token {number}", scope=pb.SCOPE_READ)
    created = await stub.Create(request, timeout=5)
    for _ in range(2):
        await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)
    await stub.Delete(pb.DeleteRequest(account_id="acme", id=created.token.id), timeout=5)


async def test_queries_and_alerts(prometheus: tuple[Prometheus, Service, str]) -> None:
    """Each query of the dashboard returns data from a healthy service in use, unless its panel says
    that it is empty. Each alert can be evaluated, and none fires until a worker is killed."""
    running, started, address = prometheus
    queries = [
        (panel["title"], panel["description"], target["expr"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ]
    assert len(queries) > 50
    number, empty = 0, {""}
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.TokenServiceStub(channel)

        async def all_have_data() -> bool:
            nonlocal number, empty
            number += 1
            await use(stub, number)
            empty = set()
            for title, description, written in queries:
                expression = written
                for name, value in REPLACED.items():
                    expression = expression.replace(name, value)
                assert "$" not in expression
                numbers = [one["value"][1] for one in await running.query(expression)]
                if all(each == "NaN" for each in numbers) and EMPTY not in description:
                    empty.add(f"{title}: {expression}")
            assert not empty
            return True

        await eventually(all_have_data, "each query returns data", DATA_SECONDS)

    async def evaluated() -> list[dict[str, Any]] | None:
        rules = await running.rules()
        return rules if all(rule["health"] == "ok" for rule in rules) else None

    rules = await eventually(evaluated, "all rules are evaluated")
    assert len(rules) == ALERTS.read_text("utf-8").count("- alert:")
    # A rate right after the start may be 0 for a moment: then an alert is pending and ends.
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
    # The variables of the dashboard find the service.
    (job,) = await running.query("count by (job) (latchkey_build_info)")
    assert job["metric"] == {"job": JOB}

    os.kill(started.worker_pids[0], signal.SIGKILL)

    async def fires() -> bool:
        firing = [rule["name"] for rule in await running.rules() if rule["state"] == "firing"]
        return firing == ["LatchkeyWorkerRestarts"]

    await eventually(fires, "the first restart fires its alert")

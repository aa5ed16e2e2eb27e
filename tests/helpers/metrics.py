"""Reads metrics: those of a server in this process, and those that a service serves."""

import math
from collections.abc import Iterable

import httpx
from latchkey_service.process.server import Server
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.helpers.plain_http import NO_AUTHORITIES
from tests.helpers.waiting import WAIT_SECONDS

__all__ = ["OPENMETRICS", "Reading", "read", "scrape"]

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Reading:
    """All metrics at one moment."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self.metrics = list(metrics)

    def get(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of this name that have these labels; NaN without any."""
        found = [
            sample.value
            for metric in self.metrics
            for sample in metric.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(found) if found else math.nan


def read(server: Server) -> Reading:
    """Return the metrics of a server in this process."""
    return Reading(server.metrics.collect().metrics())


async def scrape(address: str, accept: str = "text/plain") -> Reading:
    """Return what a service serves for Prometheus."""
    async with httpx.AsyncClient(
        timeout=WAIT_SECONDS, trust_env=False, verify=NO_AUTHORITIES
    ) as client:
        answer = await client.get(f"http://{address}/metrics", headers={"Accept": accept})
    assert answer.headers["content-type"].startswith(accept.partition(";")[0])
    parse = parse_openmetrics if accept == OPENMETRICS else parse_text
    return Reading(parse(answer.raise_for_status().text))

"""Counts observations by size, for metrics: plain integers that cost a call almost nothing.

`process/worker_metrics.py` turns them into Prometheus' format when somebody asks. Not
prometheus-client's own class: it takes a lock for each observation.
"""

import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Exemplar", "Histogram"]


class Exemplar(NamedTuple):
    """One observation, with the request that it belongs to."""

    request_id: str
    value: float
    unix_time: float


class Histogram:
    """Observations by bucket. One thread only.

    The path of a Verify updates `counts` and `total` directly (`rpc/verify_calls.py`).
    """

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        """The upper bounds of the buckets, inclusive and rising. The last bucket has no bound."""
        self.counts = [0] * (len(self.bounds) + 1)
        """The observations in each bucket, without those in smaller ones."""
        self.total = 0.0
        """The sum of all observed values."""
        self.exemplars: list[Exemplar | None] = [None] * len(self.counts)
        """The latest observation in each bucket that named its request."""

    def observe(self, value: float, request_id: str = "") -> None:
        """Count one observation. With a `request_id`, keep it as an exemplar."""
        bucket = bisect_left(self.bounds, value)
        self.counts[bucket] += 1
        self.total += value
        if request_id:
            self.exemplars[bucket] = Exemplar(request_id, value, time.time())

"""Counters of calls and verdicts, where a log line per event would cost too much.

Plain integers: the path of a warm Verify adds to them and does nothing else. They only increase.
The log shows what was added since its last summary, and `process/worker_metrics.py` the totals.
"""

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from latchkey_service.access.methods import METHODS
from latchkey_service.histogram import Histogram
from latchkey_service.tokens.verdict import Verdict

__all__ = ["BIDI_STREAM", "CALL_SECONDS", "SERVER_STREAM", "UNARY", "Counts", "MethodCounts"]

# The kinds of methods, as the metrics of gRPC's other languages name them.
UNARY: Final = "unary"
SERVER_STREAM: Final = "server_stream"
BIDI_STREAM: Final = "bidi_stream"
_STREAMS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "/latchkey.v1.TokenService/Watch": BIDI_STREAM,
        "/grpc.health.v1.Health/Watch": SERVER_STREAM,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": BIDI_STREAM,
    }
)
# From half a millisecond, below which only a warm Verify stays, to the limit of every call.
CALL_SECONDS: Final = (
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
)
# Stands for every path that is not in `access/methods.py`: callers could make up any number.
_UNKNOWN: Final = "/unknown/unknown"


class MethodCounts:
    """The calls of one method."""

    __slots__ = ("codes", "kind", "method", "ok", "seconds", "service", "started")

    def __init__(self, path: str) -> None:
        _, self.service, self.method = path.split("/")
        self.kind = _STREAMS.get(path, UNARY)
        self.started = 0
        self.ok = 0
        """The calls that succeeded."""
        self.codes = Counter[str]()
        """The calls that failed, by the name of their gRPC status code."""
        self.seconds = Histogram(CALL_SECONDS)
        """The time from the start of a unary call to its answer."""

    def by_code(self) -> Counter[str]:
        """Return the finished calls by the name of their gRPC status code."""
        counts = Counter(self.codes)
        if self.ok:
            counts["OK"] = self.ok
        return counts


class Counts:
    """The counters of a worker. Event loop only."""

    def __init__(self) -> None:
        self.verdicts: Counter[Verdict] = Counter()
        self.failures: Counter[str] = Counter()
        """The calls that failed, by reason (docs/errors.md)."""
        self.oversized = 0
        """The verifies that were answered without a look at the secret, because it was too long."""
        self._methods = {path: MethodCounts(path) for path in METHODS}
        self._unknown = MethodCounts(_UNKNOWN)
        self._logged: Counter[str] = Counter()

    def method(self, path: str) -> MethodCounts:
        """Return the counters of a method. All paths that are not ours share one."""
        return self._methods.get(path, self._unknown)

    def methods(self) -> list[MethodCounts]:
        """Return the counters of all methods."""
        return [*self._methods.values(), self._unknown]

    def take(self) -> dict[str, int]:
        """Return what was counted since the last time, by name."""
        now = Counter({f"verdict.{v.name}": n for v, n in sorted(self.verdicts.items())})
        for counts in self.methods():
            for code, number in counts.by_code().items():
                now[f"{counts.method}.{code}"] += number
        news = now - self._logged
        self._logged = now
        return dict(news)

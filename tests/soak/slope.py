"""Decides whether a series grows, by a robust slope and its confidence range. Pure."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Limit", "Slope", "Trend", "blocks", "theil_sen", "trend"]

# Consecutive samples are correlated, but the confidence range assumes independence. Therefore the
# medians of blocks are used. A block is long enough for a garbage collection, or a few short
# connections, to end within it.
BLOCKS = 24
# With fewer blocks, a range at this confidence excludes nothing.
BLOCKS_MIN = 8
# Quantile of the normal distribution for 99 in 100, because each run judges about forty series.
Z = 2.576

Point = tuple[float, float]
"""Seconds, and the value at that time."""


@dataclass(frozen=True)
class Limit:
    """How much a series may rise within the judged time: the larger of the two."""

    absolute: float
    share: float
    """The rise as a share of the series' median."""


@dataclass(frozen=True)
class Slope:
    """Slope per second, with its 99 per cent confidence range."""

    per_second: float
    low: float
    high: float


@dataclass(frozen=True)
class Trend:
    """The trend of a series. `slope` is None if the series is too short."""

    median: float
    seconds: float
    limit: float
    slope: Slope | None
    grows: bool
    blocks: Sequence[Point] = ()
    """Medians of the judged samples, for display."""


def trend(points: Sequence[Point], limit: Limit) -> Trend:
    """Judge a series whose warm-up was already removed.

    It grows if it has certainly risen by more than `limit` allows, and continued to rise in the
    second half. A cache that fills up to its bound rises as well, but more and more slowly.
    """
    if not points:
        return Trend(math.nan, 0.0, limit.absolute, None, grows=False)
    median = statistics.median(value for _, value in points)
    seconds = points[-1][0] - points[0][0]
    allowed = max(limit.absolute, limit.share * abs(median))
    whole = blocks(points, BLOCKS)
    if len(whole) < BLOCKS_MIN:
        return Trend(median, seconds, allowed, None, grows=False)
    slope = theil_sen(whole)
    late = theil_sen(whole[len(whole) // 2 :])
    grows = slope.low * seconds > allowed and late.per_second * seconds > allowed
    return Trend(median, seconds, allowed, slope, grows, whole)


def blocks(points: Sequence[Point], count: int) -> list[Point]:
    """Return the medians of up to `count` blocks of points, in order."""
    count = min(count, len(points))
    edges = [len(points) * number // count for number in range(count + 1)] if count else []
    return [
        (
            statistics.median(at for at, _ in points[since:to]),
            statistics.median(value for _, value in points[since:to]),
        )
        for since, to in itertools.pairwise(edges)
    ]


def theil_sen(points: Sequence[Point]) -> Slope:
    """Return the median of the slopes between all pairs of points, which a quarter of outliers does
    not move, with its range by Kendall's statistic (Sen 1968). Needs at least two points."""
    slopes = sorted(
        (later - earlier) / (to - since)
        for number, (since, earlier) in enumerate(points)
        for to, later in points[number + 1 :]
        if to > since
    )
    n = len(points)
    spread = Z * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    last = len(slopes) - 1
    low = slopes[max(0, math.floor((len(slopes) - spread) / 2))]
    high = slopes[min(last, math.ceil((len(slopes) + spread) / 2))]
    return Slope(statistics.median(slopes), low, high)

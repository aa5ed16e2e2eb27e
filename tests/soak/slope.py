"""Does a series grow? A robust slope, how certain it is, and a verdict. Pure."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Limit", "Slope", "Trend", "blocks", "theil_sen", "trend"]

# Samples that follow each other are alike, and the confidence range assumes that they are not: so
# it is the medians of blocks that are looked at. A block is long enough for a collection of
# garbage, or some connections that come and go, to be over within it.
BLOCKS = 24
# With fewer no range at this confidence excludes anything.
BLOCKS_MIN = 8
# Of the normal distribution: 99 in 100, since some forty series are judged in each run.
Z = 2.576

Point = tuple[float, float]
"""Seconds, and what was there then."""


@dataclass(frozen=True)
class Limit:
    """What a series may rise within the time that is judged: the larger of the two."""

    absolute: float
    share: float
    """Of its own median."""


@dataclass(frozen=True)
class Slope:
    """Per second, with the range that it is in with 99 per cent confidence."""

    per_second: float
    low: float
    high: float


@dataclass(frozen=True)
class Trend:
    """What becomes of a series. `slope` None: it is too short to tell."""

    median: float
    seconds: float
    limit: float
    slope: Slope | None
    grows: bool
    blocks: Sequence[Point] = ()
    """Medians of what was judged, to see by."""


def trend(points: Sequence[Point], limit: Limit) -> Trend:
    """Judge a series from which the warm-up is left out already.

    It grows if it is certain to have risen by more than `limit` allows, and went on to in the
    second half: what fills up to its bound rises as well, but less and less.
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
    """Return the median of the slopes between all pairs of points, which a quarter of outliers
    does not move, with its range by Kendall's statistic (Sen 1968). At least two points."""
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

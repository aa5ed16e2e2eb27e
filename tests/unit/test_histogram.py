"""Observations fall into the right buckets."""

from latchkey_service.histogram import Histogram


def test_bounds_are_inclusive() -> None:
    """A value equal to a bound belongs to its bucket, and a larger one to the next."""
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 3):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.total == 8


def test_the_latest_named_request_is_kept() -> None:
    """Each bucket keeps the latest observation that named its request."""
    histogram = Histogram((1,))
    histogram.observe(0.5, "old")
    histogram.observe(0.6, "new")
    histogram.observe(0.7)
    assert histogram.exemplars[0] is not None
    assert histogram.exemplars[0][:2] == ("new", 0.6)
    assert histogram.exemplars[1] is None

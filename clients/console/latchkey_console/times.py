"""Times in words, in UTC. In browsers with JavaScript, the script converts them to local time.

The command line shares `span`, so that both round alike. Pure: the caller passes `now`.
"""

from datetime import UTC, datetime, timedelta
from typing import Final

__all__ = ["ago", "exact", "iso", "minute", "span"]

# The largest unit with a count of at least two is precise enough for planning. There are no months,
# so a token for 365 days expires "in 365 days".
_UNITS: Final = (
    ("year", 365 * 86_400),
    ("day", 86_400),
    ("hour", 3_600),
    ("minute", 60),
    ("second", 1),
)


def iso(moment: datetime) -> str:
    """Return `moment` for machines: RFC 3339 in UTC, to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def minute(moment: datetime) -> str:
    """Return "3 Nov 2026, 14:05 UTC"."""
    return f"{_day(moment)}, {moment.astimezone(UTC):%H:%M} UTC"


def exact(moment: datetime) -> str:
    """Return "3 Nov 2026, 14:05:22 UTC"."""
    return f"{_day(moment)}, {moment.astimezone(UTC):%H:%M:%S} UTC"


def ago(moment: datetime, now: datetime) -> str:
    """Return "in 29 days", "3 hours ago" or "just now"."""
    difference = moment - now
    if abs(difference) < timedelta(minutes=1):
        return "just now" if difference <= timedelta() else "in a moment"
    words = span(abs(difference))
    return f"{words} ago" if difference < timedelta() else f"in {words}"


def span(duration: timedelta) -> str:
    """Return for example "29 days": rounded, in the largest unit with a count of at least two.

    Rounded to the nearest count, so that a token for 90 days expires "in 90 days" a minute later.
    """
    total = duration.total_seconds()
    for name, seconds in _UNITS:
        if total >= 2 * seconds:
            return f"{round(total / seconds)} {name}s"
    return "a moment"


def _day(moment: datetime) -> str:
    moment = moment.astimezone(UTC)
    return f"{moment.day} {moment:%b} {moment.year}"

"""Times in words, in UTC. In browsers with JavaScript, the script converts them to local time.

Pure: the caller passes `now`.
"""

from datetime import UTC, datetime, timedelta
from typing import Final

__all__ = ["ago", "day", "exact", "iso", "span"]

# Unit, its seconds, and the smallest count to use it for. A month has 30 days here. That is precise
# enough from 4 months on; below, the page counts days, for tokens of the common 90 days.
_UNITS: Final = (
    ("year", 365 * 86_400, 2),
    ("month", 30 * 86_400, 4),
    ("day", 86_400, 2),
    ("hour", 3_600, 2),
    ("minute", 60, 2),
)


def iso(moment: datetime) -> str:
    """Return `moment` for machines: RFC 3339 in UTC, to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def day(moment: datetime) -> str:
    """Return "3 Nov 2026", in UTC."""
    moment = moment.astimezone(UTC)
    return f"{moment.day} {moment:%b} {moment.year}"


def exact(moment: datetime) -> str:
    """Return "3 Nov 2026, 14:05:22 UTC"."""
    return f"{day(moment)}, {moment.astimezone(UTC):%H:%M:%S} UTC"


def ago(moment: datetime, now: datetime) -> str:
    """Return "in 29 days", "3 hours ago" or "just now"."""
    difference = moment - now
    if abs(difference) < timedelta(minutes=1):
        return "just now" if difference <= timedelta() else "in a moment"
    words = span(abs(difference))
    return f"{words} ago" if difference < timedelta() else f"in {words}"


def span(duration: timedelta) -> str:
    """Return for example "29 days": rounded down, in the largest unit with a sufficient count."""
    total = duration.total_seconds()
    for name, seconds, least in _UNITS:
        if total >= least * seconds:
            return f"{int(total // seconds)} {name}s"
    return "a minute"

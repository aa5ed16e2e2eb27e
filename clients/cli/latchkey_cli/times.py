"""Moments and durations for people. Pure, except that it reads the local time zone."""

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Final

from latchkey_console.times import span

__all__ = ["NEVER", "Expiry", "local", "parse_duration", "parse_expiry", "relative"]

_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_DURATION: Final = re.compile(r"([0-9]{1,9})([smhdw])")
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_LAST_SECOND: Final = time(23, 59, 59)
# RFC 3339 §5.6. datetime.fromisoformat accepts more formats, including times without a zone.
_RFC3339: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?"
    r"([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


@dataclass(frozen=True, slots=True)
class Expiry:
    """When a new token expires: at a moment, after a duration, or never if neither is set."""

    expire_time: datetime | None = None
    ttl: timedelta | None = None


NEVER: Final = Expiry()


def parse_expiry(text: str, day: time = _LAST_SECOND) -> Expiry:
    """Parse the value of `--expires`. Raises ValueError, whose text lists the accepted formats.

    A duration stays a duration: it starts on the service's clock. A date means the time `day` of
    that day in local time: for an expiry the last second, as on the page, because a token "until
    Friday" works on Friday, and lists show it with that date.
    """
    if text.lower() == "never":
        return NEVER
    try:
        if _DURATION.fullmatch(text):
            ttl = parse_duration(text)
            if not ttl:
                raise ValueError("a duration must be longer than 0")
            return Expiry(ttl=ttl)
        if _DATE.fullmatch(text):
            moment = datetime.combine(date.fromisoformat(text), day)
            return Expiry(expire_time=moment.astimezone())
        if _RFC3339.fullmatch(text):
            return Expiry(expire_time=datetime.fromisoformat(text.upper()))
    except OverflowError:
        raise ValueError("too far in the future; use 'never' for no expiry") from None
    raise ValueError(
        "give a duration (90m, 12h, 30d), a date (2030-01-31), a time with a zone "
        "(2030-01-31T18:00:00Z) or never"
    )


def parse_duration(text: str) -> timedelta:
    """Parse a duration such as 90m, 12h or 7d. Raises ValueError or OverflowError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("give a duration (90m, 12h, 30d)")
    return timedelta(seconds=int(match[1]) * _SECONDS[match[2]])


def local(moment: datetime, *, seconds: bool = False) -> str:
    """Return `moment` in local time, with its zone."""
    try:
        moment = moment.astimezone()
    except (OverflowError, OSError, ValueError):
        # At the ends of the calendar, some zones have no local time.
        moment = moment.astimezone(UTC)
    return moment.strftime(f"%Y-%m-%d %H:%M{':%S' if seconds else ''} %Z")


def relative(moment: datetime, now: datetime) -> str:
    """Return "in 29 days" or "3 hours ago"."""
    difference = moment - now
    words = span(abs(difference))
    return f"{words} ago" if difference < timedelta() else f"in {words}"

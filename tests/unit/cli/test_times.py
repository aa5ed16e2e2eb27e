from datetime import UTC, datetime, timedelta

import pytest
from latchkey_cli.restrictions import past
from latchkey_cli.times import NEVER, Expiry, local, parse_expiry, relative
from latchkey_console.forms import last_second

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expiry"),
    [
        ("never", NEVER),
        ("NEVER", NEVER),
        ("90m", Expiry(ttl=timedelta(minutes=90))),
        ("12h", Expiry(ttl=timedelta(hours=12))),
        ("30d", Expiry(ttl=timedelta(days=30))),
        ("2w", Expiry(ttl=timedelta(weeks=2))),
        ("2030-01-31T18:00:00Z", Expiry(datetime(2030, 1, 31, 18, tzinfo=UTC))),
        ("2030-01-31t18:00:00.5+02:00", Expiry(datetime(2030, 1, 31, 16, 0, 0, 500_000, UTC))),
    ],
)
def test_expiry_is_a_duration_a_moment_or_never(text: str, expiry: Expiry) -> None:
    """Every format in the help text is accepted and has one meaning."""
    assert parse_expiry(text) == expiry


def test_a_token_works_until_the_end_of_its_last_day() -> None:
    """A date means its last second in local time, as on the page. In a filter, it means the first
    moment of the day."""
    moment = parse_expiry("2030-01-31").expire_time
    assert moment is not None
    assert moment == last_second("2030-01-31", moment.isoformat(), NOW)
    assert moment.replace(tzinfo=None) == datetime(2030, 1, 31, 23, 59, 59)
    assert past("2026-01-31").replace(tzinfo=None) == datetime(2026, 1, 31)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "30",
        "1y",
        "-1d",
        "0m",
        "1.5h",
        "30 d",
        "99999999999d",
        "999999999w",
        "2030-02-30",
        "20300131",
        "2030-01-31T18:00:00",
        "2030-01-31 18:00",
        "tomorrow",
        "٣d",
    ],
)
def test_ambiguous_expiry_is_refused(text: str) -> None:
    """Times without a zone and units that the help does not list are refused, never guessed."""
    with pytest.raises(ValueError, match=r"\w+"):
        parse_expiry(text)


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (timedelta(days=29, hours=23, minutes=59), "in 30 days"),
        (timedelta(hours=36), "in 36 hours"),
        (timedelta(hours=26), "in 26 hours"),
        (timedelta(minutes=90), "in 90 minutes"),
        (timedelta(seconds=45), "in 45 seconds"),
        (timedelta(), "in a moment"),
        (-timedelta(minutes=5), "5 minutes ago"),
        (timedelta(days=1200), "in 3 years"),
    ],
)
def test_relative_times_use_one_unit(difference: timedelta, words: str) -> None:
    """A time difference is expressed in one unit."""
    assert relative(NOW + difference, NOW) == words


def test_the_ends_of_the_calendar_are_shown() -> None:
    """A moment without a local time is shown in UTC and raises no error."""
    assert local(datetime.max.replace(tzinfo=UTC)).startswith("9999-12-31")
    assert "0001-01-01" in local(datetime.min.replace(tzinfo=UTC)).rjust(20, "0")

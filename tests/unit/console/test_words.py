"""Times in words, and readable names."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_cli.times import relative
from latchkey_console.listing import Filter
from latchkey_console.text import visible
from latchkey_console.times import ago, exact, iso, minute
from latchkey_service.tokens import filters

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (timedelta(), "just now"),
        (timedelta(seconds=-59), "just now"),
        (timedelta(seconds=59), "in a moment"),
        (timedelta(minutes=-1), "60 seconds ago"),
        (timedelta(minutes=-3, seconds=-20), "3 minutes ago"),
        (timedelta(minutes=119), "in 119 minutes"),
        (timedelta(hours=-2), "2 hours ago"),
        (timedelta(hours=47), "in 47 hours"),
        (timedelta(days=90) - timedelta(seconds=1), "in 90 days"),
        (timedelta(days=89, hours=11), "in 89 days"),
        (timedelta(days=-120), "120 days ago"),
        (timedelta(days=365) - timedelta(seconds=1), "in 365 days"),
        (timedelta(days=729), "in 729 days"),
        (timedelta(days=-730), "2 years ago"),
        (timedelta(days=365 * 7000), "in 7000 years"),
    ],
)
def test_ago(difference: timedelta, words: str) -> None:
    """A difference uses the largest unit with a count of two, rounded to the nearest count."""
    assert ago(NOW + difference, NOW) == words


@given(st.timedeltas(timedelta(minutes=1), timedelta(days=4_000)))
def test_page_and_command_line_round_alike(difference: timedelta) -> None:
    """The page and the command line describe the same time in the same words."""
    for moment in (NOW + difference, NOW - difference):
        assert ago(moment, NOW) == relative(moment, NOW)


def test_times_are_in_utc() -> None:
    """Without JavaScript, times are in UTC and say so."""
    moment = datetime(2026, 11, 4, 1, 5, 9, tzinfo=timezone(timedelta(hours=2)))
    assert iso(moment) == "2026-11-03T23:05:09Z"
    assert minute(moment) == "3 Nov 2026, 23:05 UTC"
    assert exact(moment) == "3 Nov 2026, 23:05:09 UTC"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain & <b>", "plain & <b>"),
        ("Köln 東京 مفتاح", "Köln 東京 مفتاح"),
        ("👩‍👩‍👧‍👦", "👩‍👩‍👧‍👦"),
        ("a\u202eb", "a‹U+202E›b"),
        ("a\u2066b\u2069", "a‹U+2066›b‹U+2069›"),
        ("a\u200bb", "a‹U+200B›b"),
        ("a\x00\x1b", "a‹U+0000›‹U+001B›"),
        ("\U000e0041", "‹U+E0041›"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    """Invisible and misleading characters are written out; letters and emoji are unchanged."""
    assert visible(text) == shown


@given(st.text(max_size=100))
def test_every_search_is_valid(text: str) -> None:
    """Whatever a visitor types, the service accepts the search."""
    search = Filter.read({"q": text}).text
    assert filters.filter_violations(filters.Filter(search=search)) == []

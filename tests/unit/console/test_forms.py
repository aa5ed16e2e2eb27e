"""The form for a new token: what it makes of what was typed."""

from datetime import UTC, datetime, timedelta

import pytest
from latchkey import FieldViolation, Scope
from latchkey_console.forms import NewToken, TokenForm, parse_body

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


def errors(form: TokenForm) -> dict[str, str]:
    """Return the mistakes that are found."""
    checked = form.checked(NOW)
    assert isinstance(checked, TokenForm), checked
    return dict(checked.errors)


def made(form: TokenForm) -> NewToken:
    """Return what is to be created."""
    checked = form.checked(NOW)
    assert isinstance(checked, NewToken), checked
    return checked


def test_defaults_are_the_safe_ones() -> None:
    """An untouched form reads only, and ends."""
    assert made(TokenForm(name="x")) == NewToken("x", Scope.READ, None, timedelta(days=90))


@pytest.mark.parametrize(
    ("expiry", "ttl"),
    [
        ("30", timedelta(days=30)),
        ("90", timedelta(days=90)),
        ("365", timedelta(days=365)),
        ("never", None),
    ],
)
def test_expiry(expiry: str, ttl: timedelta | None) -> None:
    """Each choice is a duration, which the service's clock starts, or none."""
    new = made(TokenForm(name=" x ", scope="write", expiry=expiry))
    assert new == NewToken("x", Scope.WRITE, None, ttl)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("", datetime(2027, 1, 31, tzinfo=UTC)),
        ("2027-01-30T23:00:00.000Z", datetime(2027, 1, 30, 23, tzinfo=UTC)),
        ("2027-01-31T12:00:00Z", datetime(2027, 1, 31, 12, tzinfo=UTC)),
        # Another day, no zone, no moment: the date itself counts.
        ("2027-03-01T00:00:00Z", datetime(2027, 1, 31, tzinfo=UTC)),
        ("2027-01-30T23:00:00", datetime(2027, 1, 31, tzinfo=UTC)),
        ("soon", datetime(2027, 1, 31, tzinfo=UTC)),
    ],
)
def test_date_begins_in_the_zone_that_the_script_says(start: str, expected: datetime) -> None:
    """The script says when the date begins for the viewer, and nothing else."""
    new = made(TokenForm(name="x", expiry="date", date="2027-01-31", date_start=start))
    assert (new.expire_time, new.ttl) == (expected, None)


@pytest.mark.parametrize(
    ("form", "field", "words"),
    [
        (TokenForm(name=" "), "name", "Give the token a name"),
        (TokenForm(name="x" * 65), "name", "65 characters"),
        (TokenForm(name="a\nb"), "name", "line break"),
        (TokenForm(name="a\u2028b"), "name", "line break"),
        (TokenForm(name="x", scope=""), "scope", "Choose"),
        (TokenForm(name="x", scope="admin"), "scope", "Choose"),
        (TokenForm(name="x", expiry=""), "expiry", "Choose"),
        (TokenForm(name="x", expiry="1"), "expiry", "Choose"),
        (TokenForm(name="x", expiry="date"), "expiry", "Choose a date"),
        (TokenForm(name="x", expiry="date", date="31.1.2027"), "expiry", "not a date"),
        (TokenForm(name="x", expiry="date", date="2027-02-30"), "expiry", "not a date"),
        (TokenForm(name="x", expiry="date", date="2026-06-01"), "expiry", "begun already"),
    ],
)
def test_mistakes(form: TokenForm, field: str, words: str) -> None:
    """Each mistake is told at its field, and what was typed stays."""
    found = errors(form)
    assert list(found) == [field]
    assert words in found[field]
    checked = form.checked(NOW)
    assert isinstance(checked, TokenForm)
    assert (checked.name, checked.scope, checked.expiry) == (form.name, form.scope, form.expiry)


def test_all_mistakes_are_told_at_once() -> None:
    """Nobody has to press the button once for each mistake."""
    assert set(errors(TokenForm(scope="", expiry=""))) == {"name", "scope", "expiry"}


def test_64_of_the_longest_characters_are_a_name() -> None:
    """A name is counted in characters, as the service counts."""
    assert made(TokenForm(name="\U0001f511" * 64)).name == "\U0001f511" * 64


def test_what_the_service_refuses_stands_at_its_field() -> None:
    """The service's words come at the field that they are about; the rest at the form's."""
    form = TokenForm(name="x").refused(
        [FieldViolation("name", "must not contain a secret"), FieldViolation("ttl", "is odd.")]
    )
    assert form.errors == {
        "name": "The name must not contain a secret.",
        "expiry": "The expiry is odd.",
    }
    assert list(TokenForm().refused([]).errors) == [""]


def test_body() -> None:
    """A body is what a browser sends, and nothing that could be read in two ways."""
    assert parse_body(b"name=K%C3%B6ln+1&scope=read&date=") == {
        "name": "Köln 1",
        "scope": "read",
        "date": "",
    }
    for body in (b"a=1&a=2", b"a=%ff", b"\xff=1", b"&".join(b"a%d=1" % n for n in range(40))):
        with pytest.raises(ValueError, match=r".+"):
            parse_body(body)

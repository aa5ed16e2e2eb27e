"""The form for a new token: how it interprets its input."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from latchkey import FieldViolation, Limits, RateLimit, Scope
from latchkey_console.forms import NewToken, TokenForm, expiries, last_day, parse_body

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


def limited(**duration: int) -> Limits:
    return Limits(max_ttl=timedelta(**duration), require_expiry=True)


def errors(form: TokenForm) -> dict[str, str]:
    """Return the form's errors."""
    checked = form.checked(NOW)
    assert isinstance(checked, TokenForm), checked
    return dict(checked.errors)


def made(form: TokenForm) -> NewToken:
    """Return the token to create."""
    checked = form.checked(NOW)
    assert isinstance(checked, NewToken), checked
    return checked


def test_defaults_are_the_safe_ones() -> None:
    """An unchanged form asks for a read-only token that expires."""
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
    """Each choice is a duration, which starts on the service's clock, or no expiry."""
    new = made(TokenForm(name=" x ", scope="write", expiry=expiry))
    assert new == NewToken("x", Scope.WRITE, None, ttl)


@pytest.mark.parametrize(
    ("typed", "limit"),
    [
        ("", None),
        (" ", None),
        ("100/minute", RateLimit(100, timedelta(minutes=1))),
        (" 5/second, burst 20 ", RateLimit(5, timedelta(seconds=1), 20)),
        ("1000000/hour", RateLimit(1_000_000, timedelta(hours=1))),
    ],
)
def test_rate_limit(typed: str, limit: RateLimit | None) -> None:
    """A limit is optional, and means what was typed."""
    assert made(TokenForm(name="x", rate=typed)).rate_limit == limit


def test_further_fields() -> None:
    """Description, networks, permissions and labels are optional, and mean what was typed."""
    form = TokenForm(
        name="x",
        description=" two\r\nlines ",
        networks="192.0.2.0/24\r\n2001:db8::/32",
        permissions="orders:read, stock:*",
        labels="team = payments\r\ntier=",
    )
    new = made(form)
    assert new == NewToken(
        "x",
        Scope.READ,
        None,
        timedelta(days=90),
        description="two\nlines",
        allowed_networks=("192.0.2.0/24", "2001:db8::/32"),
        permissions=("orders:read", "stock:*"),
        labels=(("team", "payments"), ("tier", "")),
    )
    assert form.has_more
    assert not TokenForm(name="x", rate="5/second").has_more


@pytest.mark.parametrize(
    ("limits", "offered", "chosen", "last"),
    [
        (Limits(), ["30", "90", "365", "never", "date"], "90", ""),
        (Limits(require_expiry=True), ["30", "90", "365", "date"], "90", ""),
        (limited(days=1_000), ["30", "90", "365", "date"], "90", "2029-02-24"),
        (limited(days=365), ["30", "90", "365", "date"], "90", "2027-05-31"),
        (limited(days=180), ["30", "90", "15552000s", "date"], "90", "2026-11-27"),
        (limited(days=30), ["30", "date"], "30", "2026-06-30"),
        (limited(hours=12), ["43200s"], "43200s", "2026-06-01"),
    ],
)
def test_form_offers_only_what_is_allowed(
    limits: Limits, offered: list[str], chosen: str, last: str
) -> None:
    """Within the service's limit, the form offers its durations, the limit itself, and dates that
    end within it. The preselected choice is one of them."""
    assert [value for value, _ in expiries(limits)] == offered
    form = TokenForm.within(limits)
    assert form.expiry == chosen
    assert last_day(limits, NOW) == last
    new = made(replace(form, name="x"))
    assert new.ttl is not None
    assert limits.max_ttl is None or new.ttl <= limits.max_ttl
    assert dict(expiries(limits)).get("43200s", "12 hours") == "12 hours"


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("", datetime(2027, 1, 31, 23, 59, 59, tzinfo=UTC)),
        ("2027-01-31T22:59:59.000Z", datetime(2027, 1, 31, 22, 59, 59, tzinfo=UTC)),
        ("2027-02-01T11:59:59Z", datetime(2027, 2, 1, 11, 59, 59, tzinfo=UTC)),
        # With another day, no zone, or no time at all, only the date counts.
        ("2027-03-01T00:00:00Z", datetime(2027, 1, 31, 23, 59, 59, tzinfo=UTC)),
        ("2027-01-30T23:00:00", datetime(2027, 1, 31, 23, 59, 59, tzinfo=UTC)),
        ("soon", datetime(2027, 1, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_date_ends_in_the_scripts_time_zone(end: str, expected: datetime) -> None:
    """The token lasts until the date ends. The script can only shift that to the viewer's zone."""
    new = made(TokenForm(name="x", expiry="date", date="2027-01-31", date_end=end))
    assert (new.expire_time, new.ttl) == (expected, None)


def test_date_may_be_today() -> None:
    """A token may expire when today ends, which the viewer's zone decides."""
    today = TokenForm(name="x", expiry="date", date="2026-06-01")
    assert made(today).expire_time == datetime(2026, 6, 1, 23, 59, 59, tzinfo=UTC)
    ended = TokenForm(name="x", expiry="date", date="2026-06-01", date_end="2026-06-01T09:59:59Z")
    assert "already ended" in errors(ended)["expiry"]


@pytest.mark.parametrize(
    ("form", "field", "words"),
    [
        (TokenForm(name=" "), "name", "Enter a name"),
        (TokenForm(name="x" * 65), "name", "65 characters"),
        (TokenForm(name="a\nb"), "name", "line break"),
        (TokenForm(name="a\u2028b"), "name", "line break"),
        (TokenForm(name="x", scope=""), "scope", "Choose"),
        (TokenForm(name="x", scope="admin"), "scope", "Choose"),
        (TokenForm(name="x", expiry=""), "expiry", "Choose"),
        (TokenForm(name="x", expiry="1"), "expiry", "Choose"),
        (TokenForm(name="x", expiry="date"), "expiry", "Choose a date"),
        (TokenForm(name="x", expiry="date", date="31.1.2027"), "expiry", "not a valid date"),
        (TokenForm(name="x", expiry="date", date="2027-02-30"), "expiry", "not a valid date"),
        (TokenForm(name="x", expiry="date", date="2026-05-31"), "expiry", "already ended"),
        (TokenForm(name="x", rate="100"), "rate", "100/minute"),
        (TokenForm(name="x", rate="100/day"), "rate", "100/minute"),
        (TokenForm(name="x", rate="0/minute"), "rate", "from 1 to 1,000,000"),
        (TokenForm(name="x", rate="1000001/hour"), "rate", "from 1 to 1,000,000"),
        (TokenForm(name="x", rate="1/hour, burst 1000001"), "rate", "from 1 to 1,000,000"),
        (TokenForm(name="x", description="x" * 257), "description", "257 characters"),
        (TokenForm(name="x", networks="office"), "networks", "“office” is not a network"),
        (TokenForm(name="x", permissions="orders"), "permissions", "is not a permission"),
        (TokenForm(name="x", labels="team"), "labels", "“team” is not a label"),
    ],
)
def test_errors_appear_at_their_field(form: TokenForm, field: str, words: str) -> None:
    """Each error appears at its field, and the form keeps its input."""
    found = errors(form)
    assert list(found) == [field]
    assert words in found[field]
    checked = form.checked(NOW)
    assert isinstance(checked, TokenForm)
    assert (checked.name, checked.scope, checked.expiry) == (form.name, form.scope, form.expiry)


def test_all_errors_are_reported_at_once() -> None:
    """One submission reports every error."""
    assert set(errors(TokenForm(scope="", expiry=""))) == {"name", "scope", "expiry"}


def test_name_length_counts_characters() -> None:
    """The length limit counts characters, as the service does."""
    assert made(TokenForm(name="\U0001f511" * 64)).name == "\U0001f511" * 64


def test_service_errors_appear_at_their_field() -> None:
    """The service's errors appear at their fields, and all others at the top of the form."""
    form = TokenForm(name="x").refused(
        [FieldViolation("name", "must not contain a secret"), FieldViolation("ttl", "is odd.")]
    )
    assert form.errors == {
        "name": "The name must not contain a secret.",
        "expiry": "The expiry is odd.",
    }
    assert list(TokenForm().refused([]).errors) == [""]


def test_body() -> None:
    """A body must be what a browser sends. Ambiguous bodies are refused."""
    assert parse_body(b"name=K%C3%B6ln+1&scope=read&date=") == {
        "name": "Köln 1",
        "scope": "read",
        "date": "",
    }
    ids = b"ids=a&ids=b+c&name=x&ids=d"
    assert parse_body(ids, "ids") == {"ids": "a b c d", "name": "x"}
    assert parse_body(b"", "ids") == {"ids": ""}
    with pytest.raises(ValueError, match="duplicate"):
        parse_body(ids + b"&name=y", "ids")
    for body in (b"a=1&a=2", b"a=%ff", b"\xff=1", b"&".join(b"a%d=1" % n for n in range(40))):
        with pytest.raises(ValueError, match=r".+"):
            parse_body(body)

"""The forms that change a token: how they interpret their input."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from latchkey import FieldViolation, RateLimit, Scope, Token, TokenSecret
from latchkey_console.editing import ENDS, EditForm, ReplaceForm, Replacement

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
TOKEN = Token(
    id="tok_1",
    account_id="acme",
    name="deploy job",
    scope=Scope.WRITE,
    create_time=NOW - timedelta(days=1),
    expire_time=NOW + timedelta(days=90),
    description="two\nlines",
    allowed_networks=("192.0.2.0/24", "2001:db8::/32"),
    rate_limit=RateLimit(100, timedelta(minutes=1), 20),
)


def edit(**fields: Any) -> "dict[str, Any] | EditForm":
    """Return what a save changes if the visitor types these fields, or the form with its errors."""
    return replace(EditForm.of(TOKEN), **fields).checked(NOW)


@pytest.mark.parametrize(
    ("typed", "changes"),
    [
        ({}, {}),
        ({"name": " new name "}, {"name": "new name"}),
        ({"name": " deploy job "}, {}),
        ({"scope": "read"}, {"scope": Scope.READ}),
        ({"description": "two\r\nlines\r\n"}, {}),
        ({"description": " "}, {"description": ""}),
        ({"networks": "192.0.2.0/24\r\n2001:db8::/32\r\n"}, {}),
        ({"networks": ""}, {"allowed_networks": []}),
        (
            {"networks": "198.51.100.7, 10.0.0.0/8"},
            {"allowed_networks": ["198.51.100.7", "10.0.0.0/8"]},
        ),
        ({"rate": " 100/minute, burst 20 "}, {}),
        ({"rate": ""}, {"rate_limit": None}),
        ({"rate": "5/second"}, {"rate_limit": RateLimit(5, timedelta(seconds=1))}),
        ({"expiry": "never"}, {"expire_time": None}),
        ({"expiry": "30"}, {"expire_time": NOW + timedelta(days=30)}),
        (
            {"expiry": "date", "date": "2026-12-31"},
            {"expire_time": datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)},
        ),
    ],
)
def test_a_save_contains_only_what_was_changed(
    typed: dict[str, str], changes: dict[str, Any]
) -> None:
    """Fields that the visitor did not change are not sent, so others' changes to them stay."""
    assert edit(**typed) == changes


@pytest.mark.parametrize(
    ("typed", "place", "words"),
    [
        ({"name": ""}, "name", "Enter a name"),
        ({"name": "x" * 65}, "name", "65 characters"),
        ({"scope": "admin"}, "scope", "Choose"),
        ({"expiry": "1"}, "expiry", "Choose"),
        ({"expiry": "date", "date": "2026-05-31"}, "expiry", "already ended"),
        ({"description": "x" * 257}, "description", "257 characters"),
        ({"description": "a\x00b"}, "description", "control character"),
        ({"networks": "office"}, "networks", "“office” is not a network"),
        ({"rate": "100"}, "rate", "100/minute"),
        ({"rate": "100/day"}, "rate", "100/minute"),
        ({"rate": "-1/hour"}, "rate", "100/minute"),
        ({"networks": "10.1.2.3/8"}, "networks", "Did you mean 10.0.0.0/8?"),
        ({"networks": "\n".join(f"10.0.0.{n}" for n in range(33))}, "networks", "33 networks"),
    ],
)
def test_errors_appear_at_their_field(typed: dict[str, str], place: str, words: str) -> None:
    """Each error appears at its field, and the form keeps its input."""
    form = edit(**typed)
    assert isinstance(form, EditForm)
    assert list(form.errors) == [place]
    assert words in form.errors[place]
    assert {name: getattr(form, name) for name in typed} == typed


def test_the_form_survives_the_browser() -> None:
    """What the page sends back is the form that it showed."""
    form = EditForm.of(TOKEN)
    names = ("name", "scope", "description", "networks", "rate", "expiry")
    sent = {name: getattr(form, name) for name in names}
    sent |= {f"was_{name}": value for name, value in form.before.items()}
    assert EditForm.read(sent) == form
    assert isinstance(EditForm.read({}).checked(NOW), EditForm)


def test_service_errors_appear_at_their_field() -> None:
    """The service's errors appear at their fields, and all others at the top of the form."""
    form = EditForm.of(TOKEN).refused(
        [
            FieldViolation("token.allowed_networks[0]", "is odd."),
            FieldViolation("token.rate_limit.burst", "must be 0 to 1,000,000"),
            FieldViolation("description", "must not contain a secret"),
            FieldViolation("labels", "are odd"),
        ]
    )
    assert form.errors == {
        "networks": "An allowed network is odd.",
        "rate": "The burst of the rate limit must be 0 to 1,000,000.",
        "description": "The description must not contain a secret.",
        "": "labels are odd.",
    }
    assert list(form.refused([]).errors) == [""]


def test_replacing_a_token_that_ends_soon_offers_a_later_expiry() -> None:
    """A new secret of a token that is about to expire would not help by itself."""
    assert ReplaceForm.of(TOKEN, NOW) == ReplaceForm("day", "keep")
    soon = replace(TOKEN, expire_time=NOW + timedelta(days=14))
    assert ReplaceForm.of(soon, NOW) == ReplaceForm("day", "90")
    assert ReplaceForm.of(replace(TOKEN, expire_time=None), NOW).expiry == "keep"


def test_leaked_secret_is_replaced_at_once_by_default() -> None:
    """If the newest secret was reported as leaked, the form suggests to end it at once."""
    leaked = TokenSecret(hint="lk_…2345", create_time=NOW, leak_report_time=NOW)
    assert ReplaceForm.of(replace(TOKEN, secrets=(leaked,)), NOW).ends == "now"
    # Programs may need the newest secret.
    newest = replace(leaked, leak_report_time=None)
    assert ReplaceForm.of(replace(TOKEN, secrets=(newest, leaked)), NOW).ends == "day"


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        (ReplaceForm("now", "keep"), Replacement("tok_1", "now", None)),
        (ReplaceForm("use", "365"), Replacement("tok_1", "use", timedelta(days=365))),
        (ReplaceForm("use", "43200s"), Replacement("tok_1", "use", timedelta(hours=12))),
        (ReplaceForm("use", "0s"), None),
        (ReplaceForm("", "keep"), None),
        (ReplaceForm("later", "keep"), None),
        (ReplaceForm("now", "never"), None),
    ],
)
def test_replacement(form: ReplaceForm, wanted: Replacement | None) -> None:
    """Only the offered choices replace a secret."""
    assert form.checked("tok_1") == wanted


def test_each_end_of_the_old_secret_has_one_meaning() -> None:
    """An end is a duration or the first use. Both together would end the old secret at once."""
    assert {name: (end.grace, end.on_first_use) for name, end in ENDS.items()} == {
        "day": (timedelta(days=1), False),
        "hour": (timedelta(hours=1), False),
        "week": (timedelta(days=7), False),
        "use": (None, True),
        "now": (timedelta(), False),
    }

"""The forms that change a token: how they interpret their input."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import pytest
from latchkey import FieldViolation, RateLimit, Scope, Token, TokenSecret
from latchkey_console.editing import ENDS, EditForm, ReplaceForm, Replacement
from latchkey_console.forms import TOKEN_BYTES_MAX, parse_body

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
    permissions=("orders:read", "stock:*"),
    labels={"team": "payments", "a=b\\": " c=d"},
    rate_limit=RateLimit(100, timedelta(minutes=1), 20),
)
LABELS = "a\\=b\\\\= c=d\nteam=payments"


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
        ({"permissions": "orders:read\r\nstock:*\r\n"}, {}),
        ({"permissions": "orders:read"}, {"permissions": ["orders:read"]}),
        (
            {"permissions": "stock:*, orders:read orders:cancel"},
            {"permissions": ["stock:*", "orders:read", "orders:cancel"]},
        ),
        ({"permissions": " "}, {"permissions": []}),
        ({"labels": f"\r\n{LABELS}\r\n".replace("\n", "\r\n")}, {}),
        ({"labels": ""}, {"labels": {}}),
        # A line that was not changed keeps its white space. Typed labels have none around them.
        (
            {"labels": LABELS.replace("team=payments", " team = sales=eu ")},
            {"labels": {"a=b\\": " c=d", "team": "sales=eu"}},
        ),
        ({"labels": "empty="}, {"labels": {"empty": ""}}),
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
        ({"permissions": "orders"}, "permissions", "“orders” is not a permission"),
        ({"permissions": "*:read"}, "permissions", "“*:read” is not a permission"),
        ({"permissions": "Orders:Read"}, "permissions", "Did you mean orders:read?"),
        (
            {"permissions": "\n".join(f"orders:{n}" for n in range(65))},
            "permissions",
            "65 permissions",
        ),
        ({"labels": "team"}, "labels", "“team” is not a label"),
        ({"labels": "=payments"}, "labels", "“=payments” is not a label"),
        ({"labels": "team=a\nteam=b"}, "labels", "“team” occurs twice"),
        ({"labels": f"{'x' * 64}=a"}, "labels", "64 characters"),
        ({"labels": f"team={'x' * 256}"}, "labels", "256 characters"),
        ({"labels": "team=a\x00b"}, "labels", "control character"),
        ({"labels": "\n".join(f"n{n}=a" for n in range(17))}, "labels", "17 labels"),
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
    assert form.labels == LABELS
    names = (*form.before, "expiry")
    sent = {name: getattr(form, name) for name in names}
    sent |= {f"was_{name}": value for name, value in form.before.items()}
    assert EditForm.read(sent) == form
    assert isinstance(EditForm.read({}).checked(NOW), EditForm)


def test_the_largest_form_fits() -> None:
    """The page accepts a form with the longest texts that a token may have, before and after."""
    key = "\U0001f511"
    labels = {f"{number:02}{key * 61}": key * 255 for number in range(16)}
    token = replace(
        TOKEN,
        name=key * 64,
        description=key * 256,
        allowed_networks=tuple(f"2001:db8:aaaa:bbbb:cccc:dddd:eeee:{n:04x}/128" for n in range(32)),
        permissions=tuple(f"{'x' * 29}{n:02}:{'y' * 31}" for n in range(64)),
        labels=labels,
    )
    form = EditForm.of(token)
    sent = {name: value.replace("\n", "\r\n") for name, value in form.before.items()}
    sent |= {f"was_{name}": value for name, value in sent.items()}
    # The names of the filter's fields, and of those that are always short.
    others = [*("account", "q", "access", "state", "review", "sort", "show", "page", "at")]
    others += ["id", "csrf", "expiry", "date", "date_end"]
    body = urlencode(sent | dict.fromkeys(others, key * 64)).encode()
    assert len(body) <= TOKEN_BYTES_MAX
    assert replace(EditForm.read(parse_body(body)), expiry="keep").checked(NOW) == {}


def test_service_errors_appear_at_their_field() -> None:
    """The service's errors appear at their fields, and all others at the top of the form."""
    form = EditForm.of(TOKEN).refused(
        [
            FieldViolation("token.allowed_networks[0]", "is odd."),
            FieldViolation("token.rate_limit.burst", "must be 0 to 1,000,000"),
            FieldViolation("description", "must not contain a secret"),
            FieldViolation('token.labels["team"]', "must have at most 255 characters"),
            FieldViolation("token.permissions[3]", "is odd"),
            FieldViolation("update_mask", "is odd"),
        ]
    )
    assert form.errors == {
        "networks": "An allowed network is odd.",
        "rate": "The burst of the rate limit must be 0 to 1,000,000.",
        "description": "The description must not contain a secret.",
        "labels": "A label must have at most 255 characters.",
        "permissions": "A permission is odd.",
        "": "update_mask is odd.",
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

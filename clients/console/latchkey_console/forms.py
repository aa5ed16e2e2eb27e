"""The form for a new token: its input, and the mistakes in each field. Pure.

The service has the final say. The checks here catch mistakes before a request is sent and explain
them in the form's own words.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Final
from urllib.parse import parse_qsl

from latchkey import FieldViolation, Limits, RateLimit, Scope

from latchkey_console.restrictions import (
    RESTRICTION_FIELDS,
    description_of,
    labels_of,
    networks_of,
    permissions_of,
)
from latchkey_console.times import span

__all__ = [
    "BODY_BYTES_MAX",
    "EXPIRY_DAYS",
    "NAME_LENGTH_MAX",
    "RATE_FIELDS",
    "SCOPES",
    "SELECTED_MAX",
    "SELECTION_BYTES_MAX",
    "TOKEN_BYTES_MAX",
    "NewToken",
    "TokenForm",
    "duration_of",
    "durations",
    "expiries",
    "last_day",
    "last_second",
    "name_mistake",
    "parse_body",
    "rate_limit_of",
]

NAME_LENGTH_MAX: Final = 64
# A name of 64 four-byte characters takes 768 bytes percent-encoded. The rest leaves room for the
# fields of a long filter.
BODY_BYTES_MAX: Final = 16_384
# A four-byte character takes 12 bytes, so 16 labels with 318 of them take 61 KB. The form of a
# change also sends the labels that it showed. The rest leaves room for the other fields.
TOKEN_BYTES_MAX: Final = 163_840
_FIELDS_MAX: Final = 32
# Tokens that can be selected at once: one page of the service, so that one call names them all.
SELECTED_MAX: Final = 500
# With 500 ids of 30 characters, each with the name of its field.
SELECTION_BYTES_MAX: Final = 32_768
EXPIRY_DAYS: Final[Mapping[str, int]] = {"30": 30, "90": 90, "365": 365}
# The longest lifetime that the service allows, in seconds, if the page offers that as a choice.
_LONGEST: Final = re.compile(r"([1-9][0-9]{0,9})s")
SCOPES: Final[Mapping[str, Scope]] = {"read": Scope.READ, "write": Scope.WRITE}
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
# With a shorter limit, there may be no day at whose end a token may expire.
_DATE_MIN: Final = timedelta(days=2)
# No zone is further from UTC, so no local day ends further from the end of the UTC day.
_ZONE_MAX: Final = timedelta(hours=14)
_CONTROL: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
# The service's limit of uses in a period, and of a burst.
_RATE_MAX: Final = 1_000_000
RATE_FIELDS: Final[Mapping[str, tuple[str, str]]] = {
    "rate_limit.count": ("rate", "The number of uses"),
    "rate_limit.period": ("rate", "The period of the rate limit"),
    "rate_limit.burst": ("rate", "The burst of the rate limit"),
}
# For each field of the service: the form field that shows its mistakes, and its name there.
_SERVICE_FIELDS: Final[Mapping[str, tuple[str, str]]] = {
    "name": ("name", "The name"),
    "scope": ("scope", "The access scope"),
    "expire_time": ("expiry", "The expiry"),
    "ttl": ("expiry", "The expiry"),
    **RESTRICTION_FIELDS,
    **RATE_FIELDS,
}


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token to create. At most one of `expire_time` and `ttl` is set; neither means no expiry."""

    name: str
    scope: Scope
    expire_time: datetime | None
    ttl: timedelta | None
    rate_limit: RateLimit | None = None
    description: str = ""
    allowed_networks: tuple[str, ...] = ()
    permissions: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenForm:
    """The fields as typed, and `errors` by field. The key "" holds errors of the whole form."""

    name: str = ""
    scope: str = "read"
    expiry: str = "90"
    date: str = ""
    date_end: str = ""
    """The end of the chosen date in the viewer's time zone, set by the script. Default: UTC."""
    rate: str = ""
    description: str = ""
    networks: str = ""
    permissions: str = ""
    labels: str = ""
    errors: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, fields: Mapping[str, str]) -> "TokenForm":
        """Return the submitted form unchanged, so that it can be shown again as typed."""
        values: dict[str, Any] = {name: fields.get(name, "") for name in _TYPED}
        return cls(**values)

    @property
    def typed(self) -> dict[str, str]:
        """Return all fields as they were submitted."""
        return {name: getattr(self, name) for name in _TYPED}

    @property
    def has_more(self) -> bool:
        """Return whether the visitor has used the fields that are hidden at first."""
        return any((self.description, self.networks, self.permissions, self.labels))

    @classmethod
    def within(cls, limits: Limits) -> "TokenForm":
        """Return an empty form whose expiry is within the limits."""
        offered = [value for value, _ in durations(limits)]
        return cls(expiry="90" if "90" in offered else offered[-1])

    def with_errors(self, errors: Mapping[str, str]) -> "TokenForm":
        """Return the form with these errors."""
        return replace(self, errors=errors)

    def checked(self, now: datetime) -> "NewToken | TokenForm":
        """Return the token to create, or the form with its errors."""
        errors = {}
        name = self.name.strip()
        if mistake := name_mistake(name):
            errors["name"] = mistake
        scope = SCOPES.get(self.scope)
        if scope is None:
            errors["scope"] = "Choose what the token may do."
        expire_time, ttl = None, None
        if self.expiry == "date":
            try:
                expire_time = last_second(self.date, self.date_end, now)
            except ValueError as error:
                errors["expiry"] = str(error)
        elif self.expiry != "never":
            # A duration, which starts on the service's clock.
            ttl = duration_of(self.expiry)
            if ttl is None:
                errors["expiry"] = "Choose when the token expires."
        parsed: dict[str, Any] = {}
        for place, (name_there, parse) in _PARSED.items():
            try:
                parsed[name_there] = parse(getattr(self, place))
            except ValueError as error:
                errors[place] = str(error)
        if errors or scope is None:
            return self.with_errors(errors)
        return NewToken(name, scope, expire_time, ttl, **parsed)

    def refused(self, violations: Iterable[FieldViolation]) -> "TokenForm":
        """Return the form with the service's violations as errors of their fields."""
        errors: dict[str, str] = {}
        for violation in violations:
            path = violation.field.partition("[")[0]
            place, subject = _SERVICE_FIELDS.get(path, ("", violation.field))
            errors.setdefault(place, f"{subject} {violation.description.rstrip('. ')}.")
        return self.with_errors(errors or {"": "The service did not accept this."})


def durations(limits: Limits) -> list[tuple[str, str]]:
    """Return the durations to offer, shortest first: form values and texts.

    The longest that the service allows is one of them, unless that is more than a year.
    """
    longest = limits.max_ttl
    allowed = [
        (value, f"{days} days")
        for value, days in EXPIRY_DAYS.items()
        if longest is None or timedelta(days=days) <= longest
    ]
    if longest is not None and longest <= timedelta(days=max(EXPIRY_DAYS.values())):
        known = [timedelta(days=EXPIRY_DAYS[value]) for value, _ in allowed]
        if longest not in known:
            allowed.append((f"{longest // timedelta(seconds=1)}s", span(longest)))
    return allowed


def expiries(limits: Limits) -> list[tuple[str, str]]:
    """Return all expiries to offer for a token: form values and texts."""
    offered = durations(limits)
    if not limits.require_expiry:
        offered.append(("never", "Never"))
    if limits.max_ttl is None or limits.max_ttl >= _DATE_MIN:
        offered.append(("date", "Date"))
    return offered


def last_day(limits: Limits, now: datetime) -> str:
    """Return the last date to offer, as a form value, or an empty string for any."""
    if limits.max_ttl is None:
        return ""
    # A token for a date lives until the end of that day.
    return (now.astimezone(UTC) + limits.max_ttl - timedelta(days=1)).date().isoformat()


def duration_of(value: str) -> timedelta | None:
    """Return the duration of a form value, or None if it is not one."""
    if value in EXPIRY_DAYS:
        return timedelta(days=EXPIRY_DAYS[value])
    match = _LONGEST.fullmatch(value)
    return timedelta(seconds=int(match[1])) if match else None


def name_mistake(name: str) -> str | None:
    """Return what is wrong with a name, in words for its field, or None."""
    if not name:
        return "Enter a name, so you can tell later what uses this token."
    if len(name) > NAME_LENGTH_MAX:
        return f"This name has {len(name)} characters. Use at most {NAME_LENGTH_MAX}."
    if any(unicodedata.category(character) in _CONTROL for character in name):
        return "The name contains a line break or control character. Remove it."
    return None


def rate_limit_of(text: str) -> RateLimit | None:
    """Return the rate limit as typed, or None for an empty text.

    Raises ValueError with a text for the page.
    """
    if not text.strip():
        return None
    try:
        limit = RateLimit.parse(text)
    except ValueError:
        raise ValueError("Write it as “100/minute” or “100/minute, burst 20”.") from None
    if not 1 <= limit.count <= _RATE_MAX or limit.burst > _RATE_MAX:
        raise ValueError(f"Use numbers from 1 to {_RATE_MAX:,}.")
    return limit


def last_second(day: str, end: str, now: datetime) -> datetime:
    """Return the last second of the chosen date. Raises ValueError with a text for the page.

    The last second, not the first of the next day, because lists show it with the chosen date.
    `end` is that moment in the viewer's time zone, as the script found it. Without it: UTC.
    """
    if not day:
        raise ValueError("Choose a date.")
    try:
        if not _DATE.fullmatch(day):
            raise ValueError(day)
        chosen = datetime.combine(date.fromisoformat(day), time(23, 59, 59), UTC)
    except ValueError:
        raise ValueError("This is not a valid date. Use the format 2027-01-31.") from None
    try:
        local = datetime.fromisoformat(end)
    except ValueError:
        local = chosen
    # The script may choose the time zone but not a different day.
    if local.tzinfo is not None and abs(local - chosen) <= _ZONE_MAX:
        chosen = local
    if chosen <= now:
        raise ValueError("This day has already ended. Choose a later one.")
    return chosen


_TYPED: Final = tuple(f.name for f in dataclass_fields(TokenForm) if f.name != "errors")
# The optional fields: their names in `NewToken`, and how to interpret what was typed.
_PARSED: Final[Mapping[str, tuple[str, Callable[[str], Any]]]] = {
    "rate": ("rate_limit", rate_limit_of),
    "description": ("description", description_of),
    "networks": ("allowed_networks", lambda typed: tuple(networks_of(typed))),
    "permissions": ("permissions", lambda typed: tuple(permissions_of(typed))),
    "labels": ("labels", lambda typed: tuple(labels_of(typed).items())),
}


def parse_body(body: bytes, repeated: str = "") -> dict[str, str]:
    """Return the fields of an application/x-www-form-urlencoded body. Raises ValueError.

    Rejects duplicate fields: a check might read one value and the code after it the other. The
    values of the field `repeated`, which has no spaces in them, are joined with spaces.
    """
    pairs = parse_qsl(
        body.decode("ascii"),
        keep_blank_values=True,
        max_num_fields=_FIELDS_MAX + (SELECTED_MAX if repeated else 0),
        encoding="utf-8",
        errors="strict",
    )
    values = [value for name, value in pairs if name == repeated]
    others = [pair for pair in pairs if pair[0] != repeated]
    fields = dict(others)
    if len(fields) != len(others):
        raise ValueError("duplicate form field")
    return fields | ({repeated: " ".join(values)} if repeated else {})

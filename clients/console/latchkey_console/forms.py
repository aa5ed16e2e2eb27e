"""The form for a new token: what was typed, and what is wrong with it, at which field. Pure.

The service has the last word on all of this; here mistakes are found before anything is sent, and
told in the words of the form.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Final
from urllib.parse import parse_qsl

from latchkey import FieldViolation, Scope

__all__ = ["BODY_BYTES_MAX", "NAME_LENGTH_MAX", "NewToken", "TokenForm", "parse_body"]

NAME_LENGTH_MAX: Final = 64
# 64 characters of four bytes, percent-encoded, is 768; the rest is what a long query carries along.
BODY_BYTES_MAX: Final = 16_384
_FIELDS_MAX: Final = 32
EXPIRY_DAYS: Final[Mapping[str, int]] = {"30": 30, "90": 90, "365": 365}
_EXPIRIES: Final = (*EXPIRY_DAYS, "never", "date")
_SCOPES: Final[Mapping[str, Scope]] = {"read": Scope.READ, "write": Scope.WRITE}
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
# No zone is further from UTC than this, so no day begins further from its beginning in UTC.
_ZONE_MAX: Final = timedelta(hours=14)
_CONTROL: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
# What the service calls a field, and where its mistakes are shown.
_SERVICE_FIELDS: Final[Mapping[str, tuple[str, str]]] = {
    "name": ("name", "The name"),
    "scope": ("scope", "The access scope"),
    "expire_time": ("expiry", "The expiry"),
    "ttl": ("expiry", "The expiry"),
}


@dataclass(frozen=True, slots=True)
class NewToken:
    """What to create. At most one of `expire_time` and `ttl` is set; neither: never expires."""

    name: str
    scope: Scope
    expire_time: datetime | None
    ttl: timedelta | None


@dataclass(frozen=True, slots=True)
class TokenForm:
    """What stands in the fields, as typed; `errors` by field, and "" for the form as a whole."""

    name: str = ""
    scope: str = "read"
    expiry: str = "90"
    date: str = ""
    date_start: str = ""
    """The chosen date's first moment in the viewer's zone, from the script; else it is UTC's."""
    errors: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, fields: Mapping[str, str]) -> "TokenForm":
        """Return what was sent. Nothing is dropped: it is shown again as it was typed."""
        return cls(
            name=fields.get("name", ""),
            scope=fields.get("scope", ""),
            expiry=fields.get("expiry", ""),
            date=fields.get("date", ""),
            date_start=fields.get("date_start", ""),
        )

    def with_errors(self, errors: Mapping[str, str]) -> "TokenForm":
        """Return the same with these mistakes."""
        return TokenForm(self.name, self.scope, self.expiry, self.date, self.date_start, errors)

    def checked(self, now: datetime) -> "NewToken | TokenForm":
        """Return what to create, or the form with its mistakes."""
        errors = {}
        name = self.name.strip()
        if not name:
            errors["name"] = "Give the token a name, so that you know later what uses it."
        elif len(name) > NAME_LENGTH_MAX:
            errors["name"] = f"This name has {len(name)} characters. Use at most {NAME_LENGTH_MAX}."
        elif any(unicodedata.category(character) in _CONTROL for character in name):
            errors["name"] = "The name has a line break or control character in it. Remove it."
        scope = _SCOPES.get(self.scope)
        if scope is None:
            errors["scope"] = "Choose what the token may do."
        expire_time, ttl = None, None
        if self.expiry == "date":
            try:
                expire_time = self._first_moment()
            except ValueError as error:
                errors["expiry"] = str(error)
            else:
                if expire_time <= now:
                    errors["expiry"] = "This date has begun already. Choose a later one."
        elif self.expiry not in _EXPIRIES:
            errors["expiry"] = "Choose when the token ends."
        elif self.expiry != "never":
            # A duration, for the service's clock to start it.
            ttl = timedelta(days=EXPIRY_DAYS[self.expiry])
        if errors or scope is None:
            return self.with_errors(errors)
        return NewToken(name, scope, expire_time, ttl)

    def refused(self, violations: Iterable[FieldViolation]) -> "TokenForm":
        """Return the form with what the service found wrong, at the fields that it is about."""
        errors: dict[str, str] = {}
        for violation in violations:
            place, subject = _SERVICE_FIELDS.get(violation.field, ("", violation.field))
            errors.setdefault(place, f"{subject} {violation.description.rstrip('. ')}.")
        return self.with_errors(errors or {"": "Latchkey did not accept this."})

    def _first_moment(self) -> datetime:
        """Return when the chosen date begins. Raises ValueError, whose text is for the page.

        As on the command line, a token ends when the date begins: when in doubt, sooner.
        """
        if not self.date:
            raise ValueError("Choose a date.")
        try:
            if not _DATE.fullmatch(self.date):
                raise ValueError(self.date)
            chosen = datetime.combine(date.fromisoformat(self.date), time(), UTC)
        except ValueError:
            raise ValueError("This is not a date. Write it as 2027-01-31.") from None
        try:
            start = datetime.fromisoformat(self.date_start)
        except ValueError:
            return chosen
        # The script's word is taken for the zone, not for another day.
        if start.tzinfo is None or abs(start - chosen) > _ZONE_MAX:
            return chosen
        return start


def parse_body(body: bytes) -> dict[str, str]:
    """Return the fields of an application/x-www-form-urlencoded body. Raises ValueError.

    A field that is there twice is refused: who checks one and uses the other is fooled.
    """
    pairs = parse_qsl(
        body.decode("ascii"),
        keep_blank_values=True,
        max_num_fields=_FIELDS_MAX,
        encoding="utf-8",
        errors="strict",
    )
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field is there twice")
    return fields

"""The form for a new token: its input, and the mistakes in each field. Pure.

The service has the final say. The checks here catch mistakes before a request is sent and explain
them in the form's own words.
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
# A name of 64 four-byte characters takes 768 bytes percent-encoded. The rest leaves room for the
# fields of a long filter.
BODY_BYTES_MAX: Final = 16_384
_FIELDS_MAX: Final = 32
EXPIRY_DAYS: Final[Mapping[str, int]] = {"30": 30, "90": 90, "365": 365}
_EXPIRIES: Final = (*EXPIRY_DAYS, "never", "date")
_SCOPES: Final[Mapping[str, Scope]] = {"read": Scope.READ, "write": Scope.WRITE}
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
# No zone is further from UTC, so no local day starts further from the start of the UTC day.
_ZONE_MAX: Final = timedelta(hours=14)
_CONTROL: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
# For each field of the service: the form field that shows its mistakes, and its name there.
_SERVICE_FIELDS: Final[Mapping[str, tuple[str, str]]] = {
    "name": ("name", "The name"),
    "scope": ("scope", "The access scope"),
    "expire_time": ("expiry", "The expiry"),
    "ttl": ("expiry", "The expiry"),
}


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token to create. At most one of `expire_time` and `ttl` is set; neither means no expiry."""

    name: str
    scope: Scope
    expire_time: datetime | None
    ttl: timedelta | None


@dataclass(frozen=True, slots=True)
class TokenForm:
    """The fields as typed, and `errors` by field. The key "" holds errors of the whole form."""

    name: str = ""
    scope: str = "read"
    expiry: str = "90"
    date: str = ""
    date_start: str = ""
    """The start of the chosen date in the viewer's time zone, set by the script. Default: UTC."""
    errors: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, fields: Mapping[str, str]) -> "TokenForm":
        """Return the submitted form unchanged, so that it can be shown again as typed."""
        return cls(
            name=fields.get("name", ""),
            scope=fields.get("scope", ""),
            expiry=fields.get("expiry", ""),
            date=fields.get("date", ""),
            date_start=fields.get("date_start", ""),
        )

    def with_errors(self, errors: Mapping[str, str]) -> "TokenForm":
        """Return the form with these errors."""
        return TokenForm(self.name, self.scope, self.expiry, self.date, self.date_start, errors)

    def checked(self, now: datetime) -> "NewToken | TokenForm":
        """Return the token to create, or the form with its errors."""
        errors = {}
        name = self.name.strip()
        if not name:
            errors["name"] = "Enter a name, so you can tell later what uses this token."
        elif len(name) > NAME_LENGTH_MAX:
            errors["name"] = f"This name has {len(name)} characters. Use at most {NAME_LENGTH_MAX}."
        elif any(unicodedata.category(character) in _CONTROL for character in name):
            errors["name"] = "The name contains a line break or control character. Remove it."
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
                    errors["expiry"] = "This date has already begun. Choose a later one."
        elif self.expiry not in _EXPIRIES:
            errors["expiry"] = "Choose when the token expires."
        elif self.expiry != "never":
            # A duration, which starts on the service's clock.
            ttl = timedelta(days=EXPIRY_DAYS[self.expiry])
        if errors or scope is None:
            return self.with_errors(errors)
        return NewToken(name, scope, expire_time, ttl)

    def refused(self, violations: Iterable[FieldViolation]) -> "TokenForm":
        """Return the form with the service's violations as errors of their fields."""
        errors: dict[str, str] = {}
        for violation in violations:
            place, subject = _SERVICE_FIELDS.get(violation.field, ("", violation.field))
            errors.setdefault(place, f"{subject} {violation.description.rstrip('. ')}.")
        return self.with_errors(errors or {"": "Latchkey did not accept this."})

    def _first_moment(self) -> datetime:
        """Return when the chosen date begins. Raises ValueError with a text for the page.

        As on the command line, a token expires when its date begins: in doubt, sooner.
        """
        if not self.date:
            raise ValueError("Choose a date.")
        try:
            if not _DATE.fullmatch(self.date):
                raise ValueError(self.date)
            chosen = datetime.combine(date.fromisoformat(self.date), time(), UTC)
        except ValueError:
            raise ValueError("This is not a valid date. Use the format 2027-01-31.") from None
        try:
            start = datetime.fromisoformat(self.date_start)
        except ValueError:
            return chosen
        # The script may choose the time zone but not a different day.
        if start.tzinfo is None or abs(start - chosen) > _ZONE_MAX:
            return chosen
        return start


def parse_body(body: bytes) -> dict[str, str]:
    """Return the fields of an application/x-www-form-urlencoded body. Raises ValueError.

    Rejects duplicate fields: a check might read one value and the code after it the other.
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
        raise ValueError("duplicate form field")
    return fields

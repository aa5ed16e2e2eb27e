"""The forms that change a token: their input, and the mistakes in each field. Pure.

The service has the final say, as for a new token (`forms`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final

from latchkey import FieldViolation, Limits, Token

from latchkey_console.forms import (
    RATE_FIELDS,
    SCOPES,
    duration_of,
    durations,
    last_second,
    name_mistake,
    rate_limit_of,
)
from latchkey_console.restrictions import (
    RESTRICTION_FIELDS,
    description_of,
    labels_of,
    labels_text,
    networks_of,
    permissions_of,
)

__all__ = ["ENDS", "EditForm", "End", "ReplaceForm", "Replacement", "ends_within"]

_KEEP: Final = "keep"
# The optional fields: their names in the service, and how to interpret what was typed, given what
# the form showed.
_PARSED: Final[Mapping[str, tuple[str, Callable[[str, str], Any]]]] = {
    "description": ("description", lambda typed, _: description_of(typed)),
    "networks": ("allowed_networks", lambda typed, _: networks_of(typed)),
    "permissions": ("permissions", lambda typed, _: permissions_of(typed)),
    "rate": ("rate_limit", lambda typed, _: rate_limit_of(typed)),
    "labels": ("labels", labels_of),
}
_NAMES: Final = ("name", "scope", *_PARSED)
# Tokens that end within this time get a later expiry together with a new secret, by default.
_SOON: Final = timedelta(days=14)
# For each field of the service: the form field that shows its mistakes, and its name there.
_SERVICE_FIELDS: Final[Mapping[str, tuple[str, str]]] = {
    "name": ("name", "The name"),
    "scope": ("scope", "The access scope"),
    "expire_time": ("expiry", "The expiry"),
    **RESTRICTION_FIELDS,
    **RATE_FIELDS,
}


@dataclass(frozen=True, slots=True)
class EditForm:
    """The fields as typed, what they were when the form was shown, and the errors by field.

    `before` makes a save change only what the visitor changed, even if somebody else has changed
    other fields since.
    """

    name: str
    scope: str
    description: str
    networks: str
    permissions: str
    rate: str
    labels: str
    before: Mapping[str, str]
    expiry: str = _KEEP
    date: str = ""
    date_end: str = ""
    errors: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, token: Token) -> "EditForm":
        """Return the form with the token's values."""
        return cls._with(
            {
                "name": token.name,
                "scope": token.scope.value,
                "description": token.description,
                "networks": "\n".join(token.allowed_networks),
                "permissions": "\n".join(token.permissions),
                "rate": "" if token.rate_limit is None else str(token.rate_limit),
                "labels": labels_text(token.labels),
            }
        )

    @classmethod
    def read(cls, fields: Mapping[str, str]) -> "EditForm":
        """Return the submitted form unchanged, so that it can be shown again as typed."""
        form = cls._with({name: fields.get(f"was_{name}", "") for name in _NAMES})
        typed = (*_NAMES, "expiry", "date", "date_end")
        values: dict[str, Any] = {name: fields.get(name, "") for name in typed}
        return replace(form, **values)

    @classmethod
    def _with(cls, before: Mapping[str, str]) -> "EditForm":
        values: Mapping[str, Any] = before
        return cls(**values, before=before)

    def with_errors(self, errors: Mapping[str, str]) -> "EditForm":
        """Return the form with these errors."""
        return replace(self, errors=errors)

    def checked(self, now: datetime) -> "dict[str, Any] | EditForm":
        """Return the arguments of `Client.update`, or the form with its errors.

        Without any change, the arguments are empty.
        """
        errors, changes = {}, dict[str, Any]()
        name = self.name.strip()
        if mistake := name_mistake(name):
            errors["name"] = mistake
        elif name != self.before["name"]:
            changes["name"] = name
        if self.scope != self.before["scope"]:
            if self.scope in SCOPES:
                changes["scope"] = SCOPES[self.scope]
            else:
                errors["scope"] = "Choose what the token may do."
        try:
            changes |= self._expiry(now)
        except ValueError as error:
            errors["expiry"] = str(error)
        for field_name, (path, parse) in _PARSED.items():
            typed, before = getattr(self, field_name), self.before[field_name]
            if _plain(typed) == _plain(before):
                continue
            try:
                changes[path] = parse(typed, before)
            except ValueError as error:
                errors[field_name] = str(error)
        return self.with_errors(errors) if errors else changes

    def refused(self, violations: Iterable[FieldViolation]) -> "EditForm":
        """Return the form with the service's violations as errors of their fields."""
        errors: dict[str, str] = {}
        for violation in violations:
            path = violation.field.removeprefix("token.").partition("[")[0]
            place, subject = _SERVICE_FIELDS.get(path, ("", violation.field))
            errors.setdefault(place, f"{subject} {violation.description.rstrip('. ')}.")
        return self.with_errors(errors or {"": "The service did not accept this."})

    def _expiry(self, now: datetime) -> dict[str, datetime | None]:
        if self.expiry == _KEEP:
            return {}
        if self.expiry == "never":
            return {"expire_time": None}
        if self.expiry == "date":
            return {"expire_time": last_second(self.date, self.date_end, now)}
        duration = duration_of(self.expiry)
        if duration is None:
            raise ValueError("Choose when the token expires.")
        return {"expire_time": now + duration}


@dataclass(frozen=True, slots=True)
class End:
    """When the old secret stops working after a Replace."""

    title: str
    why: str
    grace: timedelta | None = None
    on_first_use: bool = False


ENDS: Final[Mapping[str, End]] = {
    "day": End("In 1 day", "Time to give the new secret to the program.", timedelta(days=1)),
    "hour": End("In 1 hour", "For a program that you can update right now.", timedelta(hours=1)),
    "week": End("In 7 days", "For a program that somebody else has to update.", timedelta(days=7)),
    "use": End(
        "When the new one is first used",
        "For a program that runs in one place. Other copies of it fail from then on.",
        on_first_use=True,
    ),
    "now": End(
        "At once",
        "If the secret has leaked. Programs that use it fail until they have the new one.",
        timedelta(),
    ),
}


@dataclass(frozen=True, slots=True)
class Replacement:
    """A secret to replace. `ttl` moves the token's expiry, or is None to keep it."""

    token_id: str
    ends: str
    ttl: timedelta | None


@dataclass(frozen=True, slots=True)
class ReplaceForm:
    """The choices in the drawer for a new secret."""

    ends: str = "day"
    expiry: str = _KEEP

    @classmethod
    def of(cls, token: Token, now: datetime, limits: Limits = Limits()) -> "ReplaceForm":  # noqa: B008 - immutable
        """Return the form with the choices that suit the token, within the limits."""
        soon = token.expire_time is not None and token.expire_time - now <= _SOON
        offered = [value for value, _ in durations(limits)]
        later = "90" if "90" in offered else offered[-1]
        offered_ends = list(ends_within(limits))
        ends = "day" if "day" in offered_ends else offered_ends[0]
        # A grace would keep a leaked secret alive.
        if token.secrets and token.secrets[0].leak_report_time is not None:
            ends = "now"
        return cls(ends, later if soon else _KEEP)

    @classmethod
    def read(cls, fields: Mapping[str, str]) -> "ReplaceForm":
        """Return the submitted form."""
        return cls(fields.get("ends", ""), fields.get("expiry", ""))

    def checked(self, token_id: str) -> Replacement | None:
        """Return what to replace, or None if a choice is missing."""
        ttl = duration_of(self.expiry)
        if self.ends not in ENDS or (ttl is None and self.expiry != _KEEP):
            return None
        return Replacement(token_id, self.ends, ttl)


def ends_within(limits: Limits) -> dict[str, End]:
    """Return the ends of an old secret to offer."""
    return {
        value: end
        for value, end in ENDS.items()
        if limits.max_ttl is None or end.grace is None or end.grace <= limits.max_ttl
    }


def _plain(text: str) -> str:
    """Return a field's content without surrounding white space and carriage returns."""
    return text.replace("\r\n", "\n").strip()

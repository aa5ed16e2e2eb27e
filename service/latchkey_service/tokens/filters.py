"""What List and DeleteAll select, and in which order List returns it. Pure.

`filter_table.py` contains the SQL.
"""

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime

from latchkey_service.errors import FieldViolation
from latchkey_service.tokens.names import name_key
from latchkey_service.tokens.validation import (
    LABELS_MAX,
    NAME_LENGTH_MAX,
    id_violations,
    label_violations,
    printable,
)

__all__ = ["IDS_MAX", "Filter", "Order", "State", "described", "filter_violations", "folded"]

IDS_MAX = 1_000
"""As many as one call of DeleteAll deletes."""


class State(enum.IntEnum):
    """State of a live token, numbered as in the contract's TokenState."""

    ACTIVE = 1
    DISABLED = 2
    EXPIRED = 3


class Order(enum.IntEnum):
    """Order of a list, numbered as in the contract's TokenOrder."""

    NEWEST = 1
    EXPIRY = 2
    LAST_USE = 3


@dataclass(frozen=True, slots=True)
class Filter:
    """Selects live tokens of an account. None and empty: not restricted."""

    scope: int = 0
    name_contains: str = ""
    labels: Mapping[str, str] | None = None
    state: int = 0
    expires_before: datetime | None = None
    unused_since: datetime | None = None
    can_write: bool | None = None
    ids: Sequence[str] = ()
    search: str = ""
    never_used: bool | None = None
    never_expires: bool | None = None
    secret_created_before: datetime | None = None
    leaked: bool | None = None


def folded(selected: Filter) -> Filter:
    """Return the filter with its texts in the form in which names are compared."""
    return replace(
        selected,
        name_contains=name_key(selected.name_contains),
        search=name_key(selected.search),
    )


def described(selected: Filter) -> str:
    """Return a text that is the same for two filters only if they are equal.

    Empty for a filter without conditions.
    """
    given = {
        field.name: value
        for field in fields(Filter)
        if (value := getattr(selected, field.name)) != field.default and value is not None
    }
    if given.get("labels") is not None:
        given["labels"] = dict(given["labels"])
        if not given["labels"]:
            del given["labels"]
    if "ids" in given:
        given["ids"] = list(given["ids"])
    return json.dumps(given, sort_keys=True, default=datetime.isoformat) if given else ""


def filter_violations(selected: Filter) -> list[FieldViolation]:
    """Check a filter. Reports counts and lengths before contents."""
    violations = []
    if selected.scope not in range(3):
        violations.append(FieldViolation("scope", "must be a scope"))
    if selected.state not in range(len(State) + 1):
        violations.append(FieldViolation("state", "must be a state"))
    for field in ("name_contains", "search"):
        violations += _text_violations(field, getattr(selected, field))
    labels = selected.labels or {}
    if len(labels) > LABELS_MAX or label_violations(labels):
        violations.append(
            FieldViolation("label", f"must have at most {LABELS_MAX} pairs that a token can have")
        )
    if len(selected.ids) > IDS_MAX:
        violations.append(FieldViolation("ids", f"must have at most {IDS_MAX} entries"))
    elif any(id_violations(token_id) for token_id in selected.ids):
        violations.append(FieldViolation("ids", "must have valid token ids only"))
    return [FieldViolation(f"filter.{v.field}", v.description) for v in violations]


def _text_violations(field: str, text: str) -> list[FieldViolation]:
    if len(text) > NAME_LENGTH_MAX:
        return [FieldViolation(field, f"must have at most {NAME_LENGTH_MAX} characters")]
    if not printable(text):
        return [FieldViolation(field, "must not contain control characters")]
    if text and not name_key(text):
        # Every name contains it, and DeleteAll would delete every token.
        return [FieldViolation(field, "must contain a visible character")]
    return []

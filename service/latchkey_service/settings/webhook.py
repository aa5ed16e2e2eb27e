"""Validates the settings of the webhook. Pure."""

import re
from typing import Final
from urllib.parse import urlsplit

from pydantic import SecretStr

from latchkey_service.settings.addresses import is_local

__all__ = ["EVENTS", "event_types", "redacted", "valid_days", "valid_events", "valid_url"]

# As in `tokens/event_table.py`, which is above this room.
EVENTS: Final = (
    *("created", "updated", "rotated", "retired", "disabled", "enabled"),
    *("expiring", "leaked", "revoked", "deleted"),
)
_DAYS_MAX: Final = 10


def valid_url(value: SecretStr) -> SecretStr:
    """Accept https, and http on loopback. Raises ValueError."""
    try:
        parts = urlsplit(value.get_secret_value())
        _ = parts.port
    except ValueError:
        raise ValueError("must be a URL") from None
    if not parts.hostname or "@" in parts.netloc or parts.fragment:
        raise ValueError("must be https://HOST/PATH, without a user name")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    if parts.scheme != "https" and not (parts.scheme == "http" and is_local(f"{host}:0")):
        raise ValueError("must use https; http is allowed on loopback only")
    return value


def redacted(url: str) -> str:
    """Return a URL without its path, which may contain a token of the receiver."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}/***"


def event_types(events: str) -> frozenset[str]:
    """Return the types in a valid list of events."""
    return frozenset(EVENTS if events == "all" else (text.strip() for text in events.split(",")))


def valid_events(value: str) -> str:
    """Accept "all", or types of events with commas between them. Raises ValueError."""
    if value != "all" and not {text.strip() for text in value.split(",")}.issubset(EVENTS):
        raise ValueError(f"must be all, or some of {','.join(EVENTS)}")
    return value


def valid_days(value: str) -> str:
    """Accept numbers of days with commas between them. Raises ValueError."""
    days = value.split(",")
    if len(days) > _DAYS_MAX or not all(re.fullmatch(r" *[1-9]\d{0,2} *", text) for text in days):
        raise ValueError(f"must be up to {_DAYS_MAX} numbers of days, 1-999, such as 7,1")
    return value

"""Remembers which kinds of findings a visitor is done with.

A cookie keeps this, because it is a choice of one person about what to see, and because it must
outlive the console's processes. Nothing depends on it, so it is neither signed nor secret. The
cookie has the choices for one account; those for another account replace them.
"""

import hashlib
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from latchkey_console.cookies import CookieRules
from latchkey_console.review import Kind

__all__ = ["REVIEWED_DAYS", "Reviewed"]

# Long enough to be of use, and short enough that nothing is hidden for ever.
REVIEWED_DAYS: Final = 30
_KINDS: Final = {kind.value: kind for kind in Kind}
_COUNT_LENGTH_MAX: Final = 9
_VALUE_LENGTH_MAX: Final = 500
_SUFFIX: Final = "-reviewed"


class Reviewed:
    """The cookie. Its value is `ACCOUNT_KIND.COUNT.DAY_...`: a hash, and days since 1970."""

    def __init__(self, rules: CookieRules) -> None:
        self._rules = rules

    def read(self, request: Request, account_id: str, now: datetime) -> dict[Kind, int]:
        """Return how many tokens had each finding when the visitor was done with it."""
        entries = self._entries(request, account_id)
        return {kind: count for kind, (count, day) in entries.items() if _day(now) < day}

    def add(
        self,
        request: Request,
        response: Response,
        account_id: str,
        now: datetime,
        finding: str,
        count: str,
    ) -> None:
        """Remember that the visitor is done with a finding. Ignores invalid values."""
        kind = _KINDS.get(finding)
        if kind is None or not _is_count(count):
            return
        entries = self._entries(request, account_id)
        entries = {kind: entry for kind, entry in entries.items() if _day(now) < entry[1]}
        entries[kind] = (int(count), _day(now + timedelta(days=REVIEWED_DAYS)))
        self._write(response, account_id, entries)

    def clear(self, response: Response) -> None:
        """Forget everything."""
        self._rules.delete(response, _SUFFIX)

    def _entries(self, request: Request, account_id: str) -> dict[Kind, tuple[int, int]]:
        owner, *parts = self._rules.read(request, _SUFFIX)[:_VALUE_LENGTH_MAX].split("_")
        if owner != _owner(account_id):
            return {}
        entries = {}
        for part in parts:
            name, _, rest = part.partition(".")
            count, _, day = rest.partition(".")
            if name in _KINDS and _is_count(count) and _is_count(day):
                entries[_KINDS[name]] = (int(count), int(day))
        return entries

    def _write(
        self, response: Response, account_id: str, entries: Mapping[Kind, tuple[int, int]]
    ) -> None:
        parts = [f"{kind.value}.{count}.{day}" for kind, (count, day) in entries.items()]
        value = "_".join([_owner(account_id), *parts])
        self._rules.set(response, _SUFFIX, value, REVIEWED_DAYS * 86_400)


def _owner(account_id: str) -> str:
    return hashlib.blake2s(account_id.encode(), digest_size=6).hexdigest()


def _day(time: datetime) -> int:
    return int(time.timestamp() // 86_400)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _COUNT_LENGTH_MAX

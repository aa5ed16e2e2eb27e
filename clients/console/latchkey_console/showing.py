"""Displays each new secret once, and only to the session that asked for it."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from latchkey import Receipt, Secret, Token

from latchkey_console.expiring import Expiring
from latchkey_console.protection import FORM_SECONDS

__all__ = ["Displays", "Shown"]

# The redirect to the secret takes milliseconds. An uncollected secret is erased.
SECRET_SECONDS: Final = 120.0
# Enough for thousands of people at once. An entry takes a few hundred bytes.
DISPLAYS_MAX: Final = 20_000


@dataclass(frozen=True, slots=True)
class Shown:
    """A token with a new secret. `secret` is None from the second display on."""

    token: Token
    secret: Secret | None
    replaced: bool
    """Whether the secret replaces an older one."""
    receipt: Receipt | None


@dataclass(slots=True)
class _Display:
    owner: str
    shown: Shown

    def forget(self) -> None:
        shown = self.shown
        self.shown = Shown(shown.token, None, shown.replaced, shown.receipt)


class Displays:
    """Keeps secrets until their single display. Belongs to one event loop."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._displays: Expiring[_Display] = Expiring(FORM_SECONDS, DISPLAYS_MAX, monotonic)

    def put(
        self,
        owner: str,
        token: Token,
        secret: Secret,
        *,
        replaced: bool = False,
        receipt: Receipt | None = None,
    ) -> str:
        """Keep the secret for its single display to `owner` and return its place."""
        place = secrets.token_urlsafe(16)
        display = _Display(owner, Shown(token, secret, replaced, receipt))
        self._displays.put(place, display)
        asyncio.get_running_loop().call_later(SECRET_SECONDS, display.forget)
        return place

    def show(self, place: str, owner: str) -> Shown | None:
        """Return the token and, the first time, its secret. Return None unless `owner` matches."""
        display = self._displays.get(place)
        if display is None or display.owner != owner:
            return None
        shown = display.shown
        display.forget()
        return shown

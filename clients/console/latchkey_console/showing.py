"""Displays each new secret once, and only to the session that asked for it.

Between the form and the page that displays the secret, the visitor's browser keeps it: sealed, in a
cookie for this session and account, for two minutes, until the page deletes it. So any process of
the console can display it. A second cookie remembers the forms that the visitor has used, without
their secrets, so that sending a form again neither repeats it nor ends a secret that is in use.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from latchkey import Client, LatchkeyError, Receipt, Secret, Token
from starlette.requests import Request
from starlette.responses import Response

from latchkey_console.cookies import CookieRules, SealedCookie
from latchkey_console.expiring import Expiring
from latchkey_console.packing import pack_receipt, pack_token, unpack_receipt, unpack_token
from latchkey_console.protection import FORM_SECONDS
from latchkey_console.state import StateKeys

__all__ = ["Displays", "NewSecret", "Shown", "Used", "place_of"]

# The redirect to the secret takes milliseconds.
SECRET_SECONDS: Final = 120
# Enough for thousands of people at once. An entry takes a hundred bytes.
DISPLAYS_MAX: Final = 20_000
# Used forms that a browser remembers, so that they fit into a cookie.
USED_MAX: Final = 24


@dataclass(frozen=True, slots=True)
class NewSecret:
    """A token with its new secret, before it is displayed."""

    token: Token
    secret: Secret
    replaced: bool = False
    """Whether the secret replaces an older one."""
    receipt: Receipt | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """What to display. `secret` is None from the second display on."""

    token: Token
    secret: Secret | None
    replaced: bool
    receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class Used:
    """A form that the visitor has used, and the token that it concerns."""

    place: str
    token_id: str
    same: bool
    """Whether its fields are still those with which it was used."""


class Displays:
    """Stores new secrets in browsers, and displays them.

    A process displays a cookie once. Another process cannot know that, so it would display a copy
    of the cookie until that is two minutes old.
    """

    def __init__(
        self,
        client: Client,
        rules: CookieRules,
        keys: StateKeys,
        now: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        self._client = client
        self._rules = rules
        self._keys = keys
        self._now = now
        self._used = SealedCookie(rules, "-used", keys, FORM_SECONDS, now)
        # A little longer than the cookies are valid.
        self._displayed: Expiring[bool] = Expiring(2 * SECRET_SECONDS, DISPLAYS_MAX, monotonic)

    def leave(
        self,
        request: Request,
        response: Response,
        owner: str,
        mark: str,
        wanted: object,
        new: NewSecret,
    ) -> None:
        """Store a new secret in the browser of `owner`.

        `mark` is that of the form, and `wanted` what it asked for.
        """
        place = place_of(mark)
        value = {
            "token": pack_token(new.token),
            "secret": new.secret.reveal(),
            "replaced": new.replaced,
            "receipt": pack_receipt(new.receipt),
        }
        self._new(place).write(response, owner, value)
        entry = [place, new.token.id, _digest(repr(wanted)), _digest(owner)]
        kept = [form for form in self._forms(request, owner) if form[0] != entry[0]]
        self._used.write(response, _session(owner), {"forms": [*kept, entry][-USED_MAX:]})

    def used(self, request: Request, owner: str, mark: str, wanted: object) -> Used | None:
        """Return the form with this mark if `owner` has used it before."""
        found = self._form(request, owner, place_of(mark))
        if found is None:
            return None
        place, token_id, content, _ = found
        return Used(place, token_id, content == _digest(repr(wanted)))

    async def show(self, request: Request, place: str, owner: str) -> Shown | None:
        """Return the token and, the first time, its secret. Return None unless `owner` matches."""
        value = self._new(place).read(request, owner)
        if not value or self._is_displayed(value["secret"]):
            return await self._again(request, place, owner)
        token, secret = unpack_token(value["token"]), Secret(value["secret"])
        replaced, receipt = value["replaced"], unpack_receipt(value["receipt"])
        try:
            current = await self._client.get(token.account_id, token.id)
        except LatchkeyError:
            # Nothing may prevent the display.
            return Shown(token, secret, replaced, receipt)
        if all(token.hint != kept.hint for kept in current.secrets):
            # Another copy of the form has made a secret in place of this one.
            return Shown(current, None, replaced, receipt)
        return Shown(token, secret, replaced, receipt)

    def end(self, request: Request, response: Response, place: str) -> None:
        """Delete the secret from the browser, which has displayed it."""
        self._new(place).delete(request, response)

    def _new(self, place: str) -> SealedCookie:
        """Return the cookie of one secret, so that several tabs do not take each other's."""
        return SealedCookie(self._rules, f"-new-{place}", self._keys, SECRET_SECONDS, self._now)

    async def _again(self, request: Request, place: str, owner: str) -> Shown | None:
        found = self._form(request, owner, place)
        if found is None:
            return None
        try:
            token = await self._client.get(owner.partition(" ")[2], found[1])
        except LatchkeyError:
            return None
        return Shown(token, None, replaced=False, receipt=None)

    def _is_displayed(self, secret: str) -> bool:
        """Return whether this process has displayed the secret, and remember that it does now."""
        # Not by the cookie, of which there are several forms with the same content.
        seen = _digest(secret)
        displayed = self._displayed.get(seen) is not None
        self._displayed.put(seen, True)  # noqa: FBT003 - the only value
        return displayed

    def _form(self, request: Request, owner: str, place: str) -> Any:
        wanted = [place, _digest(owner)]
        forms = self._forms(request, owner)
        return next((form for form in forms if [form[0], form[3]] == wanted), None)

    def _forms(self, request: Request, owner: str) -> list[Any]:
        """Return the used forms of the owner's session, which are for all its accounts.

        So a tab with one account does not forget what another tab with another account has done.
        """
        forms: list[Any] = self._used.read(request, _session(owner)).get("forms", [])
        return forms


def place_of(mark: str) -> str:
    """Return where the secret of a form with this mark is displayed."""
    return _digest(mark)


def _session(owner: str) -> str:
    """Return the session of an owner (`frame.Visit.owner`)."""
    return owner.partition(" ")[0]


def _digest(text: str) -> str:
    return hashlib.blake2s(text.encode(), digest_size=12).hexdigest()

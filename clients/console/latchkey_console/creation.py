"""One token for one form, and its secret for one display.

A form carries a mark (`protection.Seals`). Whoever sends it again, by a double click, the back
button or a reload, gets the outcome of the first time. That is kept here: in memory, bounded, and
for longer than a mark is good for. Should it have had to make room, the name is taken, and the
service refuses the second token for that.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from latchkey import AlreadyExists, Client, CreatedToken, LatchkeyError, Secret, Token

from latchkey_console import listing
from latchkey_console.expiring import Expiring
from latchkey_console.failures import is_refusal
from latchkey_console.forms import NewToken
from latchkey_console.protection import FORM_SECONDS

__all__ = ["Creations", "Different", "Lost", "Made", "NotMade", "Outcome", "Shown"]

_log = logging.getLogger("latchkey.console")

# A redirect takes milliseconds. A secret that nobody comes for is forgotten.
SECRET_SECONDS: Final = 120.0
# Thousands of people at once; an entry is some hundred bytes.
ATTEMPTS_MAX: Final = 20_000


@dataclass(frozen=True, slots=True)
class Made:
    """The token is there. `place` is where its secret can be had, once."""

    place: str


@dataclass(frozen=True, slots=True)
class Different:
    """The form has made a token before, and what it says now is something else."""

    name: str


@dataclass(frozen=True, slots=True)
class NotMade:
    """Latchkey said no, or was away before anything was asked of it. Nothing was changed."""

    error: LatchkeyError


@dataclass(frozen=True, slots=True)
class Lost:
    """Create was sent and its answer never came.

    `found` is the token that it made: its secret is nobody's. With `error` Latchkey could not be
    asked whether there is one.
    """

    found: Token | None
    error: LatchkeyError | None


Outcome = Made | NotMade | Lost


@dataclass(frozen=True, slots=True)
class Shown:
    """A token that was made here. `secret` is None from the second look on."""

    token: Token
    secret: Secret | None


@dataclass(slots=True)
class _Attempt:
    new: NewToken
    task: "asyncio.Task[Outcome]"

    @property
    def failed(self) -> bool:
        """Whether it ended in a fault of this program's: then there is nothing to go on from."""
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)


@dataclass(slots=True)
class _Display:
    owner: str
    token: Token
    secret: Secret | None

    def forget(self) -> None:
        self.secret = None


class Creations:
    """Makes tokens for forms. Safe to share between the requests of one event loop."""

    def __init__(
        self, client: Client, now: Callable[[], datetime], monotonic: Callable[[], float]
    ) -> None:
        self._client = client
        self._now = now
        # Twice: an attempt begins at the latest when its form runs out, and is kept as long again.
        self._attempts: Expiring[_Attempt] = Expiring(2 * FORM_SECONDS, ATTEMPTS_MAX, monotonic)
        self._displays: Expiring[_Display] = Expiring(FORM_SECONDS, ATTEMPTS_MAX, monotonic)

    async def create(
        self, mark: str, owner: str, account_id: str, new: NewToken, *, replace: bool
    ) -> Outcome | Different:
        """Make the token of the form with this mark, or return what came of it before.

        `owner` is the session that may see the secret. With `replace`, a token whose secret got
        lost on the way is deleted first. Goes on when the caller is cancelled: a browser that
        hangs up must not leave it open whether there is a token.
        """
        lost: Lost | None = None
        attempt = self._attempts.get(mark)
        if attempt is not None and not attempt.failed:
            # Of requests that come at the same time, the second waits here for the first.
            outcome = await asyncio.shield(attempt.task)
            latest = self._attempts.get(mark)
            if isinstance(outcome, Made):
                return outcome if attempt.new == new else Different(attempt.new.name)
            if latest is not attempt and latest is not None:
                # Another request has begun the next attempt meanwhile; this one is its double.
                return await asyncio.shield(latest.task)
            lost = outcome if isinstance(outcome, Lost) else None
        task = asyncio.create_task(self._attempt(owner, account_id, new, lost, replace=replace))
        # No await since the look above, so no other request can have come in between.
        self._attempts.put(mark, _Attempt(new, task))
        return await asyncio.shield(task)

    def show(self, place: str, owner: str) -> Shown | None:
        """Return what was made and, this once, its secret. None for anyone but its owner."""
        display = self._displays.get(place)
        if display is None or display.owner != owner:
            return None
        shown = Shown(display.token, display.secret)
        display.forget()
        return shown

    async def _attempt(
        self, owner: str, account_id: str, new: NewToken, lost: Lost | None, *, replace: bool
    ) -> Outcome:
        try:
            # Before, so that a token of this name that is there afterwards is known to be ours.
            # It also tells whether Latchkey is there, while there is nothing to lose yet.
            inventory = await listing.fetch(self._client, account_id, self._now())
        except LatchkeyError as error:
            return NotMade(error) if lost is None else Lost(None, error)
        taken = inventory.named(new.name)
        if taken is not None and lost is not None:
            if not replace or lost.found is None or lost.found.id != taken.id:
                return Lost(taken, None)
            try:
                await self._client.delete(account_id, taken.id)
            except LatchkeyError as error:
                return Lost(taken, error)
        elif taken is not None:
            return NotMade(AlreadyExists("A live token of the account has this name."))
        try:
            created = await self._client.create(
                account_id, new.name, new.scope, expire_time=new.expire_time, ttl=new.ttl
            )
        except LatchkeyError as error:
            # A name that was free a moment ago and is taken now may be the lost one's, late.
            if is_refusal(error) and not (lost and isinstance(error, AlreadyExists)):
                return NotMade(error)
            _log.warning("create: no answer (%s): looking for the token", error.code.name)
        else:
            return Made(self._display(owner, created))
        try:
            inventory = await listing.fetch(self._client, account_id, self._now())
        except LatchkeyError as error:
            return Lost(None, error)
        return Lost(inventory.named(new.name), None)

    def _display(self, owner: str, created: CreatedToken) -> str:
        """Keep the secret for its one display; return where."""
        _log.info("created: account %s, token %s", created.token.account_id, created.token.id)
        place = secrets.token_urlsafe(16)
        display = _Display(owner, created.token, created.secret)
        self._displays.put(place, display)
        asyncio.get_running_loop().call_later(SECRET_SECONDS, display.forget)
        return place

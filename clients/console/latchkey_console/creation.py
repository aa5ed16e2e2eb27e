"""Creates one token per form.

A form carries a mark (`protection.Seals`). Submitting a form again, by a double click, the back
button or a reload, returns the first outcome. This module keeps outcomes in bounded memory, for
longer than a mark is valid. If an outcome was evicted early, the service still rejects a second
token because its name is taken.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from latchkey import AlreadyExists, Client, LatchkeyError, Token

from latchkey_console import listing
from latchkey_console.expiring import Expiring
from latchkey_console.failures import is_refusal
from latchkey_console.forms import NewToken
from latchkey_console.protection import FORM_SECONDS
from latchkey_console.showing import Displays

__all__ = ["Creations", "Different", "Lost", "Made", "NotMade", "Outcome"]

_log = logging.getLogger("latchkey.console")

# Enough for thousands of people at once. An entry takes a few hundred bytes.
ATTEMPTS_MAX: Final = 20_000


@dataclass(frozen=True, slots=True)
class Made:
    """The token exists. Its secret can be displayed once, at `place`."""

    place: str


@dataclass(frozen=True, slots=True)
class Different:
    """The form already created a token, and its fields have changed since."""

    name: str


@dataclass(frozen=True, slots=True)
class NotMade:
    """Latchkey refused, or was unavailable before Create was sent. Nothing was changed."""

    error: LatchkeyError


@dataclass(frozen=True, slots=True)
class Lost:
    """Create was sent, but its answer never arrived.

    `found` is the token that it created, whose secret is lost. If `error` is set, the check for
    such a token failed.
    """

    found: Token | None
    error: LatchkeyError | None


Outcome = Made | NotMade | Lost


@dataclass(slots=True)
class _Attempt:
    new: NewToken
    task: "asyncio.Task[Outcome]"

    @property
    def failed(self) -> bool:
        """Whether the attempt crashed, so that it left no outcome."""
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)


class Creations:
    """Creates tokens for forms. Safe to share between the requests of one event loop."""

    def __init__(
        self,
        client: Client,
        displays: Displays,
        monotonic: Callable[[], float],
    ) -> None:
        self._client = client
        self._displays = displays
        # Twice FORM_SECONDS: an attempt may start just before its form expires.
        self._attempts: Expiring[_Attempt] = Expiring(2 * FORM_SECONDS, ATTEMPTS_MAX, monotonic)

    async def create(
        self, mark: str, owner: str, account_id: str, new: NewToken, *, replace: bool
    ) -> Outcome | Different:
        """Create the token for the form with this mark, or return the earlier outcome.

        `owner` is the session that may see the secret. With `replace`, first delete a token whose
        secret was lost in transit. The creation continues when the caller is cancelled: a browser
        that disconnects must not leave it uncertain whether the token exists.
        """
        lost: Lost | None = None
        attempt = self._attempts.get(mark)
        if attempt is not None and not attempt.failed:
            # A simultaneous second request waits here for the first.
            outcome = await asyncio.shield(attempt.task)
            latest = self._attempts.get(mark)
            if isinstance(outcome, Made):
                return outcome if attempt.new == new else Different(attempt.new.name)
            if latest is not attempt and latest is not None:
                # Another copy of this request has started the next attempt in the meantime.
                return await asyncio.shield(latest.task)
            lost = outcome if isinstance(outcome, Lost) else None
        task = asyncio.create_task(self._attempt(owner, account_id, new, lost, replace=replace))
        # No await since the last check, so no other request can have intervened.
        self._attempts.put(mark, _Attempt(new, task))
        return await asyncio.shield(task)

    async def _attempt(
        self, owner: str, account_id: str, new: NewToken, lost: Lost | None, *, replace: bool
    ) -> Outcome:
        try:
            # Checked first, so that a token of this name found afterwards must be ours. The check
            # also shows whether Latchkey is available, before a token can be lost.
            taken = await listing.named(self._client, account_id, new.name)
        except LatchkeyError as error:
            return NotMade(error) if lost is None else Lost(None, error)
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
                account_id,
                new.name,
                new.scope,
                expire_time=new.expire_time,
                ttl=new.ttl,
                rate_limit=new.rate_limit,
            )
        except LatchkeyError as error:
            # If the name was free a moment ago, the lost Create may have taken it since.
            if is_refusal(error) and not (lost and isinstance(error, AlreadyExists)):
                return NotMade(error)
            _log.warning("create got no answer (%s); looking for the token", error.code.name)
        else:
            token = created.token
            _log.info("created: account %s, token %s", token.account_id, token.id)
            return Made(self._displays.put(owner, token, created.secret))
        try:
            return Lost(await listing.named(self._client, account_id, new.name), None)
        except LatchkeyError as error:
            return Lost(None, error)

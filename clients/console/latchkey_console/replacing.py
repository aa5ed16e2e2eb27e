"""Replaces secrets: one new secret per form.

A form carries a mark (`protection.Seals`). Submitting a form again, by a double click, the back
button or a reload, returns the first outcome. The mark also determines the request id. If
Latchkey's answer is lost, the next attempt gets another secret in place of the lost one.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from latchkey import Client, LatchkeyError

from latchkey_console.editing import ENDS, Replacement
from latchkey_console.expiring import Expiring
from latchkey_console.protection import FORM_SECONDS
from latchkey_console.showing import Displays

__all__ = ["Changed", "NotReplaced", "Replaced", "Replacements"]

_log = logging.getLogger("latchkey.console")

# Enough for thousands of people at once. An entry takes a few hundred bytes.
ATTEMPTS_MAX: Final = 20_000


@dataclass(frozen=True, slots=True)
class Replaced:
    """The token has a new secret, which can be displayed once, at `place`."""

    place: str


@dataclass(frozen=True, slots=True)
class NotReplaced:
    """Latchkey failed or refused."""

    error: LatchkeyError
    expiry_moved: bool
    """Whether the token has its new expiry nevertheless."""


@dataclass(frozen=True, slots=True)
class Changed:
    """The form has already replaced a secret, and its choices have changed since."""


Outcome = Replaced | NotReplaced


@dataclass(slots=True)
class _Attempt:
    wanted: Replacement
    task: "asyncio.Task[Outcome]"


class Replacements:
    """Replaces secrets for forms. Safe to share between the requests of one event loop."""

    def __init__(
        self,
        client: Client,
        displays: Displays,
        now: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        self._client = client
        self._displays = displays
        self._now = now
        # Twice FORM_SECONDS: an attempt may start just before its form expires.
        self._attempts: Expiring[_Attempt] = Expiring(2 * FORM_SECONDS, ATTEMPTS_MAX, monotonic)

    async def replace(
        self, mark: str, owner: str, account_id: str, wanted: Replacement
    ) -> Outcome | Changed:
        """Replace the secret for the form with this mark, or return the earlier outcome.

        `owner` is the session that may see the secret. The replacement continues when the caller
        is cancelled, so that a browser that disconnects does not lose it.
        """
        attempt = self._attempts.get(mark)
        while attempt is not None:
            # A simultaneous second request waits here for the first.
            try:
                outcome = await asyncio.shield(attempt.task)
            except Exception:  # noqa: BLE001 - the first request has reported it
                break
            if isinstance(outcome, Replaced):
                return outcome if attempt.wanted == wanted else Changed()
            latest = self._attempts.get(mark)
            if latest is attempt:
                break
            # Another copy of this request has started the next attempt in the meantime.
            attempt = latest
        task = asyncio.create_task(self._attempt(mark, owner, account_id, wanted))
        # No await since the last check, so no other request can have intervened.
        self._attempts.put(mark, _Attempt(wanted, task))
        return await asyncio.shield(task)

    async def _attempt(
        self, mark: str, owner: str, account_id: str, wanted: Replacement
    ) -> Outcome:
        end = ENDS[wanted.ends]
        moved = False
        try:
            if wanted.ttl is not None:
                # First, because a failure leaves nothing behind that somebody could miss. A new
                # secret that nobody sees would be worse.
                expire_time = self._now() + wanted.ttl
                await self._client.update(account_id, wanted.token_id, expire_time=expire_time)
                moved = True
            rotated = await self._client.rotate(
                account_id,
                wanted.token_id,
                grace=end.grace,
                retire_on_first_use=end.on_first_use,
                request_id=_request_id(mark, wanted),
            )
        except LatchkeyError as error:
            _log.warning("replace failed: %s", error.code.name)
            return NotReplaced(error, moved)
        _log.info("replaced: account %s, token %s", account_id, wanted.token_id)
        return Replaced(
            self._displays.put(
                owner,
                rotated.token,
                rotated.secret,
                replaced=True,
                receipt=rotated.receipt if wanted.ends == "now" else None,
            )
        )


def _request_id(mark: str, wanted: Replacement) -> uuid.UUID:
    """Return the id of the request (AIP-155): the same for the same form and choices."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"latchkey-console:{mark}:{wanted}")

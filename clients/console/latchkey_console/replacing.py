"""Replaces secrets: one new secret per form.

A form carries a mark (`protection.Seals`), which determines the id of the request to Latchkey, as
in `creation`. If Latchkey's answer is lost, the next attempt gets another secret in place of the
lost one.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from latchkey import AlreadyExists, Client, LatchkeyError

from latchkey_console.creation import Different, request_id_of
from latchkey_console.editing import ENDS, Replacement
from latchkey_console.once import Once
from latchkey_console.showing import NewSecret

__all__ = ["NotReplaced", "Replacements"]

_log = logging.getLogger("latchkey.console")


@dataclass(frozen=True, slots=True)
class NotReplaced:
    """Latchkey failed or refused."""

    error: LatchkeyError
    expiry_moved: bool
    """Whether the token has its new expiry nevertheless."""


Outcome = NewSecret | Different | NotReplaced


class Replacements:
    """Replaces secrets for forms. Safe to share between the requests of one event loop."""

    def __init__(self, client: Client, now: Callable[[], datetime]) -> None:
        self._client = client
        self._now = now
        self._once: Once[Outcome] = Once()

    async def replace(self, mark: str, account_id: str, wanted: Replacement) -> Outcome:
        """Replace the secret for the form with this mark."""
        return await self._once.run(
            f"{mark} {wanted!r}", lambda: self._replace(mark, account_id, wanted)
        )

    async def _replace(self, mark: str, account_id: str, wanted: Replacement) -> Outcome:
        end = ENDS[wanted.ends]
        moved = False
        try:
            if wanted.ttl is not None:
                # First, because nothing is lost if it fails. If it came last, its failure would
                # leave a new secret that nobody has seen.
                expire_time = self._now() + wanted.ttl
                await self._client.update(account_id, wanted.token_id, expire_time=expire_time)
                moved = True
            rotated = await self._client.rotate(
                account_id,
                wanted.token_id,
                grace=end.grace,
                retire_on_first_use=end.on_first_use,
                request_id=request_id_of(mark),
            )
        except LatchkeyError as error:
            if isinstance(error, AlreadyExists) and error.reason == "REQUEST_ID_REUSED":
                return Different()
            _log.warning("replace failed: %s", error.code.name)
            return NotReplaced(error, moved)
        _log.info("replaced: account %s, token %s", account_id, wanted.token_id)
        return NewSecret(
            rotated.token,
            rotated.secret,
            replaced=True,
            receipt=rotated.receipt if wanted.ends == "now" else None,
        )

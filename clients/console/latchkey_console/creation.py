"""Creates one token per form.

A form carries a mark (`protection.Seals`), which determines the id of the request to Latchkey. So
Latchkey creates one token for a form, whichever process of the console asks, and however often. If
its answer is lost, the next attempt gets another secret in place of the lost one.
"""

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from latchkey import AlreadyExists, Client, LatchkeyError, Token

from latchkey_console import listing
from latchkey_console.failures import is_refusal
from latchkey_console.forms import NewToken
from latchkey_console.once import Once
from latchkey_console.showing import NewSecret

__all__ = ["Creations", "Different", "Lost", "NotMade", "Outcome", "request_id_of"]

_log = logging.getLogger("latchkey.console")

# A token with the form's name that is younger than this may be the form's own: another process may
# have handled a copy of the form. The bound is wide, because the clocks of the processes and of
# Latchkey differ. The secret of an older token may be in use, so this form must not end it.
COPY_AGE_MAX: Final = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Different:
    """The form already created a token, and its fields have changed since."""


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


Outcome = NewSecret | Different | NotMade | Lost


class Creations:
    """Creates tokens for forms. Safe to share between the requests of one event loop."""

    def __init__(self, client: Client, now: Callable[[], datetime]) -> None:
        self._client = client
        self._now = now
        self._once: Once[Outcome] = Once()

    async def create(self, mark: str, account_id: str, new: NewToken, *, again: bool) -> Outcome:
        """Create the token for the form with this mark.

        With `again`, an earlier attempt may have created it: then the token gets another secret in
        place of the one that was lost.
        """
        return await self._once.run(
            f"{mark} {new!r} {again}", lambda: self._create(mark, account_id, new, again=again)
        )

    async def _create(self, mark: str, account_id: str, new: NewToken, *, again: bool) -> Outcome:
        try:
            # Checked first, so that a token of this name found afterwards must be ours. The check
            # also shows whether Latchkey is available, before a token can be lost.
            taken = await listing.named(self._client, account_id, new.name)
        except LatchkeyError as error:
            return Lost(None, error) if again else NotMade(error)
        if taken is not None and not again and self._now() - taken.create_time > COPY_AGE_MAX:
            return NotMade(AlreadyExists("A live token of the account has this name."))
        try:
            created = await self._client.create(
                account_id,
                new.name,
                new.scope,
                expire_time=new.expire_time,
                ttl=new.ttl,
                request_id=request_id_of(mark),
                rate_limit=new.rate_limit,
                description=new.description,
                allowed_networks=new.allowed_networks,
                permissions=new.permissions,
                labels=dict(new.labels),
            )
        except LatchkeyError as error:
            if isinstance(error, AlreadyExists) and error.reason == "REQUEST_ID_REUSED":
                return Different()
            if is_refusal(error):
                return NotMade(error)
            _log.warning("create got no answer (%s); looking for the token", error.code.name)
        else:
            token = created.token
            _log.info("created: account %s, token %s", token.account_id, token.id)
            return NewSecret(token, created.secret)
        try:
            return Lost(await listing.named(self._client, account_id, new.name), None)
        except LatchkeyError as error:
            return Lost(None, error)


def request_id_of(mark: str) -> uuid.UUID:
    """Return the id of the request that a form makes (AIP-155). A mark occurs only once."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"latchkey-console:{mark}")

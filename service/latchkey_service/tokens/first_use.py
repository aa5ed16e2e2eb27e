"""Ends the older secrets of a token after the first verify of the new one that is answered VALID.

Verify does not wait for that. If it fails here, the next look-up of the secret repeats it.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable

from latchkey_service import tracing
from latchkey_service.audit.audit_log import AuditContext
from latchkey_service.errors import LatchkeyError
from latchkey_service.settings.logs import logger
from latchkey_service.tokens.confirmation import Call
from latchkey_service.tokens.verdict import CachedToken

__all__ = ["FirstUse"]

# Tokens at once. Only a program rotates more than that at once, and it can wait for the next
# look-up.
TOKENS_MAX = 100
ATTEMPTS_MAX = 5
RETRY_SECONDS = 0.2
# For one attempt: a change takes milliseconds.
ATTEMPT_SECONDS = 5.0
METHOD = "/latchkey.v1.TokenService/RetireSecrets"
PEER = "first use"
"""Stands in the audit log for the address of a caller."""

RetireOlder = Callable[[str, str, bytes, Call], Awaitable[None]]


class FirstUse:
    """Retires older secrets in the background. Event loop only."""

    def __init__(self, retire_older: RetireOlder, clock: Callable[[], float]) -> None:
        self._retire_older = retire_older
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._log = logger()

    def seen(self, record: CachedToken) -> None:
        """Begin to retire the secrets that are older than the one of `record`, unless this has
        begun."""
        digest, token_id = record.retires_older, record.token_id
        if digest is None or token_id in self._tasks or len(self._tasks) >= TOKENS_MAX:
            return
        record.retires_older = None
        task = asyncio.create_task(
            self._retire(record.account_id, token_id, digest), name="retire older secrets"
        )
        self._tasks[token_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(token_id, None))

    async def close(self) -> None:
        """Stop. What has not been done is left to the next look-up of the secret."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _retire(self, account_id: str, token_id: str, digest: bytes) -> None:
        # The caller of the Verify does not wait for this.
        tracing.leave()
        for attempt in range(ATTEMPTS_MAX):
            context = AuditContext("", METHOD, PEER, "", account_id, token_id)
            call = Call(context, self._clock() + ATTEMPT_SECONDS)
            try:
                await self._retire_older(account_id, token_id, digest, call)
            except LatchkeyError as error:
                self._log.warning(
                    "older secrets not retired yet",
                    token_id=token_id,
                    account_id=account_id,
                    error=type(error).__name__,
                )
                await asyncio.sleep(RETRY_SECONDS * math.pow(2, attempt))
            else:
                return

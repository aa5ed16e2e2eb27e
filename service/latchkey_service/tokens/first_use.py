"""Ends the older secrets of a token when a look-up first finds the new one.

Verify does not wait for that. If it fails here, the next look-up of the secret repeats it.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable

from latchkey_service.audit.audit_log import AuditContext
from latchkey_service.errors import LatchkeyError
from latchkey_service.settings.logs import logger
from latchkey_service.tokens.confirmation import Call
from latchkey_service.tokens.verdict import SecretRecord, TokenRecord

__all__ = ["FirstUse"]

# Tokens at once. More are rotated at once by a program, which can wait for the next look-up.
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

    def seen(self, token: TokenRecord, secret: SecretRecord) -> None:
        """Begin to retire the secrets of `token` that are older than `secret`."""
        if token.id in self._tasks or len(self._tasks) >= TOKENS_MAX:
            return
        task = asyncio.create_task(self._retire(token, secret), name="retire older secrets")
        self._tasks[token.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(token.id, None))

    async def close(self) -> None:
        """Stop. What has not been done is left to the next look-up of the secret."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _retire(self, token: TokenRecord, secret: SecretRecord) -> None:
        for attempt in range(ATTEMPTS_MAX):
            context = AuditContext("", METHOD, PEER, "", token.account_id, token.id)
            call = Call(context, self._clock() + ATTEMPT_SECONDS)
            try:
                await self._retire_older(token.account_id, token.id, secret.digest, call)
            except LatchkeyError as error:
                self._log.warning(
                    "older secrets not retired yet",
                    token_id=token.id,
                    account_id=token.account_id,
                    error=type(error).__name__,
                )
                await asyncio.sleep(RETRY_SECONDS * math.pow(2, attempt))
            else:
                return

"""`Verifier`: "may this secret do this?", asked on every request that a service handles.

It owns what can be told without the service, which today is that something is no secret at all.
`verify` is the only way in, so that what it knows can grow without its callers noticing.
"""

from types import TracebackType
from typing import Final, Self

from latchkey import _convert
from latchkey._retry import VERIFY_TIMEOUT_SECONDS, checked_timeout
from latchkey._shape import is_well_formed
from latchkey.client import Client
from latchkey.models import Scope, Verdict, Verification
from latchkey.secret import Secret

_MALFORMED: Final = Verification(verdict=Verdict.MALFORMED)


class Verifier:
    """Verifies secrets with the service behind `client`, a Client or a target as Client takes it.

    `timeout_seconds` bounds each verify. A Client that is passed in stays open on close().
    """

    def __init__(
        self,
        client: Client | str = "127.0.0.1:50051",
        *,
        timeout_seconds: float = VERIFY_TIMEOUT_SECONDS,
    ) -> None:
        self._owns_client = isinstance(client, str)
        self._client = Client(client) if isinstance(client, str) else client
        checked_timeout(timeout_seconds)
        self._timeout_seconds = timeout_seconds

    async def verify(
        self,
        secret: str | Secret,
        scope: Scope | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> Verification:
        """Answer whether `secret` may do what needs `scope`; None needs none.

        `timeout_seconds` can only shorten the verifier's own bound. Never fails because of what
        was presented. Raises an error of `latchkey.errors`, mostly Unavailable, when there is no
        safe answer: then the holder is not allowed.
        """
        _convert.scope_out(scope, "scope")  # a wrong question is wrong for every secret
        text = _convert.secret_out(secret)
        if not is_well_formed(text):
            return _MALFORMED
        timeout = self._timeout_seconds
        if timeout_seconds is not None:
            timeout = min(timeout, timeout_seconds)
        return await self._client.verify(text, scope, timeout_seconds=timeout)

    async def close(self) -> None:
        """Close the connection, if it is the verifier's own. Safe to repeat."""
        if self._owns_client:
            await self._client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

"""The questions of one Watch stream for calls of tokens with a rate limit, one at a time.

Owns the task that answers a question. It does not own the calls (`tokens/token_rates.py`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from latchkey_service.coherence.watch_events import IssuedCalls, Request, Shares, WantedCalls
from latchkey_service.errors import LatchkeyError
from latchkey_service.settings.logs import logger

__all__ = ["WANTED_MAX", "DrawCalls", "ShareQuestions", "no_calls"]

# Tokens in one question: the limit of one statement.
WANTED_MAX: Final = 1_000

DrawCalls = Callable[[Sequence[WantedCalls]], Awaitable[IssuedCalls]]


async def no_calls(_wanted: Sequence[WantedCalls]) -> IssuedCalls:
    """Return no calls: the client asks the service for each verify."""
    return IssuedCalls((), 0.0)


class ShareQuestions:
    """Answers the questions of one stream. Event loop only."""

    def __init__(self) -> None:
        self._received = 0
        self._task: asyncio.Task[None] | None = None
        self._answer: tuple[int, IssuedCalls] | None = None

    def receive(self, request: Request, draw: DrawCalls, on_answer: Callable[[], None]) -> None:
        """Begin to answer the question in a message, if it has one.

        Draws the calls with `draw`, and calls `on_answer` when `take` has the answer.

        Ignores a question that comes before the answer to the last one: its client does not follow
        the protocol.
        """
        number = request.shares_number
        if number <= self._received or self._task is not None:
            return
        self._received = number
        self._task = asyncio.create_task(
            self._draw(number, request.wanted, draw, on_answer), name="watch shares"
        )

    def take(self, now: float) -> Shares | None:
        """Return the answer to send, or None. Each answer is returned once."""
        if self._answer is None:
            return None
        (number, issued), self._answer = self._answer, None
        left = issued.ends - now
        return Shares(number, issued.calls if left > 0 else (), max(left, 0.0))

    def close(self) -> None:
        """Stop. Calls that were drawn meanwhile are lost."""
        if self._task is not None:
            self._task.cancel()

    async def _draw(
        self,
        number: int,
        wanted: Sequence[WantedCalls],
        draw: DrawCalls,
        on_answer: Callable[[], None],
    ) -> None:
        issued = IssuedCalls((), 0.0)
        try:
            issued = await draw(wanted)
        except LatchkeyError:
            # The client asks the service for each verify, and learns the reason there.
            pass
        except Exception as error:  # noqa: BLE001 - a client without shares asks for each verify
            # Only the type: the text may contain anything.
            logger().warning("shares not drawn", error=type(error).__name__)
        self._answer, self._task = (number, issued), None
        on_answer()

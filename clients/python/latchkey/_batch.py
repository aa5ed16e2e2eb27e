"""Misses that happen together, asked about together.

It owns who waits for which question. Attempts, retries and errors are the Client's.
"""

import asyncio
import copy
from dataclasses import dataclass
from itertools import islice
from typing import Final

from latchkey.client import Client
from latchkey.errors import (
    InternalError,
    LatchkeyError,
    PermissionDenied,
    UnexpectedStatus,
    late,
)
from latchkey.models import Scope, Verification

# As many answers, with the largest labels, as fit into 4 MiB, the usual limit on messages of a
# channel that was made elsewhere. Larger ones are not faster.
BATCH_MAX: Final = 200
# Whoever would give up this shortly before the rest of its batch waits for the rest: misses of one
# turn of the event loop with the same timeout need no timer each.
DEADLINE_SLACK_SECONDS: Final = 0.02
# How long not to try again where batches are refused, and single verifies perhaps are not.
REFUSED_PAUSE_SECONDS: Final = 60.0

Question = tuple[str, Scope | None]


@dataclass(slots=True)
class _Waiter:
    """A caller of `ask`."""

    future: "asyncio.Future[Verification | None]"
    end: float
    """When it gives up, by the event loop's clock."""


class Batcher:
    """Sends what is asked in one turn of the event loop as one BatchVerify."""

    def __init__(self, client: Client) -> None:
        self.batches = 0
        self._client = client
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unsent: dict[Question, list[_Waiter]] = {}
        self._under_way: set[asyncio.Task[None]] = set()
        self._refused_until = 0.0

    async def ask(self, secret: str, scope: Scope | None, end: float) -> Verification | None:
        """Return the service's answer, or None when there is nobody to share a call with.

        `end` is when to give up, by the event loop's clock. Raises what the shared call ended
        with, a copy for each of its callers. None leaves the call to the caller: of a lonely
        question, who can cancel it without anybody else's harm, or after a refusal, which may have
        taken most of the time.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            # What an event loop that has ended left behind is nobody's any more.
            self._loop, self._unsent, self._refused_until = loop, {}, 0.0
        if loop.time() < self._refused_until:
            return None
        if not self._unsent:
            loop.call_soon(self._send)
        waiter = _Waiter(loop.create_future(), end)
        # Only with questions that were not sent yet: an answer that is under way was read before
        # this verify began, perhaps before a change that it must heed (coherence rule 4).
        self._unsent.setdefault((secret, scope), []).append(waiter)
        return await waiter.future

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, {}
        if len(unsent) == 1:
            (waiters,) = unsent.values()
            if len(waiters) == 1:
                _answer(waiters, None)
                return
        questions = iter(unsent.items())
        while batch := dict(islice(questions, BATCH_MAX)):
            self.batches += 1
            task = asyncio.create_task(self._ask_together(batch), name="latchkey batch")
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _ask_together(self, batch: dict[Question, list[_Waiter]]) -> None:
        loop = asyncio.get_running_loop()
        everybody = [waiter for waiters in batch.values() for waiter in waiters]
        end = max(waiter.end for waiter in everybody)
        timers = [
            loop.call_at(waiter.end, _expire, waiter)
            for waiter in everybody
            if waiter.end < end - DEADLINE_SLACK_SECONDS
        ]
        # Should anything else go wrong, it is a bug, and still nobody waits for ever.
        failure: LatchkeyError = InternalError("BatchVerify failed by a fault of the library.")
        try:
            answers = await self._client.batch_verify(
                batch, timeout_seconds=max(end - loop.time(), 0.001)
            )
            for waiters, answer in zip(batch.values(), answers, strict=True):
                _answer(waiters, answer)
        except LatchkeyError as error:
            failure = error
            if _is_refusal(error):
                self._refused_until = loop.time() + REFUSED_PAUSE_SECONDS
                _answer(everybody, None)
        except asyncio.CancelledError:
            # The event loop is ending, and everybody on it.
            for waiter in everybody:
                waiter.future.cancel()
            raise
        finally:
            for timer in timers:
                timer.cancel()
            for waiter in everybody:
                if not waiter.future.done():
                    # A copy: raised in several tasks, one would collect all their tracebacks.
                    waiter.future.set_exception(copy.copy(failure))


def _answer(waiters: list[_Waiter], answer: Verification | None) -> None:
    for waiter in waiters:
        if not waiter.future.done():  # it may have been cancelled, or its time was up
            waiter.future.set_result(answer)


def _expire(waiter: _Waiter) -> None:
    if not waiter.future.done():
        waiter.future.set_exception(late("BatchVerify"))


def _is_refusal(error: LatchkeyError) -> bool:
    """Tell whether it is batches that are refused, such as by a proxy that lists methods."""
    if isinstance(error, PermissionDenied):
        return True
    return isinstance(error, UnexpectedStatus) and error.code.name == "UNIMPLEMENTED"

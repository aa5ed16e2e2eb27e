"""Combines cache misses that happen together into one call.

This module knows which verifies wait for which question. The Client handles attempts, retries and
errors.
"""

import asyncio
import copy
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from latchkey import _tracing
from latchkey.client import Client
from latchkey.errors import (
    InternalError,
    LatchkeyError,
    PermissionDenied,
    UnexpectedStatus,
    late,
)
from latchkey.models import Scope, Verification

if TYPE_CHECKING:
    from opentelemetry.trace import Span

# With the largest labels, networks and permissions, this many complete answers fit into the 4 MiB
# that a response may have. Larger batches are not faster.
BATCH_MAX: Final = 150
# A waiter whose deadline is at most this much earlier than the batch's waits for the whole batch.
# Misses of one event loop turn with the same timeout then need no timer each.
DEADLINE_SLACK_SECONDS: Final = 0.02
# How long to verify one by one after batches were refused. Single verifies may still be allowed.
REFUSED_PAUSE_SECONDS: Final = 60.0

Question = tuple[str, Scope | None, str, tuple[str, ...]]
"""A secret, the required scope, the client's address, and the required permissions."""


@dataclass(slots=True)
class _Waiter:
    """One call of `ask` that waits for its answer."""

    future: "asyncio.Future[Verification | None]"
    end: float
    """Deadline, by the event loop's clock."""
    span: "Span | None"
    """The application's span, if it records a trace."""


class Batcher:
    """Sends all questions of one event loop turn as one BatchVerify."""

    def __init__(self, client: Client) -> None:
        self.batches = 0
        self._client = client
        self._loop: asyncio.AbstractEventLoop | None = None
        # By question. Questions that share no answer have different numbers.
        self._unsent: dict[tuple[Question, int], list[_Waiter]] = {}
        self._numbers = itertools.count(1)
        self._under_way: set[asyncio.Task[None]] = set()
        self._refused_until = 0.0

    async def ask(
        self, question: Question, end: float, *, alone: bool = False
    ) -> Verification | None:
        """Return the service's answer, or None if the caller has to verify by itself.

        `end` is the deadline, by the event loop's clock. None means that there is no other question
        to share a call with, that the answer lacks details of the token, or that batches were
        refused, which may have taken most of the time. A caller without others can cancel its own
        call without affecting them. If the shared call fails, each caller gets a copy of its error.

        Equal questions share an answer, except those that are `alone`: for a token with a rate
        limit, each VALID answer stands for one call of it.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            # The previous event loop has ended, and with it everyone who waited on it.
            self._loop, self._unsent, self._refused_until = loop, {}, 0.0
        if loop.time() < self._refused_until:
            return None
        if not self._unsent:
            loop.call_soon(self._send)
        waiter = _Waiter(loop.create_future(), end, _tracing.current())
        # Only join questions that are not sent yet. The answer to a sent question may have been
        # read before a change that precedes this verify (coherence rule 4).
        key = (question, next(self._numbers) if alone else 0)
        self._unsent.setdefault(key, []).append(waiter)
        return await waiter.future

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, {}
        if len(unsent) == 1:
            (waiters,) = unsent.values()
            if len(waiters) == 1:
                _answer(waiters, None)
                return
        questions = iter(unsent.items())
        while batch := dict(itertools.islice(questions, BATCH_MAX)):
            self.batches += 1
            task = asyncio.create_task(self._ask_together(batch), name="latchkey batch")
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _ask_together(self, batch: dict[tuple[Question, int], list[_Waiter]]) -> None:
        loop = asyncio.get_running_loop()
        everybody = [waiter for waiters in batch.values() for waiter in waiters]
        end = max(waiter.end for waiter in everybody)
        timers = [
            loop.call_at(waiter.end, _expire, waiter)
            for waiter in everybody
            if waiter.end < end - DEADLINE_SLACK_SECONDS
        ]
        # Any other exception is a bug. Even then, no waiter may wait forever.
        failure: LatchkeyError = InternalError("BatchVerify failed because of a library bug.")
        try:
            with _tracing.serving(waiter.span for waiter in everybody):
                answers = await self._client.batch_verify(
                    [question for question, _ in batch],
                    timeout_seconds=max(end - loop.time(), 0.001),
                )
            for waiters, answer in zip(batch.values(), answers, strict=True):
                if answer.details_omitted:
                    # The application gets the whole token, so the question is asked again.
                    _answer(waiters, None)
                elif answer.allowed and answer.token is not None and answer.token.rate_limit:
                    # It stands for one call, so the others have to ask for theirs.
                    _answer(waiters[1:], None)
                    _answer(waiters[:1], answer)
                else:
                    _answer(waiters, answer)
        except LatchkeyError as error:
            failure = error
            if _is_refusal(error):
                self._refused_until = loop.time() + REFUSED_PAUSE_SECONDS
                _answer(everybody, None)
        except asyncio.CancelledError:
            # The event loop is shutting down and cancels all of its tasks.
            for waiter in everybody:
                waiter.future.cancel()
            raise
        finally:
            for timer in timers:
                timer.cancel()
            for waiter in everybody:
                if not waiter.future.done():
                    # A copy each: one exception raised in several tasks collects every traceback.
                    waiter.future.set_exception(copy.copy(failure))


def _answer(waiters: list[_Waiter], answer: Verification | None) -> None:
    for waiter in waiters:
        if not waiter.future.done():  # cancelled or expired
            waiter.future.set_result(answer)


def _expire(waiter: _Waiter) -> None:
    if not waiter.future.done():
        waiter.future.set_exception(late("BatchVerify"))


def _is_refusal(error: LatchkeyError) -> bool:
    """Return whether BatchVerify itself is refused, for example by a proxy that lists methods."""
    if isinstance(error, PermissionDenied):
        return True
    return isinstance(error, UnexpectedStatus) and error.code.name == "UNIMPLEMENTED"

"""The questions of one Watch stream for calls of tokens with a rate limit."""

import asyncio
from collections.abc import Sequence

import pytest
from latchkey_coherence.rate import RateLimit
from latchkey_coherence.verdict_cache import NOWHERE
from latchkey_service.coherence.share_questions import ShareQuestions, no_calls
from latchkey_service.coherence.watch_events import IssuedCalls, Request, Shares, WantedCalls
from latchkey_service.errors import StoreUnavailable

from tests.helpers.waiting import eventually

LIMIT = RateLimit(10, 1, 10)
CALLS = [("t1", 3, LIMIT)]


class Draws:
    """Answers a draw when a test says so."""

    def __init__(self) -> None:
        self.wanted: list[Sequence[WantedCalls]] = []
        self.answer: asyncio.Future[IssuedCalls] = asyncio.get_running_loop().create_future()

    async def draw(self, wanted: Sequence[WantedCalls]) -> IssuedCalls:
        self.wanted.append(wanted)
        return await self.answer


def question(number: int) -> Request:
    return Request(NOWHERE, 0, False, shares_number=number, wanted=[WantedCalls("t1", 3)])


async def test_question_is_answered_once() -> None:
    """The answer contains the calls, and their remaining time when it is sent."""
    questions, draws, told = ShareQuestions(), Draws(), asyncio.Event()
    questions.receive(question(0), draws.draw, told.set)
    await asyncio.sleep(0)
    assert not draws.wanted, "a message without a question draws nothing"
    questions.receive(question(7), draws.draw, told.set)
    assert questions.take(10.0) is None
    draws.answer.set_result(IssuedCalls(CALLS, 10.9))
    await asyncio.wait_for(told.wait(), 5)
    answer = questions.take(10.4)
    assert answer is not None
    assert (answer.number, answer.calls) == (7, CALLS)
    assert answer.seconds == pytest.approx(0.5)
    assert questions.take(10.4) is None


async def test_one_question_at_a_time() -> None:
    """A client that does not wait for the answer, or repeats a number, is ignored."""
    questions, draws, told = ShareQuestions(), Draws(), asyncio.Event()
    for number in (1, 2, 3):
        questions.receive(question(number), draws.draw, told.set)
    draws.answer.set_result(IssuedCalls(CALLS, 10.9))
    await asyncio.wait_for(told.wait(), 5)
    answer = questions.take(10.0)
    assert answer is not None
    assert answer.number == 1
    questions.receive(question(1), draws.draw, told.set)
    questions.receive(question(2), draws.draw, told.set)
    await asyncio.sleep(0)
    assert len(draws.wanted) == 2


async def test_calls_that_have_ended_are_not_sent() -> None:
    """An answer that is late has no calls, so that the client can ask again."""
    questions, draws, told = ShareQuestions(), Draws(), asyncio.Event()
    questions.receive(question(1), draws.draw, told.set)
    draws.answer.set_result(IssuedCalls(CALLS, 10.9))
    await asyncio.wait_for(told.wait(), 5)
    assert questions.take(10.9) == Shares(1, (), 0.0)


@pytest.mark.parametrize("error", [StoreUnavailable("down"), RuntimeError("a fault")])
async def test_failed_draw_is_answered_without_calls(error: Exception) -> None:
    """The client asks the service for each verify, and may ask for shares again."""
    questions, draws, told = ShareQuestions(), Draws(), asyncio.Event()
    draws.answer.set_exception(error)
    questions.receive(question(1), draws.draw, told.set)
    await asyncio.wait_for(told.wait(), 5)
    assert questions.take(10.0) == Shares(1, (), 0.0)


async def test_end_of_the_stream_cancels_the_draw() -> None:
    """Nobody waits for a draw whose stream has ended."""
    questions, draws, told = ShareQuestions(), Draws(), asyncio.Event()
    questions.receive(question(1), draws.draw, told.set)
    await asyncio.sleep(0)
    questions.close()

    async def cancelled() -> bool:
        return draws.answer.cancelled()

    await eventually(cancelled, "the draw is cancelled")
    assert not told.is_set()


async def test_server_without_draws_gives_no_calls() -> None:
    """Every question gets an answer."""
    questions, told = ShareQuestions(), asyncio.Event()
    questions.receive(question(1), no_calls, told.set)
    await asyncio.wait_for(told.wait(), 5)
    assert questions.take(0.0) == Shares(1, (), 0.0)

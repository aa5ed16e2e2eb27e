"""Keeps the shares of tokens with a rate limit, and asks for more.

A share is a number of calls that this client may accept by itself, each for at most a second. Only
tokens whose limit permits at least two calls a second have shares; other calls ask the service,
which keeps slow limits exact. `_subscription` sends the questions on the stream whose grants count,
one at a time, while there is demand. A client that gets no answer asks for nothing more on that
stream, and asks the service for each verify.

Owns no I/O. All times are seconds of `latchkey_coherence.lease.boottime`.
"""

import math
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from latchkey_coherence.rate import RateLimit, Share, Shares, share_end

from latchkey import _rate_limit

# Between two questions. A share ends after a second, so several questions renew it.
ASK_SECONDS: Final = 0.25
# The most tokens that a server accepts in one question.
WANTED_MAX: Final = 1_000
# Tokens with demand that wait for a question. When the list is full, further ones get no share.
NOTED_MAX: Final = 100_000


@dataclass(frozen=True, slots=True)
class ShareQuestion:
    """A question for calls, by token, with a number that increases."""

    number: int
    wanted: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class SharesReceived:
    """The answer to the question with this number: calls that count for `seconds` from then."""

    number: int
    calls: tuple[tuple[str, int, RateLimit], ...]
    seconds: float


class ShareLog:
    """The shares of one client. `note` may be called in any thread."""

    def __init__(self) -> None:
        self._shares = Shares()
        # Shares that were needed since the last question.
        self._noted: deque[Share] = deque()
        self._number = 0
        # The number of the open question, and the time before it was sent.
        self._asked: tuple[int, float] | None = None
        self._ask_at = -math.inf

    def of(self, token_id: str, limit: RateLimit) -> Share:
        """Return the token's share under this limit."""
        return self._shares.of(token_id, limit)

    def note(self, share: Share) -> None:
        """Note that a call was accepted. Two threads may note a share at once, which does no
        harm.
        """
        if not share.noted and share.limit.ahead_max and len(self._noted) < NOTED_MAX:
            share.noted = True
            self._noted.append(share)

    def due(self) -> float | None:
        """Return when to call `take`. None: nothing is needed, or a question is open."""
        return self._ask_at if self._noted and self._asked is None else None

    def take(self, now: float) -> ShareQuestion | None:
        """Return the next question, or None if none is due. `now` was read just before."""
        due = self.due()
        if due is None or now < due:
            return None
        self._ask_at = now + ASK_SECONDS
        wanted: dict[str, int] = {}
        while self._noted and len(wanted) < WANTED_MAX:
            share = self._noted.popleft()
            # In this order: a call that is accepted from now on notes the share again.
            share.noted = False
            if calls := share.ask(now):
                wanted[share.token_id] = calls
        if not wanted:
            return None
        self._number += 1
        self._asked = (self._number, now)
        return ShareQuestion(self._number, tuple(wanted.items()))

    def receive(self, answer: SharesReceived) -> None:
        """Add the calls in an answer to the open question. Ignores any other answer."""
        if self._asked is None or answer.number != self._asked[0]:
            return
        (_, asked_at), self._asked = self._asked, None
        # Counted from before the question was sent, as a lease is.
        ends = share_end(asked_at, answer.seconds)
        for token_id, calls, limit in answer.calls:
            # Calls under another limit than the one that this client knows do not count.
            if (share := self._shares.find(token_id, limit)) is not None:
                share.add(calls, ends)

    def lose(self, number: int) -> None:
        """Give up the question with this number, because its stream has ended or is closing."""
        if self._asked is not None and self._asked[0] == number:
            self._asked = None


def core_limit(limit: _rate_limit.RateLimit) -> RateLimit | None:
    """Return the limit as the core knows it, or None if this version cannot compute with it."""
    seconds = limit.period // timedelta(seconds=1)
    if limit.count < 1 or limit.burst < 1 or seconds < 1 or limit.period % timedelta(seconds=1):
        return None
    return RateLimit(limit.count, seconds, limit.burst)

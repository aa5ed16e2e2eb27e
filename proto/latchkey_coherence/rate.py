"""Rate limits of tokens: the bucket that issues calls, and the shares that verifiers spend. Pure.

One bucket exists for each limited token, as a row in the database (`tokens/rate_table.py` of the
service). It issues calls at the token's rate. A verifier answers VALID only by spending a call that
the bucket has issued, at most `SHARE_SECONDS` after it was issued. So however many verifiers there
are, and whatever happens to them, the calls that are accepted in any window of w seconds are at
most burst + rate * (w + SHARE_SECONDS).

Does not own the messages by which shares travel (docs/protocol.md, "Rate limits").
"""

import math
import threading
from collections import deque
from typing import Final, NamedTuple
from weakref import WeakValueDictionary

from latchkey_coherence.lease import DRIFT_MAX

__all__ = [
    "AHEAD_SECONDS",
    "SHARE_SECONDS",
    "Draw",
    "RateLimit",
    "Share",
    "Shares",
    "draw",
    "share_end",
]

SHARE_SECONDS: Final = 1.0
"""How long an issued call can be spent. Part of the bound, so it is the same in all releases."""
AHEAD_SECONDS: Final = 0.5
"""The time for which a verifier asks for calls ahead of demand. Half of the time for which it may
spend them, so that they are used up before they end."""
# Shares that arrive while older ones are left. A client asks four times a second.
_PARTS_MAX: Final = 16
_MICROSECONDS: Final = 1_000_000
_AHEAD_MICROSECONDS: Final = round(AHEAD_SECONDS * _MICROSECONDS)


class RateLimit(NamedTuple):
    """At most `calls` in `period_seconds` on average, and at most `burst` at once."""

    calls: int
    period_seconds: int
    burst: int

    @property
    def per_second(self) -> float:
        """The rate at which the bucket fills."""
        return self.calls / self.period_seconds

    @property
    def ahead_max(self) -> int:
        """How many calls a verifier may ask for ahead of demand.

        None for slow limits: each call that such a bucket issues is spent at once, so none is lost
        in a verifier that does not need it.
        """
        return self.calls * _AHEAD_MICROSECONDS // (self.period_seconds * _MICROSECONDS)


class Draw(NamedTuple):
    """What a bucket issues, and its state afterwards."""

    calls: int
    full_at: int
    """When the bucket will be full, in microseconds on the database's clock."""
    retry_seconds: float
    """When it can issue another call. 0: now."""


def draw(limit: RateLimit, full_at: int, now: int, needed: int, ahead: int) -> Draw:
    """Issue calls: `needed` for verifies that wait, and up to `ahead` for later ones.

    `full_at` and `now` are microseconds on the database's clock. A `full_at` in the past stands for
    a full bucket. Waiting verifies come first, and calls ahead of demand take at most half of what
    is left, so that one verifier does not take what another needs.

    This is the reference for the statement in the service's `tokens/rate_table.py`, which tests
    compare with it. All divisions round to the side that issues less.
    """
    period = limit.period_seconds * _MICROSECONDS
    # The time in which an empty bucket fills.
    capacity = -(-limit.burst * period // limit.calls)
    # More than the capacity means that the limit has changed, or the clock was set back.
    owed = min(max(full_at - now, 0), capacity)
    available = (capacity - owed) * limit.calls // period
    calls = min(needed, available)
    calls += min(ahead, limit.ahead_max, (available - calls) // 2)
    owed += -(-calls * period // limit.calls)
    wait = owed - capacity - (-period // limit.calls)
    return Draw(calls, now + owed, max(0, wait) / _MICROSECONDS)


def share_end(began: float, seconds: float = SHARE_SECONDS) -> float:
    """Return when calls can no longer be spent that were asked for at `began`.

    `began` is the clock before the question was sent. A thousandth shorter than `seconds`, because
    clocks run at different rates.
    """
    return began + min(seconds, SHARE_SECONDS) * (1 - DRIFT_MAX)


class Share:
    """The issued calls of one token that one verifier may spend.

    Begins empty: a verifier that has just started, or was cut off, has nothing to spend. Any thread
    may use it. Times are seconds on the verifier's clock, with which leases are measured.
    """

    __slots__ = (
        "__weakref__",
        "_asked_at",
        "_denied_until",
        "_lock",
        "_parts",
        "_used",
        "limit",
        "noted",
        "token_id",
    )

    def __init__(self, token_id: str, limit: RateLimit) -> None:
        self.token_id = token_id
        self.limit = limit
        self.noted = False
        """Whether a list of shares in use contains it. For the client library only."""
        self._lock = threading.Lock()
        # Numbers of calls, each with the time from which they cannot be spent, oldest first.
        self._parts: deque[list[float]] = deque()
        self._denied_until = -math.inf
        # Calls that were accepted since the last question, and when that was.
        self._used = 0
        self._asked_at = -math.inf

    def spend(self, now: float) -> bool:
        """Spend one call. Return whether there was one."""
        with self._lock:
            parts = self._parts
            while parts:
                part = parts[0]
                if now >= part[1]:
                    parts.popleft()
                    continue
                part[0] -= 1
                if part[0] < 1:
                    parts.popleft()
                self._used += 1
                return True
        return False

    def add(self, calls: int, ends: float) -> None:
        """Add calls that can be spent until `ends`."""
        if calls < 1:
            return
        with self._lock:
            if len(self._parts) >= _PARTS_MAX:
                self._parts.popleft()
            self._parts.append([calls, ends])

    def count(self, calls: int) -> None:
        """Count calls that were accepted without this share, and so show how many are needed."""
        with self._lock:
            self._used += calls

    def deny(self, until: float) -> None:
        """Refuse without asking until a time: the bucket is empty until then."""
        self._denied_until = until

    def denied_seconds(self, now: float) -> float:
        """Return how long to refuse without asking. 0: the bucket may have calls."""
        return max(0.0, self._denied_until - now)

    def ask(self, now: float) -> int:
        """Return how many calls to ask for ahead of demand, in a question that is sent now.

        At most as many as were accepted since the last question. So at least half of the calls that
        a bucket issues are spent, however the load moves between verifiers.
        """
        with self._lock:
            passed = max(now - self._asked_at, 0.0)
            used, self._used, self._asked_at = self._used, 0, now
            left = sum(int(calls) for calls, ends in self._parts if ends > now)
        share = min(1.0, AHEAD_SECONDS / passed) if passed else 1.0
        return max(0, min(int(used * share), self.limit.ahead_max) - left)


class Shares:
    """The shares of one verifier, by token. A share lasts as long as something refers to it.

    Cached verdicts do. So a token that was invalidated or evicted loses its share, at the latest
    when it is read again with another limit.
    """

    __slots__ = ("_by_token",)

    def __init__(self) -> None:
        self._by_token: WeakValueDictionary[str, Share] = WeakValueDictionary()

    def of(self, token_id: str, limit: RateLimit) -> Share:
        """Return the token's share under this limit.

        A share under another limit is replaced: calls that were issued under an earlier limit are
        not spent under the new one.
        """
        share = self._by_token.get(token_id)
        if share is None or share.limit != limit:
            share = self._by_token[token_id] = Share(token_id, limit)
        return share

    def find(self, token_id: str, limit: RateLimit) -> Share | None:
        """Return the token's share under this limit, or None."""
        share = self._by_token.get(token_id)
        return share if share is not None and share.limit == limit else None

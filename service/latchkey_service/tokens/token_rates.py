"""Decides whether a token with a rate limit may be used once more.

A verify spends a call of the token's share in this process. Without one, it waits for a draw from
the token's bucket. While the bucket is empty, this process refuses without asking it.

Owns the shares of this process, and hands calls on to its Watch clients. It does not own the
buckets (`rate_table.py`) or the draws (`rate_draws.py`).
"""

from collections.abc import Callable, Sequence
from typing import Final

from latchkey_coherence.rate import RateLimit, Share, Shares

from latchkey_service.coherence.watch_events import IssuedCalls, WantedCalls
from latchkey_service.tokens.rate_draws import RateDraws
from latchkey_service.tokens.rate_table import Want

__all__ = ["TokenRates"]

# How long to refuse without asking after a bucket was empty. A token that is used too fast then
# costs few statements. The time is short compared with that in which the burst fills again, so that
# little of the limit is lost.
DENIED_SECONDS_MIN: Final = 0.005
DENIED_SECONDS_MAX: Final = 0.1
DENIED_SHARE: Final = 0.25
# How long a client waits for its shares at most. Later, they would have ended.
CLIENT_SECONDS: Final = 1.0


class TokenRates:
    """The shares of one process. Event loop only. Times are seconds on the process's clock."""

    def __init__(self, draws: RateDraws, clock: Callable[[], float]) -> None:
        self.draws = draws
        self._clock = clock
        self._shares = Shares()

    def share_of(self, token_id: str, limit: RateLimit | None) -> Share | None:
        """Return the share of a token, or None if it has no limit."""
        return None if limit is None else self._shares.of(token_id, limit)

    async def admit(self, shares: Sequence[Share], deadline: float) -> list[float]:
        """Spend a call of each share; return when to retry each one that has none, in seconds.

        0 stands for a call that was spent. A share may occur several times. Raises
        StoreUnavailable, Overloaded and Unavailable.
        """
        now = self._clock()
        results: list[float | None] = []
        needed: dict[Share, int] = {}
        for share in shares:
            result = self.admit_now(share, now)
            results.append(result)
            if result is None:
                needed[share] = needed.get(share, 0) + 1
        if not needed:
            return [result or 0.0 for result in results]
        wants = [Want(share.token_id, count, share.ask(now)) for share, count in needed.items()]
        drawn = await self.draws.draw(wants, deadline)
        now = self._clock()
        accepted: dict[Share, int] = {}
        for share, want, one in zip(needed, wants, drawn, strict=True):
            # The process may have been paused since the draw.
            calls = accepted[share] = one.calls if now < one.ends else 0
            share.count(calls)
            if one.limit == share.limit:
                share.add(one.ahead, one.ends)
            if calls < want.needed:
                share.deny(now + max(one.retry_seconds, _denied_seconds(share.limit)))
        for number, share in enumerate(shares):
            if results[number] is None:
                results[number] = 0.0
                if accepted[share] == 0:
                    # At least the shortest time, in case this one has just passed.
                    results[number] = max(share.denied_seconds(now), DENIED_SECONDS_MIN)
                else:
                    accepted[share] -= 1
        return [result or 0.0 for result in results]

    def admit_now(self, share: Share, now: float) -> float | None:
        """Spend a call of a share and return 0, or return when to retry, or None to ask."""
        if share.spend(now):
            return 0.0
        return share.denied_seconds(now) or None

    async def draw_for_client(self, wanted: Sequence[WantedCalls]) -> IssuedCalls:
        """Draw calls ahead of demand for a client. Raises as `admit` does."""
        wants: dict[str, Want] = {}
        for token_id, calls in wanted:
            if token_id not in wants and calls > 0:
                wants[token_id] = Want(token_id, 0, calls)
        if not wants:
            return IssuedCalls((), self._clock())
        drawn = await self.draws.draw([*wants.values()], self._clock() + CLIENT_SECONDS)
        issued = [
            (token_id, one.ahead, one.limit)
            for token_id, one in zip(wants, drawn, strict=True)
            if one.ahead and one.limit is not None
        ]
        return IssuedCalls(issued, min(one.ends for one in drawn))


def _denied_seconds(limit: RateLimit) -> float:
    filled = limit.burst / limit.per_second * DENIED_SHARE
    return min(max(DENIED_SECONDS_MIN, filled), DENIED_SECONDS_MAX)

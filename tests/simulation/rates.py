"""A token with a rate limit in the simulation: its draws, its verifies, and its bound.

The shipped classes decide: `TokenRates` in a server, `ShareLog` in a client, and the core's `draw`
in a database. A coroutine of `TokenRates` waits for a draw, and a step of the simulation resumes
it. `ServerRates` repeats what `RateDraws` does with a statement and its answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import TYPE_CHECKING, Any, cast

from latchkey._shares import ShareQuestion
from latchkey_coherence import rate
from latchkey_coherence.rate import SHARE_SECONDS, Draw, RateLimit
from latchkey_service.coherence.reads import ReadBegan, Standing
from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.coherence.watch_events import IssuedCalls, WantedCalls
from latchkey_service.coherence.watch_sessions import WatchSession
from latchkey_service.errors import StoreUnavailable
from latchkey_service.tokens.rate_draws import Drawn, RateDraws
from latchkey_service.tokens.rate_table import Want
from latchkey_service.tokens.token_rates import TokenRates

if TYPE_CHECKING:
    from tests.simulation.processes import Client, Server

__all__ = ["LIMIT", "LIMITED", "Meter", "ServerRates", "verify_in_client"]

LIMITED = "limited"
# So few calls that the steps of a world exhaust them, and more than two in a second: clients spend
# calls of slower limits only by asking.
LIMIT = RateLimit(40, 1, 30)
# A call is a thousand times as much as what the rounding of times adds.
TOLERANCE = 0.001


class Meter:
    """Compares the verifies that answer VALID with the bound, in all windows at once.

    Keeps the level of a bucket that holds b + r * 1 s. Each VALID takes a call from it. The
    level falls below zero exactly if a window has more than b + r * (w + 1 s). `extra` are the
    calls that failovers have added.
    """

    def __init__(self, limit: RateLimit) -> None:
        self._rate = limit.per_second
        self._full = limit.burst + limit.per_second * SHARE_SECONDS
        self._level = self._full
        self._at = 0.0
        self.extra = 0.0

    def accept(self, now: float) -> bool:
        """Count a VALID at this time; return whether the bound permits it."""
        self._level = min(self._full, self._level + self._rate * (now - self._at)) - 1
        self._at = now
        if self._level < 0:
            self.extra += self._level
            self._level = 0.0
        return self.extra > -TOLERANCE


class _Sent:
    """A draw that a coroutine waits for."""

    def __init__(self, wants: Sequence[Want]) -> None:
        self.wants = wants

    def __await__(self) -> Generator[_Sent, list[Drawn], list[Drawn]]:
        return (yield self)


class _Draws:
    """Takes the place of `RateDraws`."""

    async def draw(self, wants: Sequence[Want], _deadline: float) -> list[Drawn]:
        return await _Sent(wants)


class ServerRates:
    """What a server process does about the limited token."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._world = server.world
        self._database = server.world.current
        self._rates = TokenRates(cast("RateDraws", _Draws()), server.clock)
        # For as long as the process lives: longer than the cache may keep the token.
        share = self._rates.share_of(LIMITED, LIMIT)
        assert share is not None, "the token has a limit"
        self._share = share

    def verify(self, answer: Callable[[float], None]) -> None:
        """Answer when to retry, or 0 for VALID. Does not answer without a lease or a draw."""
        if self._server.alive and self._server.clock() < self._server.state.lease_ends:

            def done(retries: list[float]) -> None:
                if not retries[0]:
                    self._world.accepted("by a server")
                answer(retries[0])

            self._resume(self._rates.admit([self._share], math.inf), None, done, lambda: None)

    def reconnect(self) -> None:
        """Open a new session. It may lead to a deposed primary."""
        self._database = self._world.reached()

    def draw_for(self, session: WatchSession, question: ShareQuestion) -> None:
        """Answer a client's question, as `ShareQuestions` does."""

        def done(issued: IssuedCalls) -> None:
            session.share_questions._answer = (question.number, issued)

        wanted = [WantedCalls(*want) for want in question.wanted]
        nothing = IssuedCalls((), 0.0)
        self._resume(self._rates.draw_for_client(wanted), None, done, lambda: done(nothing))

    def _resume(
        self,
        waiting: Coroutine[Any, Any, Any],
        drawn: list[Drawn] | None,
        done: Callable[[Any], None],
        failed: Callable[[], None],
    ) -> None:
        """Let a coroutine run until it waits for a draw, and send the draw."""
        try:
            sent = waiting.send(drawn)
        except StopIteration as end:
            done(end.value)
            return

        def fail() -> None:
            try:
                waiting.throw(StoreUnavailable("no draw"))
            except StoreUnavailable:
                failed()

        (want,) = sent.wants
        state, clock = self._server.state, self._server.clock
        asked = clock()
        if asked >= state.lease_ends:
            fail()
            return
        began = ReadBegan.now(state)

        def receive(issued: Draw, snapshot: Snapshot) -> None:
            if not self._server.alive:
                return
            if not self._accepts(snapshot, began):
                self.reconnect()
                self._world.count("draws refused")
                fail()
            elif clock() >= (ends := rate.share_end(asked)):
                fail()
            else:
                self._world.count("drawn")
                calls = min(want.needed, issued.calls)
                ahead, retry = issued.calls - calls, issued.retry_seconds
                one = Drawn(True, LIMIT, calls, ahead, retry, ends)
                self._resume(waiting, [one], done, failed)

        def reach() -> None:
            database = self._database = self._world.session(self._database)
            issued = database.draw(LIMITED, LIMIT, want.needed, want.ahead, self._world.now)
            snapshot = database.snapshot()
            self._world.send(lambda: receive(issued, snapshot))

        self._world.send(reach)

    def _accepts(self, snapshot: Snapshot, began: ReadBegan) -> bool:
        """Return whether a draw counts. One that is ahead of the log does not, for simplicity."""
        state = self._server.state
        leased = self._server.clock() < state.lease_ends
        return leased and began.standing(snapshot, state) is Standing.BELIEVED


def verify_in_client(client: Client) -> None:
    """Spend a call of the client's share, or ask any server."""
    world, shares = client.world, client.subscription.shares
    share, now = client.share, client.clock()
    if now < client.subscription.lease.end:
        if share.spend(now):
            world.accepted("by a client")
            shares.note(share)
            return
        if share.denied_seconds(now):
            world.count("rate limited")
            return

    def answer(retry: float) -> None:
        def deliver() -> None:
            if retry:
                world.count("rate limited")
                share.deny(client.clock() + retry)
            else:
                share.count(1)
                shares.note(share)

        world.send(deliver)

    server = world.pick(world.servers)
    world.send(lambda: server.rates.verify(answer))

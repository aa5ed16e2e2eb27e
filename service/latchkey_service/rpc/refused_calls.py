"""Paces the refusals of calls without an identity, and bounds how many of these calls are open.

A refusal costs as much as a Verify, so refusals go out at a limited rate (`RejectionPacer`). Until
then, the call stays open, and takes about 16 kB, most of it in `grpcio`. So only a limited number
may wait in a worker, and fewer from each address. A call above either limit ends its connection,
with all calls on it. Refusing the call at once instead would let its client make the next one at
once, and use up the processor. Calls are refused at once only where the connection cannot be ended,
such as behind a proxy, which must limit its clients itself.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from latchkey_service.access.origin import source_of
from latchkey_service.rpc.admission import RejectionPacer

__all__ = [
    "ENDING_MAX",
    "OPEN_MAX",
    "OPEN_PER_ADDRESS_MAX",
    "PER_SECOND",
    "SECONDS_MAX",
    "RefusedCalls",
]

# grpcio needs 0.1 ms for each, so this takes about 2 % of a core. Until its answer, a call takes
# one of its connection's places, so a flood with as many connections as one address may have cannot
# make much more than a thousand calls in a second.
PER_SECOND: Final = 200
SECONDS_MAX: Final = 30.0
# About 500 MB, a sixth of the default limit of a worker.
OPEN_MAX: Final = 30_000
# As many as 100 connections may have open.
OPEN_PER_ADDRESS_MAX: Final = 10_000
# Until the connections above a limit have ended, which may take a second if there are thousands, or
# longer if one cannot be found.
ENDING_MAX: Final = 2 * OPEN_MAX


def _cannot_end(_peer: str) -> bool:
    return False


class RefusedCalls:
    """The calls of a worker that will be refused. Event loop only."""

    def __init__(
        self,
        monotonic: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._monotonic = monotonic
        self._sleep = sleep
        self._pacer = RejectionPacer(PER_SECOND, SECONDS_MAX)
        self.open = 0
        """How many calls wait for their refusal."""
        self._open_of: Counter[str] = Counter()
        self.end_connection: Callable[[str], bool] = _cannot_end
        """Ends the connection of a peer, as gRPC reports it, and returns whether that is possible.
        Set by the owner of the listeners."""
        self.excess = 0
        """The calls that came while too many others were open."""

    def delay_seconds(self) -> float:
        """Return the delay before a call is refused, and count it.

        Ignores the deadline: short deadlines must not make a flood of calls faster.
        """
        return self._pacer.delay_seconds(self._monotonic())

    async def wait(self, peer: str) -> None:
        """Wait until a call of `peer` may be refused. `peer` is as gRPC reports it."""
        if delay_seconds := self.delay_seconds():
            await self.hold(peer, delay_seconds)

    async def hold(self, peer: str, delay_seconds: float) -> None:
        """Keep a call of `peer` open until it is refused, unless too many others are open."""
        address = source_of(peer, None, proxied=False)
        if self.open >= OPEN_MAX or (address and self._open_of[address] >= OPEN_PER_ADDRESS_MAX):
            self.excess += 1
            if not self.end_connection(peer) or self.open >= ENDING_MAX:
                return
        self.open += 1
        self._open_of[address] += 1
        try:
            await self._sleep(delay_seconds)
        finally:
            self.open -= 1
            self._open_of[address] -= 1
            if not self._open_of[address]:
                del self._open_of[address]

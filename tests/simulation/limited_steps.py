"""The steps of a simulated world that has a token with a rate limit."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from tests.simulation.processes import Client, Server
from tests.simulation.rates import verify_in_client

__all__ = ["LIMITED_KINDS", "LimitedSteps"]

# As often as a client may ask for calls.
ROUND_SECONDS = 0.25


class LimitedSteps:
    """The part of `World` that uses the token."""

    random: Random
    now: float
    servers: list[Server]
    clients: list[Client]
    everything_arrives: Callable[[], None]
    reads_arrive: Callable[[], None]
    pick: Callable[[Any], Any]

    def a_few_calls(self) -> None:
        """One verifier needs fewer calls than the bucket issues, and so draws ahead of demand."""
        one = self.pick([*self.clients, *self.servers])
        for _ in range(self.random.randint(2, 3)):
            self.now += ROUND_SECONDS
            self._verify(one, self.random.randint(6, 9))
            self.reads_arrive()
            if isinstance(one, Client):
                self._draw(one)

    def many_calls(self) -> None:
        """All spend what they have drawn, and exhaust the bucket."""
        self._all_verify(40)

    def a_busy_time(self) -> None:
        """All need more calls than there are, for a few seconds. Leases are renewed meanwhile."""
        for number in range(self.random.randint(4, 24)):
            self.now += ROUND_SECONDS
            if number % 3 == 0:
                self.everything_arrives()
            self._all_verify(6)

    def a_call(self) -> None:
        """One verifier needs a call, in the middle of anything."""
        self._verify(self.pick([*self.clients, *self.servers]), 1)

    def a_client_draws(self) -> None:
        self._draw(self.pick(self.clients))

    def a_server_draws_elsewhere(self) -> None:
        self.pick(self.servers).rates.reconnect()

    def a_client_restarts(self) -> None:
        number = self.random.randrange(len(self.clients))
        client = self.clients[number]
        for stream in list(client.streams):
            stream.cut()
        self.clients[number] = Client(client.world)

    def _all_verify(self, times_max: int) -> None:
        everybody: list[Client | Server] = [*self.clients, *self.servers]
        for one in everybody:
            self._verify(one, self.random.randint(0, times_max))
        self.reads_arrive()

    def _verify(self, one: Client | Server, times: int) -> None:
        for _ in range(times):
            if isinstance(one, Client):
                verify_in_client(one)
            else:
                one.rates.verify(lambda _: None)

    def _draw(self, client: Client) -> None:
        """Let a client's question arrive, if it has one, and then the answer."""
        for stream in [one for one in client.streams if not one.stuck]:
            stream.client_sends()
            while stream.up:
                stream.server_receives()
            self.reads_arrive()
            stream.server_sends()
            while stream.down:
                stream.client_receives()


LIMITED_KINDS = [
    *(["a_few_calls"] * 40),
    *(["many_calls"] * 2),
    *(["a_busy_time"] * 4),
    *(["a_call", "reads_arrive", "a_client_draws"] * 6),
    "a_server_draws_elsewhere",
    "a_client_restarts",
]

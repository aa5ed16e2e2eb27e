"""A simulated system in which the shipped classes make all decisions, and everything else fails.

Several server processes and clients. Time passes at any moment. Clocks have arbitrary offsets and
run at different rates. Answers of the database arrive late or never. Messages on streams wait, or
are lost with their stream. Processes pause, die, or shut down. The database fails over:
histories fork, sessions stay with the deposed primary, and a pooler sends each statement to any
server. It is restored from a backup.

This tests that the shipped classes of both sides together keep the promise, in unforeseen orders of
events.

`World.step` takes one step of a kind by name. `stale` must stay empty: it collects each VALID of a
verify that began after a Delete of its token had answered. So must `excess`: it collects each VALID
of a token with a rate limit that the bound of rule 13 does not permit.
"""

import itertools
import math
from collections.abc import Callable
from random import Random
from typing import Any

from latchkey_coherence.verdict_cache import Position, VerdictCache
from latchkey_service.coherence.ack_rules import (
    Acknowledgements,
    PendingDeletion,
)

from tests.simulation.database import LEASE_SECONDS, Database
from tests.simulation.limited_steps import LIMITED_KINDS, LimitedSteps
from tests.simulation.processes import Client, Clock, Server, Stream
from tests.simulation.rates import LIMIT, Meter

__all__ = ["KINDS", "World"]

SERVERS, CLIENTS, TOKENS = 2, 2, 2
# Enough that together they can draw more calls ahead of demand than a bucket issues in a second.
LIMITED_CLIENTS = 8
STEPS_SECONDS = (0.001, 0.01, 0.1, 0.3, 0.5, 1.0, 2.0, 2.99, 3.1)


class World(LimitedSteps):
    """The whole system. Its course depends only on the seed of `random` and the steps taken.
    Without `timelines`, the engine does not report them, so only marks distinguish histories.
    With `limited`, a token with a rate limit is used as well.
    """

    server_cache: type[VerdictCache[Any]] = VerdictCache
    client_cache: type[VerdictCache[Any]] = VerdictCache

    def __init__(
        self, random: Random, *, timelines: bool | None = None, limited: bool = False
    ) -> None:
        self.random = random
        self.kinds = [
            *EVERYDAY,
            *itertools.chain.from_iterable(f for f in FAULTS if random.random() < 0.4),
        ]
        """The kinds of steps that occur in this world."""
        if limited:
            self.kinds += LIMITED_KINDS
        self.has_stragglers = "a_straggler_arrives" in self.kinds
        self.now = 0.0
        self.steps = 0
        self.stale: list[str] = []
        self.excess: list[str] = []
        self.meter = Meter(LIMIT)
        self.counts: dict[str, int] = {}
        self.timelines = random.random() < 0.3 if timelines is None else timelines
        # Behind a pooler each statement may reach another server.
        self.pooler = random.random() < 0.3
        self.timeline_numbers = itertools.count(1)
        # The primary, and a deposed one that still runs.
        self.databases = [Database(random, self._new_timeline())]
        self.backup = self.current.copy(None)
        self.names = (f"v{n}" for n in itertools.count())
        self.servers = [Server(self, next(self.names)) for _ in range(SERVERS)]
        clients = LIMITED_CLIENTS if limited else CLIENTS
        self.clients = [Client(self) for _ in range(clients)]
        self.token_numbers = itertools.count()
        self.tokens = [self._new_token() for _ in range(TOKENS)]
        self.under_way: list[Callable[[], None]] = []
        # Messages with a long delay.
        self.stragglers: list[Callable[[], None]] = []
        self.waits: list[tuple[str, PendingDeletion, Clock]] = []
        self.confirmed: dict[str, int] = {}

    @property
    def current(self) -> Database:
        """The primary, whose commits are durable unless replication is stalled."""
        return self.databases[0]

    def reached(self) -> Database:
        """Return the database that a new session reaches."""
        return self.current if self.random.random() < 0.8 else self.pick(self.databases)

    def session(self, database: Database) -> Database:
        """Return the database that the next statement of a session reaches."""
        if self.pooler or database not in self.databases:
            return self.reached()
        return database

    def step(self, kind: str) -> None:
        """Take one step."""
        self.steps += 1
        getattr(self, kind)()

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def pick(self, things: Any) -> Any:
        return self.random.choice(things)

    def answered(self, token_id: str, started: int, *, valid: bool) -> None:
        self.count("valid" if valid else "deleted")
        if valid and self.confirmed.get(token_id, math.inf) < started:
            self.stale.append(f"{token_id}, by a verify begun at step {started}")

    def accepted(self, who: str) -> None:
        """Count a VALID of the token with a rate limit."""
        self.count(who)
        if not self.meter.accept(self.now):
            self.excess.append(f"{who}, in step {self.steps}")

    def send(self, message: Callable[[], None]) -> None:
        """Send a message, sometimes with a long delay."""
        straggles = self.has_stragglers and self.random.random() < 0.15
        (self.stragglers if straggles else self.under_way).append(message)

    def maybe_wait(self) -> None:
        if self.random.random() < 0.3:
            self.time_passes()

    # The kinds of steps.

    def time_passes(self) -> None:
        self.now += self.pick(STEPS_SECONDS)

    def everything_arrives(self) -> None:
        """Let every message arrive and every process do its next steps, twice."""
        for _ in range(2):
            for server in self.servers:
                for _ in range(4):
                    server.renew_once()
                    server.receive_reply()
                server.acknowledge()
                server.receive_reply()
            for client in self.clients:
                if all(stream.server.stopping or stream.stuck for stream in client.streams):
                    Stream(client, self.pick(self.servers))
                for stream in [stream for stream in client.streams if not stream.stuck]:
                    stream.client_sends()
                    while stream.up:
                        stream.server_receives()
                    stream.server_sends()
                    while stream.down:
                        stream.client_receives()
                    stream.client_sends()
                    while stream.up:
                        stream.server_receives()
            self.reads_arrive()

    def everybody_verifies(self) -> None:
        """Fill the caches: each client asks about each live token and receives the answer."""
        for client in self.clients:
            for token_id in self.tokens[-TOKENS:]:
                client.verify(token_id)
        self.reads_arrive()

    def servers_work(self) -> None:
        """Let the servers do all their steps, twice, while nothing reaches a client."""
        for _ in range(2):
            for server in self.servers:
                for news in (True, False):
                    server.renew_once(news=news)
                    server.receive_reply()
                for stream in [stream for stream in server.streams if not stream.stuck]:
                    while stream.up:
                        stream.server_receives()
                    stream.server_sends()

    def clients_work(self) -> None:
        """Let the clients receive some of their messages and send their answers."""
        for client in self.clients:
            for stream in [stream for stream in client.streams if not stream.stuck]:
                for _ in range(self.random.randint(0, len(stream.down))):
                    stream.client_receives()
                stream.client_sends()

    def time_passes_without_faults(self) -> None:
        self.now += 0.9
        self.everything_arrives()

    def renew_once(self) -> None:
        self.pick(self.servers).renew_once(news=self.random.random() < 0.5)

    def receive_reply(self) -> None:
        self.pick(self.servers).receive_reply()

    def acknowledge(self) -> None:
        self.pick(self.servers).acknowledge()

    def reply_is_lost(self) -> None:
        self.pick(self.servers).reply = None

    def remove_dead_verifiers(self) -> None:
        self.pick(self.servers).remove_dead_verifiers()

    def watch(self) -> None:
        Stream(self.pick(self.clients), self.pick(self.servers))

    def a_stream_advances(self) -> None:
        streams = [stream for client in self.clients for stream in client.streams]
        if streams:
            stream = self.pick(streams)
            moves = (
                stream.client_sends,
                stream.server_receives,
                stream.server_sends,
                stream.client_receives,
            )
            for _ in range(self.random.randint(1, 4)):
                self.pick(moves)()

    def a_stream_sticks(self) -> None:
        streams = [stream for client in self.clients for stream in client.streams]
        if streams:
            stream = self.pick(streams)
            stream.stuck = not stream.stuck

    def a_straggler_arrives(self) -> None:
        if self.stragglers:
            self.stragglers.pop(self.random.randrange(len(self.stragglers)))()

    def a_stream_breaks(self) -> None:
        streams = [stream for client in self.clients for stream in client.streams]
        if streams:
            self.pick(streams).cut()

    def client_releases(self) -> None:
        self.pick(self.clients).subscription.release()

    def read_arrives(self) -> None:
        while self.under_way and self.random.random() < 0.7:
            self.under_way.pop(self.random.randrange(len(self.under_way)))()

    def server_verifies(self) -> None:
        self._ask(self.pick(self.servers), self.pick(self.tokens))

    def client_verifies(self) -> None:
        self.pick(self.clients).verify(self.pick(self.tokens))

    def delete(self) -> None:
        token_id = self.pick(self.tokens)
        database = self.reached()
        if token_id in database.deleted:
            return
        position = database.delete(token_id)
        if position is None:
            self.count("not durable")
            return
        clock = Clock(self)
        self.waits.append((token_id, PendingDeletion(position, clock()), clock))
        # Deleted tokens are verified for a while, then dropped.
        self.tokens = [*self.tokens[-2 * TOKENS :], self._new_token()]

    def look_at_rows(self) -> None:
        for token_id, wait, clock in list(self.waits):
            database = self.reached()
            now = clock()
            self.maybe_wait()
            if not database.knows(wait.position):
                continue
            acknowledgements = wait.evaluate(list(database.rows.values()), now)
            if isinstance(acknowledgements, Acknowledgements):
                self.waits.remove((token_id, wait, clock))
                self.confirmed[token_id] = self.steps
                self.count("outwaited" if acknowledgements.outwaited else "confirmed")
                self._ask_everybody(token_id)

    def prune(self) -> None:
        self.current.prune()

    # Other histories.

    def replication_stalls(self) -> None:
        self.current.stall()

    def replication_catches_up(self) -> None:
        self.current.catch_up()

    def fail_over(self) -> None:
        """Promote the standby. The old primary keeps running, and sessions stay with it."""
        self.current.depose()
        self.databases = [self.current.copy(self._new_timeline()), self.current]
        # A fuller bucket, and the deposed primary's until leases end.
        self.meter.extra += LIMIT.burst + LIMIT.per_second * LEASE_SECONDS
        self.count("failovers")

    def fail_over_while_stalled(self) -> None:
        """Make unreplicated commits visible on the old primary, then depose it."""
        self.current.stall()
        for token_id in self.random.sample(self.tokens, self.random.randint(0, 2)):
            if token_id not in self.current.deleted:
                self.current.delete(token_id)
        for server in self.servers:
            server.renew_once(news=True)
            server.receive_reply()
        self.fail_over()

    def deposed_primary_ends(self) -> None:
        self.databases = self.databases[:1]

    def back_up(self) -> None:
        self.backup = self.current.copy(None)

    def restore(self) -> None:
        """Restore the backup.

        That takes longer than a lease. The loss of deletions in the restore is not an error of the
        service. Later deletions must not be lost.
        """
        self.now += 1.1 * LEASE_SECONDS
        self.databases = [self.backup.copy(self._new_timeline())]
        deleted = self.current.deleted
        self.confirmed = {t: step for t, step in self.confirmed.items() if t in deleted}
        self.waits = [wait for wait in self.waits if self.current.knows(wait[1].position)]
        self.tokens = [*self.tokens, *(t for t in self.confirmed if t not in self.tokens)][-6:]
        self.meter.extra += LIMIT.burst
        self.count("restored")

    def reconnect(self) -> None:
        self.pick(self.servers).reconnect()

    def die(self) -> None:
        number = self.random.randrange(len(self.servers))
        self.servers[number].die()
        self.servers[number] = Server(self, next(self.names))

    def stop(self) -> None:
        number = self.random.randrange(len(self.servers))
        self.servers[number].stop()
        if not self.servers[number].alive:
            self.count("shut down")
            self.servers[number] = Server(self, next(self.names))

    def reads_arrive(self) -> None:
        """Let every message arrive, including those that are sent in response."""
        while self.under_way:
            self.under_way.pop(0)()

    def _ask_everybody(self, token_id: str) -> None:
        """Verify a token with every process that may still cache it, from the moment at which it
        must be dead.
        """
        self.steps += 1
        for client in self.clients:
            client.verify(token_id)
        for server in self.servers:
            self._ask(server, token_id)

    def _ask(self, server: Server, token_id: str) -> None:
        started = self.steps

        def answer(live: bool, _position: Position) -> None:
            self.answered(token_id, started, valid=live)

        server.verify(token_id, answer)

    def _new_timeline(self) -> str | None:
        return f"{next(self.timeline_numbers):08X}" if self.timelines else None

    def _new_token(self) -> str:
        return f"t{next(self.token_numbers)}"


# Frequent steps occur more often in this list.
EVERYDAY = [
    *(["time_passes_without_faults"] * 4),
    *(["everything_arrives", "everybody_verifies"] * 8),
    *(["server_verifies", "client_verifies"] * 6),
    *(["servers_work", "clients_work"] * 8),
    *(["delete", "look_at_rows", "a_stream_advances", "read_arrives"] * 8),
    *(["time_passes", "renew_once", "receive_reply", "acknowledge"] * 3),
]
# Each world has some of these faults. With all of them at once, few sequences would complete.
FAULTS = (
    ["time_passes"] * 4,
    ["reply_is_lost"] * 2,
    ["remove_dead_verifiers"] * 2,
    ["watch", "a_stream_advances", "a_stream_advances"] * 3,
    ["a_stream_breaks"] * 3,
    ["a_straggler_arrives"] * 10,
    ["a_stream_sticks"] * 4,
    ["prune"] * 2,
    ["client_releases"],
    ["die"],
    ["stop"],
    ["fail_over", "reconnect"],
    ["fail_over_while_stalled", "reconnect", "reconnect"],
    ["replication_stalls", "replication_catches_up", "replication_catches_up"],
    ["deposed_primary_ends"],
    ["back_up", "restore"],
)
KINDS = [*EVERYDAY, *itertools.chain.from_iterable(FAULTS)]

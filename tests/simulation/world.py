"""A world in which the shipped classes make all decisions, and everything else goes wrong.

Several server processes and clients. Time passes at any moment, clocks start anywhere and run at
different rates. Answers of the database arrive late or never. Messages on streams wait, or are lost
with their stream. Processes pause, die, or stop in good order. The database fails over: histories
fork, sessions stay with the deposed primary, and a pooler sends each statement to any server. It is
restored from a backup. One step here is what the service's loops do between two awaits
(`lease_renewer.py`, `watch_sessions.py`, `verifier.py`).

`World.step` takes one step of a kind by name. `stale` must stay empty: it collects each VALID of a
verify that began after a Delete of its token had answered.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

from latchkey import _subscription as client_side
from latchkey._subscription import Subscription
from latchkey_coherence.lease import DRIFT_MAX
from latchkey_coherence.memory import Entry, Memory, Position
from latchkey_service.coherence import watch_events, watch_sessions
from latchkey_service.coherence.ack_rules import (
    Acknowledgements,
    DeadVerifierDetector,
    PendingDeletion,
)
from latchkey_service.coherence.client_leases import ClientLeases
from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.coherence.verifier_state import Log, ReadBegan, Standing, VerifierState
from latchkey_service.coherence.watch_sessions import WatchSession

from tests.simulation.database import LEASE_SECONDS, Database

__all__ = ["KINDS", "World"]

SERVERS, CLIENTS, TOKENS = 2, 2, 2
ENTRIES_MAX = 8
# Two rates differ by a thousandth at most: each by half of it from the true rate.
RATES = (1 - DRIFT_MAX / 2.01, 1.0, 1 + DRIFT_MAX / 2.01)
STEPS_SECONDS = (0.001, 0.01, 0.1, 0.3, 0.5, 1.0, 2.0, 2.99, 3.1)


class Known(Entry):
    """A cached token: whether it was live when it was read."""

    __slots__ = ("live",)

    def __init__(self, token_id: str, *, live: bool) -> None:
        super().__init__(token_id, math.inf)
        self.live = live


class Clock:
    """A process's own clock. `world.now` is the true time."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._rate = world.random.choice(RATES)
        self._offset = world.random.choice((0.0, 1e6, -1e6))

    def __call__(self) -> float:
        return self._offset + self._rate * self._world.now


class Server:
    """A server process: the steps of its lease renewer, and verifies."""

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name = world, name
        self.clock = Clock(world)
        self.state: VerifierState[Known] = VerifierState(
            world.server_memory(ENTRIES_MAX), ClientLeases(), LEASE_SECONDS
        )
        self.detector = DeadVerifierDetector()
        self.incarnation = 0
        self.alive, self.stopping = True, False
        # The databases that its sessions lead to: the renewer's session, and that of look-ups.
        self.renewal_database = self.lookup_database = world.current
        # What the database has answered and the process has not received: one answer at a time.
        self.reply: Callable[[], None] | None = None
        self.streams: list[Stream] = []

    def reconnect(self) -> None:
        """Open new sessions. They may lead to a deposed primary."""
        self.renewal_database, self.lookup_database = self.world.reached(), self.world.reached()

    def renew_once(self, *, news: bool = False) -> None:
        """Send the next statement of the renewer: register, read the log, or renew."""
        state = self.state
        if self.reply is not None:
            return
        database = self.renewal_database = self.world.session(self.renewal_database)
        if not state.registered:
            self.incarnation += 1
            clear = state.client_leases.floor(self.clock()) is None
            registration = database.register(self.name, self.incarnation, acknowledge=clear)
            if registration is None:
                self.renewal_database = self.world.reached()
            else:
                self.reply = lambda: state.register(*registration, self.clock())
            return
        began = self.clock()
        if news:
            log = database.read_log(state.memory.position)
            # As in the service, only a renewal may move the lease to another server.
            if not log.known or log.server == state.server:
                self.reply = lambda: self._apply(log, began)
                return
        acknowledged = state.acknowledgeable(began)
        renewal = database.renew(self.name, self.incarnation, state.memory.position, acknowledged)
        if renewal is None:
            self.renewal_database = self.world.reached()
        else:
            self.reply = lambda: self._renewed(*renewal, began, acknowledged)

    def _apply(self, log: Log, began: float) -> None:
        self.state.apply(log, began)
        if not log.known:
            self.world.count("lost its history")

    def _renewed(self, renewed: bool, log: Log, began: float, acknowledged: int) -> None:
        self._apply(log, began)
        if renewed:
            self.state.renew(began, acknowledged)
        elif log.known:
            self.state.lose()

    def receive_reply(self) -> None:
        """Receive the database's answer."""
        reply, self.reply = self.reply, None
        if reply is not None:
            reply()

    def acknowledge(self) -> None:
        """Acknowledge before the renewal is due, if a client has confirmed."""
        state = self.state
        now = self.clock()
        if state.registered and state.acknowledgeable(now) > state.acknowledged:
            self.renew_once()

    def remove_dead_verifiers(self) -> None:
        """Remove the rows of dead processes."""
        asked = self.clock()
        rows = list(self.renewal_database.rows.values())
        self.world.maybe_wait()
        for dead in self.detector.dead(rows, asked, self.clock()):
            self.world.maybe_wait()
            self.renewal_database.remove_dead(dead)

    def verify(self, token_id: str, answer: Callable[[bool, Position], None]) -> None:
        """Answer from the cache, or send a read and answer when it arrives."""
        state = self.state
        known = state.memory.entries.get(token_id.encode())
        if self.clock() >= state.lease_ends:
            return
        if known is not None:
            answer(known.live, state.memory.position)
            return
        began = state.begin_read()
        database = self.lookup_database = self.world.session(self.lookup_database)
        live, snapshot = token_id not in database.deleted, database.snapshot()

        def arrive() -> None:
            self._arrived(Known(token_id, live=live), snapshot, began, answer)

        self.world.send(arrive)

    def _arrived(
        self,
        known: Known,
        snapshot: Snapshot,
        began: ReadBegan,
        answer: Callable[[bool, Position], None],
        *,
        again: bool = True,
    ) -> None:
        if not self.alive:
            return
        standing = self.state.standing(snapshot, began)
        if standing is Standing.AHEAD and again:
            # The read waits for the log, which is read on the renewer's session.
            self.world.count("ahead")
            self.world.under_way.append(
                lambda: self._arrived(known, snapshot, began, answer, again=False)
            )
        elif standing is Standing.BELIEVED:
            self.state.memory.admit(known.token_id.encode(), known, snapshot.position)
            answer(known.live, snapshot.position)
        else:
            self.world.count("refused")
            self.lookup_database = self.world.reached()

    def stop(self) -> None:
        """Stop in good order: ask clients to move, and leave once no client holds a lease."""
        self.stopping = True
        for stream in self.streams:
            stream.session.close()
        if self.state.client_leases.floor(self.clock()) is None:
            self.state.lose()
            self.renewal_database.remove(self.name)
            self.die()

    def die(self) -> None:
        self.alive = False
        for stream in list(self.streams):
            stream.cut()


class Stream:
    """A Watch: a session, a client's stream, and the messages between them."""

    def __init__(self, client: "Client", server: Server) -> None:
        self.client, self.server = client, server
        self.session = WatchSession(server.state)
        self.end = client.subscription.open(client.clock())
        self.up: deque[Any] = deque()
        self.down: deque[Any] = deque()
        # True while messages are held up on the way. Another step may end that.
        self.stuck = False
        server.streams.append(self)
        client.streams.append(self)
        if server.stopping:
            self.cut()

    def cut(self) -> None:
        for streams in (self.server.streams, self.client.streams):
            if self in streams:
                streams.remove(self)

    def client_sends(self) -> None:
        if (request := self.end.take(self.client.clock())) is not None:
            self.up.append(request)

    def server_receives(self) -> None:
        if self.up:
            said = self.up.popleft()
            request = watch_sessions.Request(said.applied, said.number, said.released)
            self.session.receive(request, self.server.clock())

    def server_sends(self) -> None:
        self.down.extend(self.session.take(self.server.clock()))

    def client_receives(self) -> None:
        if self.down:
            self.end.receive(_to_client(self.down.popleft()), self.client.clock())


def _to_client(event: watch_sessions.Event) -> client_side.Event:
    match event:
        case watch_sessions.Invalidation():
            return client_side.Invalidation(event.position, tuple(event.token_ids))
        case watch_sessions.Grant():
            return client_side.Grant(event.position, event.number, event.lease_seconds)
        case watch_sessions.Reset():
            return client_side.Reset(event.position)
        case watch_sessions.Closing():
            return client_side.Closing()
        case watch_events.ReportReceived():
            return client_side.UsesReceived(event.report)


class Client:
    """A client library: its cache under the grants of its streams."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.clock = Clock(world)
        memory: Any = world.client_memory(ENTRIES_MAX)
        self.memory: Memory[Known] = memory
        self.subscription = Subscription(memory, world.random.random)
        self.streams: list[Stream] = []

    def verify(self, token_id: str) -> None:
        """Answer from the cache, or ask a server, which need not be the one that the client
        watches."""
        started = self.world.steps
        key = token_id.encode()
        known = self.memory.entries.get(key)
        if known is not None and self.clock() < self.subscription.lease.end:
            self.world.count("from a client's cache")
            self.world.answered(token_id, started, valid=known.live)
            return

        def arrive(live: bool, position: Position) -> None:
            def deliver() -> None:
                if self.clock() < self.subscription.lease.end:
                    self.memory.admit(key, Known(token_id, live=live), position)
                self.world.answered(token_id, started, valid=live)

            self.world.send(deliver)

        self.world.pick(self.world.servers).verify(token_id, arrive)


class World:
    """The whole system. Reproducible from the seed of `random` and the steps taken.

    Without `timelines` the engine does not report them, so only marks tell histories apart.
    """

    server_memory: type[Memory[Any]] = Memory
    client_memory: type[Memory[Any]] = Memory

    def __init__(self, random: Random, *, timelines: bool | None = None) -> None:
        self.random = random
        self.kinds = [
            *EVERYDAY,
            *itertools.chain.from_iterable(f for f in FAULTS if random.random() < 0.4),
        ]
        """The kinds of steps that happen in this world."""
        self.now = 0.0
        self.steps = 0
        self.stale: list[str] = []
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
        self.clients = [Client(self) for _ in range(CLIENTS)]
        self.token_numbers = itertools.count()
        self.tokens = [self._new_token() for _ in range(TOKENS)]
        self.under_way: list[Callable[[], None]] = []
        # Messages that are held up for long.
        self.stragglers: list[Callable[[], None]] = []
        self.waits: list[tuple[str, PendingDeletion, Clock]] = []
        self.confirmed: dict[str, int] = {}

    @property
    def current(self) -> Database:
        """The primary, whose commits are durable unless replication is stalled."""
        return self.databases[0]

    def reached(self) -> Database:
        """Return the database that a new session leads to."""
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

    def send(self, message: Callable[[], None]) -> None:
        """Send a message. Some take long to arrive."""
        straggles = "a_straggler_arrives" in self.kinds and self.random.random() < 0.15
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
        """Let the clients receive some of their messages and send what they have to."""
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
        # Deleted tokens are asked about for a while, then dropped.
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

        That takes longer than a lease. It loses deletions, which is no fault of the service. It
        must not lose later ones.
        """
        self.now += 1.1 * LEASE_SECONDS
        self.databases = [self.backup.copy(self._new_timeline())]
        deleted = self.current.deleted
        self.confirmed = {t: step for t, step in self.confirmed.items() if t in deleted}
        self.waits = [wait for wait in self.waits if self.current.knows(wait[1].position)]
        self.tokens = [*self.tokens, *(t for t in self.confirmed if t not in self.tokens)][-6:]
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
            self.count("stopped in good order")
            self.servers[number] = Server(self, next(self.names))

    def reads_arrive(self) -> None:
        """Let every message arrive, including those that are sent in response."""
        while self.under_way:
            self.under_way.pop(0)()

    def _ask_everybody(self, token_id: str) -> None:
        """Ask every process that may still cache a token, at the moment from which it must be
        dead."""
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
# Each world has some of these faults. A world with all of them would rarely get far with any.
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

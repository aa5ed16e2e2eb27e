"""A world in which the classes that ship do all the deciding, and everything else goes wrong.

Several server processes and clients. Time passes at any moment, clocks start anywhere and run at
different rates, answers of the database arrive late or never, messages on streams wait or are lost
with their stream, processes pause, die, or stop in good order. The database fails over: histories
fork, sessions stay with the deposed primary, and a pooler sends each statement where it likes. It
is restored from a backup. One step here is what the service's loops do between two awaits
(`heart.py`, `watch.py`, `verifier.py`).

`World.step` takes one step of a kind by name; `stale` must stay empty: it has each VALID that began
after a Delete of its token had answered.
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
from latchkey_service.coherence import watch_sessions
from latchkey_service.coherence.ack_rules import Census, Confirmation, Wait
from latchkey_service.coherence.client_leases import SubLeases
from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.coherence.verifier_state import Log, Membership, ReadBegan, Standing
from latchkey_service.coherence.watch_sessions import Watcher

from tests.simulation.database import LEASE_SECONDS, Database

__all__ = ["KINDS", "World"]

SERVERS, CLIENTS, TOKENS = 2, 2, 2
ENTRIES_MAX = 8
# Two differ by a thousandth at most: each by half of it from the true rate.
RATES = (1 - DRIFT_MAX / 2.01, 1.0, 1 + DRIFT_MAX / 2.01)
STEPS_SECONDS = (0.001, 0.01, 0.1, 0.3, 0.5, 1.0, 2.0, 2.99, 3.1)


class Known(Entry):
    """What is remembered of a token: whether it was live when it was read."""

    __slots__ = ("live",)

    def __init__(self, token_id: str, *, live: bool) -> None:
        super().__init__(token_id, math.inf)
        self.live = live


class Clock:
    """A process's own. `world.now` is the true time."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._rate = world.random.choice(RATES)
        self._offset = world.random.choice((0.0, 1e6, -1e6))

    def __call__(self) -> float:
        return self._offset + self._rate * self._world.now


class Server:
    """A process: the heart's beat in its steps, and verifies."""

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name = world, name
        self.clock = Clock(world)
        self.membership: Membership[Known] = Membership(
            world.server_memory(ENTRIES_MAX), SubLeases(), LEASE_SECONDS
        )
        self.census = Census()
        self.incarnation = 0
        self.alive, self.stopping = True, False
        # Where its sessions lead: the heart's, and that of look-ups.
        self.heart = self.lookups = world.current
        # What the database has answered and the process has not heard: one thing at a time.
        self.reply: Callable[[], None] | None = None
        self.streams: list[Stream] = []

    def reconnect(self) -> None:
        """Open new sessions. They may lead to a deposed primary."""
        self.heart, self.lookups = self.world.reached(), self.world.reached()

    def beat(self, *, news: bool = False) -> None:
        """Send the next statement of the beat: register, read the log, or renew."""
        membership = self.membership
        if self.reply is not None:
            return
        database = self.heart = self.world.session(self.heart)
        if not membership.registered:
            self.incarnation += 1
            clear = membership.subleases.floor(self.clock()) is None
            told = database.register(self.name, self.incarnation, acknowledge=clear)
            if told is None:
                self.heart = self.world.reached()
            else:
                self.reply = lambda: membership.register(*told, self.clock())
            return
        began = self.clock()
        if news:
            log = database.read_log(membership.memory.position)
            # As the heart does: only a renewal may bring the lease to another server.
            if not log.known or log.server == membership.server:
                self.reply = lambda: self._apply(log, began)
                return
        acknowledged = membership.acknowledgeable(began)
        renewal = database.renew(
            self.name, self.incarnation, membership.memory.position, acknowledged
        )
        if renewal is None:
            self.heart = self.world.reached()
        else:
            self.reply = lambda: self._renewed(*renewal, began, acknowledged)

    def _apply(self, log: Log, began: float) -> None:
        self.membership.apply(log, began)
        if not log.known:
            self.world.count("lost its history")

    def _renewed(self, renewed: bool, log: Log, began: float, acknowledged: int) -> None:
        self._apply(log, began)
        if renewed:
            self.membership.renew(began, acknowledged)
        elif log.known:
            self.membership.lose()

    def hear(self) -> None:
        """Hear what the database answered."""
        reply, self.reply = self.reply, None
        if reply is not None:
            reply()

    def acknowledge(self) -> None:
        """Acknowledge before the renewal is due, when a client has confirmed."""
        membership = self.membership
        now = self.clock()
        if membership.registered and membership.acknowledgeable(now) > membership.acknowledged:
            self.beat()

    def bury(self) -> None:
        """Remove the rows of dead processes."""
        asked = self.clock()
        rows = list(self.heart.rows.values())
        self.world.maybe_wait()
        for dead in self.census.dead(rows, asked, self.clock()):
            self.world.maybe_wait()
            self.heart.remove_dead(dead)

    def verify(self, token_id: str, answer: Callable[[bool, Position], None]) -> None:
        """Answer from memory, or read, and answer when the read has arrived."""
        membership = self.membership
        known = membership.memory.entries.get(token_id.encode())
        if self.clock() >= membership.lease_ends:
            return
        if known is not None:
            answer(known.live, membership.memory.position)
            return
        began = membership.begin_read()
        database = self.lookups = self.world.session(self.lookups)
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
        standing = self.membership.standing(snapshot, began)
        if standing is Standing.AHEAD and again:
            # It waits for the log, which is read on the heart's session.
            self.world.count("ahead")
            self.world.under_way.append(
                lambda: self._arrived(known, snapshot, began, answer, again=False)
            )
        elif standing is Standing.BELIEVED:
            self.membership.memory.admit(known.token_id.encode(), known, snapshot.position)
            answer(known.live, snapshot.position)
        else:
            self.world.count("refused")
            self.lookups = self.world.reached()

    def stop(self) -> None:
        """Stop in good order: hand clients over, and leave once none holds a lease."""
        self.stopping = True
        for stream in self.streams:
            stream.watcher.close()
        if self.membership.subleases.floor(self.clock()) is None:
            self.membership.lose()
            self.heart.remove(self.name)
            self.die()

    def die(self) -> None:
        self.alive = False
        for stream in list(self.streams):
            stream.cut()


class Stream:
    """A Watch: a watcher, a client's stream, and what is on the way between them."""

    def __init__(self, client: "Client", server: Server) -> None:
        self.client, self.server = client, server
        self.watcher = Watcher(server.membership)
        self.end = client.subscription.open(client.clock())
        self.up: deque[Any] = deque()
        self.down: deque[Any] = deque()
        # Held up on the way, for as long as a step does not say otherwise.
        self.stuck = False
        server.streams.append(self)
        client.streams.append(self)
        if server.stopping:
            self.cut()

    def cut(self) -> None:
        for streams in (self.server.streams, self.client.streams):
            if self in streams:
                streams.remove(self)

    def client_speaks(self) -> None:
        if (request := self.end.take(self.client.clock())) is not None:
            self.up.append(request)

    def server_hears(self) -> None:
        if self.up:
            said = self.up.popleft()
            request = watch_sessions.Request(said.applied, said.number, said.released)
            self.watcher.hear(request, self.server.clock())

    def server_speaks(self) -> None:
        self.down.extend(self.watcher.take(self.server.clock()))

    def client_hears(self) -> None:
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


class Client:
    """A client library: its memory under the grants of its streams."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.clock = Clock(world)
        memory: Any = world.client_memory(ENTRIES_MAX)
        self.memory: Memory[Known] = memory
        self.subscription = Subscription(memory, world.random.random)
        self.streams: list[Stream] = []

    def verify(self, token_id: str) -> None:
        """Answer from memory, or ask a server, which need not be the one that is watched."""
        started = self.world.steps
        key = token_id.encode()
        known = self.memory.entries.get(key)
        if known is not None and self.clock() < self.subscription.lease.end:
            self.world.count("from a client's memory")
            self.world.answered(token_id, started, valid=known.live)
            return

        def arrive(live: bool, position: Position) -> None:
            def come() -> None:
                if self.clock() < self.subscription.lease.end:
                    self.memory.admit(key, Known(token_id, live=live), position)
                self.world.answered(token_id, started, valid=live)

            self.world.send(come)

        self.world.pick(self.world.servers).verify(token_id, arrive)


class World:
    """All of it. Reproducible by the seed of `random`, and by the steps taken.

    Without `timelines` the engine does not report them, so that marks alone tell histories apart.
    """

    server_memory: type[Memory[Any]] = Memory
    client_memory: type[Memory[Any]] = Memory

    def __init__(self, random: Random, *, timelines: bool | None = None) -> None:
        self.random = random
        self.kinds = [
            *EVERYDAY,
            *itertools.chain.from_iterable(f for f in FAULTS if random.random() < 0.4),
        ]
        """What happens in this world."""
        self.now = 0.0
        self.steps = 0
        self.stale: list[str] = []
        self.counts: dict[str, int] = {}
        self.timelines = random.random() < 0.3 if timelines is None else timelines
        # Behind a pooler each statement may reach another server.
        self.pooler = random.random() < 0.3
        self.timeline_numbers = itertools.count(1)
        # The primary, and one that was deposed and still runs.
        self.databases = [Database(random, self._new_timeline())]
        self.backup = self.current.copy(None)
        self.names = (f"v{n}" for n in itertools.count())
        self.servers = [Server(self, next(self.names)) for _ in range(SERVERS)]
        self.clients = [Client(self) for _ in range(CLIENTS)]
        self.token_numbers = itertools.count()
        self.tokens = [self._new_token() for _ in range(TOKENS)]
        self.under_way: list[Callable[[], None]] = []
        # The same, but held up for long.
        self.stragglers: list[Callable[[], None]] = []
        self.waits: list[tuple[str, Wait, Clock]] = []
        self.confirmed: dict[str, int] = {}

    @property
    def current(self) -> Database:
        """The one whose commits are durable, unless replication is stalled."""
        return self.databases[0]

    def reached(self) -> Database:
        """Return where a new session leads."""
        return self.current if self.random.random() < 0.8 else self.pick(self.databases)

    def session(self, database: Database) -> Database:
        """Return where the next statement of a session leads."""
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
        """Put something on its way. Some messages take long."""
        straggles = "a_straggler_arrives" in self.kinds and self.random.random() < 0.15
        (self.stragglers if straggles else self.under_way).append(message)

    def maybe_wait(self) -> None:
        if self.random.random() < 0.3:
            self.time_passes()

    # The kinds of steps.

    def time_passes(self) -> None:
        self.now += self.pick(STEPS_SECONDS)

    def all_is_well(self) -> None:
        """Everything that is under way arrives, and everybody does what is next, twice."""
        for _ in range(2):
            for server in self.servers:
                for _ in range(4):
                    server.beat()
                    server.hear()
                server.acknowledge()
                server.hear()
            for client in self.clients:
                if all(stream.server.stopping or stream.stuck for stream in client.streams):
                    Stream(client, self.pick(self.servers))
                for stream in [stream for stream in client.streams if not stream.stuck]:
                    stream.client_speaks()
                    while stream.up:
                        stream.server_hears()
                    stream.server_speaks()
                    while stream.down:
                        stream.client_hears()
                    stream.client_speaks()
                    while stream.up:
                        stream.server_hears()
            self.reads_arrive()

    def everybody_verifies(self) -> None:
        """Fill the memories: each client asks about each live token, and hears the answer."""
        for client in self.clients:
            for token_id in self.tokens[-TOKENS:]:
                client.verify(token_id)
        self.reads_arrive()

    def servers_are_well(self) -> None:
        """The servers do all that is theirs to do, twice, while nothing reaches a client."""
        for _ in range(2):
            for server in self.servers:
                for news in (True, False):
                    server.beat(news=news)
                    server.hear()
                for stream in [stream for stream in server.streams if not stream.stuck]:
                    while stream.up:
                        stream.server_hears()
                    stream.server_speaks()

    def clients_are_well(self) -> None:
        """The clients hear some of what is on its way to them, and say what they have to."""
        for client in self.clients:
            for stream in [stream for stream in client.streams if not stream.stuck]:
                for _ in range(self.random.randint(0, len(stream.down))):
                    stream.client_hears()
                stream.client_speaks()

    def time_passes_well(self) -> None:
        self.now += 0.9
        self.all_is_well()

    def beat(self) -> None:
        self.pick(self.servers).beat(news=self.random.random() < 0.5)

    def hear(self) -> None:
        self.pick(self.servers).hear()

    def acknowledge(self) -> None:
        self.pick(self.servers).acknowledge()

    def reply_is_lost(self) -> None:
        self.pick(self.servers).reply = None

    def bury(self) -> None:
        self.pick(self.servers).bury()

    def watch(self) -> None:
        Stream(self.pick(self.clients), self.pick(self.servers))

    def a_stream_moves(self) -> None:
        streams = [stream for client in self.clients for stream in client.streams]
        if streams:
            stream = self.pick(streams)
            moves = (
                stream.client_speaks,
                stream.server_hears,
                stream.server_speaks,
                stream.client_hears,
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

    def client_lets_go(self) -> None:
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
        self.waits.append((token_id, Wait(position, clock()), clock))
        # Looked at again for a while, and then no more.
        self.tokens = [*self.tokens[-2 * TOKENS :], self._new_token()]

    def look_at_rows(self) -> None:
        for token_id, wait, clock in list(self.waits):
            database = self.reached()
            now = clock()
            self.maybe_wait()
            if not database.knows(wait.position):
                continue
            confirmation = wait.judge(list(database.rows.values()), now)
            if isinstance(confirmation, Confirmation):
                self.waits.remove((token_id, wait, clock))
                self.confirmed[token_id] = self.steps
                self.count("outwaited" if confirmation.outwaited else "confirmed")
                self._ask_everybody(token_id)

    def prune(self) -> None:
        self.current.prune()

    # Other histories.

    def replication_stalls(self) -> None:
        self.current.stall()

    def replication_catches_up(self) -> None:
        self.current.catch_up()

    def fail_over(self) -> None:
        """Promote the standby. The old primary goes on running, and sessions stay with it."""
        self.current.depose()
        self.databases = [self.current.copy(self._new_timeline()), self.current]
        self.count("failovers")

    def fail_over_from_a_stalled_one(self) -> None:
        """Commits that no standby has become visible on the old primary, then it is deposed."""
        self.current.stall()
        for token_id in self.random.sample(self.tokens, self.random.randint(0, 2)):
            if token_id not in self.current.deleted:
                self.current.delete(token_id)
        for server in self.servers:
            server.beat(news=True)
            server.hear()
        self.fail_over()

    def deposed_one_ends(self) -> None:
        self.databases = self.databases[:1]

    def back_up(self) -> None:
        self.backup = self.current.copy(None)

    def restore(self) -> None:
        """Go back to the backup. That takes longer than a lease, and loses deletions, which nobody
        can hold against the service; the next ones it must not lose."""
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
        """Let everything that is under way arrive, also what that sends on its way."""
        while self.under_way:
            self.under_way.pop(0)()

    def _ask_everybody(self, token_id: str) -> None:
        """Ask those who would still know of a token, in the moment in which it must be dead."""
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


# What happens more often stands here more often.
EVERYDAY = [
    *(["time_passes_well"] * 4),
    *(["all_is_well", "everybody_verifies"] * 8),
    *(["server_verifies", "client_verifies"] * 6),
    *(["servers_are_well", "clients_are_well"] * 8),
    *(["delete", "look_at_rows", "a_stream_moves", "read_arrives"] * 8),
    *(["time_passes", "beat", "hear", "acknowledge"] * 3),
]
# Each world has some of these. One with all of them would seldom get far with any.
FAULTS = (
    ["time_passes"] * 4,
    ["reply_is_lost"] * 2,
    ["bury"] * 2,
    ["watch", "a_stream_moves", "a_stream_moves"] * 3,
    ["a_stream_breaks"] * 3,
    ["a_straggler_arrives"] * 10,
    ["a_stream_sticks"] * 4,
    ["prune"] * 2,
    ["client_lets_go"],
    ["die"],
    ["stop"],
    ["fail_over", "reconnect"],
    ["fail_over_from_a_stalled_one", "reconnect", "reconnect"],
    ["replication_stalls", "replication_catches_up", "replication_catches_up"],
    ["deposed_one_ends"],
    ["back_up", "restore"],
)
KINDS = [*EVERYDAY, *itertools.chain.from_iterable(FAULTS)]

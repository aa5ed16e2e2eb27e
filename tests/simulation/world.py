"""A world in which the classes that ship do all the deciding, and everything else goes wrong.

Several server processes and clients on one database. Time passes at any moment, clocks start
anywhere and run at different rates, answers of the database arrive late or never, messages on
streams wait or are lost with their stream, processes stand still, die, or stop in good order. What
the service's loops do between two awaits (`heart.py`, `watch.py`, `verifier.py`) is one step here.

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
from latchkey_coherence.memory import Entry, Memory
from latchkey_service.coherence import watch as server_side
from latchkey_service.coherence.confirmation import Census, Confirmation, VerifierRow, Wait
from latchkey_service.coherence.membership import Log, Membership
from latchkey_service.coherence.subleases import SubLeases
from latchkey_service.coherence.watch import Watcher

__all__ = ["KINDS", "World"]

LEASE_SECONDS = 3.0
SERVERS, CLIENTS, TOKENS = 2, 2, 2
ENTRIES_MAX = 8
# Two differ by a thousandth at most: each by half of it from the true rate.
RATES = (1 - DRIFT_MAX / 2.01, 1.0, 1 + DRIFT_MAX / 2.01)
STEPS_SECONDS = (0.001, 0.01, 0.1, 0.3, 0.5, 1.0, 2.0, 2.99, 3.1)


class Known(Entry):
    """What is remembered of a token: whether it was live when it was read."""

    __slots__ = ("live",)

    def __init__(self, token_id: str, *, live: bool) -> None:
        super().__init__(token_id)
        self.live = live


class Database:
    """The tables that matter, with each statement as one step, as Postgres has it."""

    def __init__(self) -> None:
        self.head = self.pruned = 0
        self.log: list[tuple[int, str]] = []
        self.deleted: set[str] = set()
        self.rows: dict[str, VerifierRow] = {}

    def delete(self, token_id: str) -> int:
        self.head += 1
        self.log.append((self.head, token_id))
        self.deleted.add(token_id)
        return self.head

    def register(self, name: str, incarnation: int, confirmed: int | None) -> tuple[int, int]:
        renewal = self.rows[name].renewal + 1 if name in self.rows else 0
        acknowledged = self.head if confirmed is None else min(self.head, confirmed)
        self.rows[name] = VerifierRow(name, incarnation, renewal, acknowledged, LEASE_SECONDS)
        return self.head, acknowledged

    def read_log(self, applied: int) -> Log:
        named = tuple(token for revision, token in self.log if revision > applied)
        return Log(self.head, named, self.pruned <= applied)

    def renew(self, name: str, incarnation: int, acknowledged: int) -> bool:
        row = self.rows.get(name)
        if row is None or row.incarnation != incarnation:
            return False
        self.rows[name] = row._replace(renewal=row.renewal + 1, acknowledged_revision=acknowledged)
        return True

    def prune(self) -> None:
        bound = min((row.acknowledged_revision for row in self.rows.values()), default=self.head)
        if bound > self.pruned:
            self.pruned = bound
            self.log = [(r, t) for r, t in self.log if r > bound]


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
            Memory(ENTRIES_MAX), SubLeases(), LEASE_SECONDS
        )
        self.census = Census()
        self.incarnation = 0
        self.began = -math.inf
        self.alive, self.stopping = True, False
        # What the database has answered and the process has not heard: one thing at a time.
        self.reply: Callable[[], None] | None = None
        self.streams: list[Stream] = []

    def beat(self) -> None:
        """Send the next statement of the beat."""
        database, membership = self.world.database, self.membership
        if self.reply is not None:
            return
        if not membership.registered:
            self.incarnation += 1
            confirmed = membership.subleases.floor(self.clock())
            told = database.register(self.name, self.incarnation, confirmed)
            self.reply = lambda: membership.register(*told)
            return
        began = self.clock()
        log = database.read_log(membership.memory.applied)
        self.reply = lambda: self._apply(began, log)

    def _apply(self, began: float, log: Log) -> None:
        self.began = began
        self.membership.apply(log)
        acknowledged = self.membership.acknowledgeable(self.clock())
        renewed = self.world.database.renew(self.name, self.incarnation, acknowledged)
        self.reply = lambda: self._renewed(acknowledged, renewed=renewed)

    def _renewed(self, acknowledged: int, *, renewed: bool) -> None:
        if renewed:
            self.membership.renew(self.began, acknowledged)
        else:
            self.membership.lose()

    def hear(self) -> None:
        """Hear what the database answered."""
        reply, self.reply = self.reply, None
        if reply is not None:
            reply()

    def acknowledge(self) -> None:
        """Acknowledge between two reads of the log, when a client has confirmed."""
        membership = self.membership
        now = self.clock()
        if (
            self.reply is None
            and membership.registered
            and membership.acknowledgeable(now) > membership.acknowledged
        ):
            acknowledged = membership.acknowledgeable(now)
            renewed = self.world.database.renew(self.name, self.incarnation, acknowledged)
            self.reply = lambda: self._renewed(acknowledged, renewed=renewed)

    def bury(self) -> None:
        """Remove the rows of dead processes."""
        asked = self.clock()
        rows = list(self.world.database.rows.values())
        self.world.maybe_wait()
        for dead in self.census.dead(rows, asked, self.clock()):
            self.world.maybe_wait()
            if self.world.database.rows.get(dead.id, dead).renewal == dead.renewal:
                self.world.database.rows.pop(dead.id, None)

    def verify(self, token_id: str, answer: Callable[[bool, int], None]) -> None:
        """Answer from memory, or read, and answer when the read has arrived."""
        membership = self.membership
        known = membership.memory.entries.get(token_id.encode())
        if self.clock() >= membership.lease_ends:
            return
        if known is not None:
            answer(known.live, membership.memory.applied)
            return
        database = self.world.database
        live, revision = token_id not in database.deleted, database.head

        def arrive() -> None:
            if self.alive:
                membership.memory.admit(token_id.encode(), Known(token_id, live=live), revision)
                answer(live, revision)

        self.world.under_way.append(arrive)

    def stop(self) -> None:
        """Stop in good order: hand clients over, and leave once none holds a lease."""
        self.stopping = True
        for stream in self.streams:
            stream.watcher.close()
        if self.membership.subleases.floor(self.clock()) is None:
            self.membership.lose()
            self.world.database.rows.pop(self.name, None)
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
            request = server_side.Request(said.applied_revision, said.number, said.released)
            self.watcher.hear(request, self.server.clock())

    def server_speaks(self) -> None:
        self.down.extend(self.watcher.take(self.server.clock()))

    def client_hears(self) -> None:
        if self.down:
            self.end.receive(_to_client(self.down.popleft()), self.client.clock())


def _to_client(event: server_side.Event) -> client_side.Event:
    match event:
        case server_side.Invalidation():
            return client_side.Invalidation(event.revision, tuple(event.token_ids))
        case server_side.Grant():
            return client_side.Grant(event.revision, event.number, event.lease_seconds)
        case server_side.Reset():
            return client_side.Reset(event.revision)
        case server_side.Closing():
            return client_side.Closing()


class Client:
    """A client library: its memory under the grants of its streams."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.clock = Clock(world)
        memory: Any = Memory(ENTRIES_MAX)
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

        def arrive(live: bool, revision: int) -> None:
            def come() -> None:
                if self.clock() < self.subscription.lease.end:
                    self.memory.admit(key, Known(token_id, live=live), revision)
                self.world.answered(token_id, started, valid=live)

            self.world.under_way.append(come)

        self.world.pick(self.world.servers).verify(token_id, arrive)


class World:
    """All of it. Reproducible by the seed of `random`, and by the steps taken."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.now = 0.0
        self.steps = 0
        self.stale: list[str] = []
        self.counts: dict[str, int] = {}
        self.database = Database()
        self.names = (f"v{n}" for n in itertools.count())
        self.servers = [Server(self, next(self.names)) for _ in range(SERVERS)]
        self.clients = [Client(self) for _ in range(CLIENTS)]
        self.token_numbers = itertools.count()
        self.tokens = [self._new_token() for _ in range(TOKENS)]
        self.under_way: list[Callable[[], None]] = []
        self.waits: list[tuple[str, Wait, Clock]] = []
        self.confirmed: dict[str, int] = {}

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
                if all(stream.server.stopping for stream in client.streams):
                    Stream(client, self.pick(self.servers))
                for stream in list(client.streams):
                    stream.client_speaks()
                    while stream.up:
                        stream.server_hears()
                    stream.server_speaks()
                    while stream.down:
                        stream.client_hears()
                    stream.client_speaks()
            self.read_arrives()

    def time_passes_well(self) -> None:
        self.now += 0.9
        self.all_is_well()

    def beat(self) -> None:
        self.pick(self.servers).beat()

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
        if token_id not in self.database.deleted:
            clock = Clock(self)
            self.waits.append((token_id, Wait(self.database.delete(token_id), clock()), clock))
            # Looked at again for a while, and then no more.
            self.tokens = [*self.tokens[-2 * TOKENS :], self._new_token()]

    def look_at_rows(self) -> None:
        for token_id, wait, clock in list(self.waits):
            now = clock()
            self.maybe_wait()
            confirmation = wait.judge(list(self.database.rows.values()), now)
            if isinstance(confirmation, Confirmation):
                self.waits.remove((token_id, wait, clock))
                self.confirmed[token_id] = self.steps
                self.count("outwaited" if confirmation.outwaited else "confirmed")
                self._ask_everybody(token_id)

    def prune(self) -> None:
        self.database.prune()

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

    def _ask_everybody(self, token_id: str) -> None:
        """Ask those who would still know of a token, in the moment in which it must be dead."""
        self.steps += 1
        for client in self.clients:
            client.verify(token_id)
        for server in self.servers:
            self._ask(server, token_id)

    def _ask(self, server: Server, token_id: str) -> None:
        started = self.steps

        def answer(live: bool, _revision: int) -> None:
            self.answered(token_id, started, valid=live)

        server.verify(token_id, answer)

    def _new_token(self) -> str:
        return f"t{next(self.token_numbers)}"


# What happens more often stands here more often.
KINDS = [
    *(["time_passes_well"] * 4),
    *(["all_is_well", "server_verifies", "client_verifies"] * 12),
    *(["delete", "look_at_rows", "a_stream_moves", "read_arrives"] * 8),
    *(["time_passes", "beat", "hear", "acknowledge"] * 5),
    *(["reply_is_lost", "bury", "watch", "a_stream_breaks", "prune"] * 2),
    *("client_lets_go", "die", "stop"),
]

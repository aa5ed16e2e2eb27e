"""The processes of the simulation. The shipped classes make their decisions.

One step does the same as the service's loops between two awaits (`lease_renewer.py`,
`watch_sessions.py`, `verifier.py`)."""

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from latchkey import _subscription as client_side
from latchkey._shares import SharesReceived
from latchkey._subscription import Subscription
from latchkey_coherence.lease import DRIFT_MAX
from latchkey_coherence.verdict_cache import Entry, Position, VerdictCache
from latchkey_service.coherence import watch_events, watch_sessions
from latchkey_service.coherence.ack_rules import (
    DeadVerifierDetector,
)
from latchkey_service.coherence.client_leases import ClientLeases
from latchkey_service.coherence.reads import ReadBegan, Standing
from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.coherence.verifier_state import Log, VerifierState
from latchkey_service.coherence.watch_sessions import WatchSession

from tests.simulation.database import LEASE_SECONDS
from tests.simulation.rates import LIMIT, LIMITED, ServerRates

if TYPE_CHECKING:
    from tests.simulation.world import World

__all__ = ["Client", "Clock", "Server", "Stream"]


ENTRIES_MAX = 8


# Each rate differs from the true rate by half a thousandth at most, so two rates differ by a
# thousandth at most.
RATES = (1 - DRIFT_MAX / 2.01, 1.0, 1 + DRIFT_MAX / 2.01)


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
            world.server_cache(ENTRIES_MAX), ClientLeases(), LEASE_SECONDS
        )
        self.detector = DeadVerifierDetector()
        self.incarnation = 0
        self.alive, self.stopping = True, False
        # The databases of its two sessions: the renewer's, and the one for look-ups.
        self.renewal_database = self.lookup_database = world.current
        # The database's answer that the process has not received yet, at most one.
        self.reply: Callable[[], None] | None = None
        self.streams: list[Stream] = []
        self.rates = ServerRates(self)

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
            log = database.read_log(state.cache.position)
            # As in the service, only a renewal may move the lease to another server.
            if not log.known or log.server == state.server:
                self.reply = lambda: self._apply(log, began)
                return
        acknowledged = state.acknowledgeable(began)
        renewal = database.renew(self.name, self.incarnation, state.cache.position, acknowledged)
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
        """If a client has confirmed, acknowledge before the renewal is due."""
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
        known = state.cache.entries.get(token_id.encode())
        if self.clock() >= state.lease_ends:
            return
        if known is not None:
            answer(known.live, state.cache.position)
            return
        began = ReadBegan.now(state)
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
        standing = began.standing(snapshot, self.state)
        if standing is Standing.AHEAD and again:
            # The look-up waits for the log, which the renewer's session reads.
            self.world.count("ahead")
            self.world.under_way.append(
                lambda: self._arrived(known, snapshot, began, answer, again=False)
            )
        elif standing is Standing.BELIEVED:
            self.state.cache.store(known.token_id.encode(), known, snapshot.position)
            answer(known.live, snapshot.position)
        else:
            self.world.count("refused")
            self.lookup_database = self.world.reached()

    def stop(self) -> None:
        """Shut down: ask clients to move, and remove the row once no client holds a lease."""
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
        # True while messages are delayed, until another step delivers them.
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
            if said.shares is not None:
                self.server.rates.draw_for(self.session, said.shares)

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
        case watch_events.Shares():
            return SharesReceived(event.number, tuple(event.calls), event.seconds)


class Client:
    """A client library: its cache under the grants of its streams."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.clock = Clock(world)
        cache: Any = world.client_cache(ENTRIES_MAX)
        self.cache: VerdictCache[Known] = cache
        self.subscription = Subscription(cache, world.random.random)
        self.streams: list[Stream] = []
        # Kept, as long as the process lives.
        self.share = self.subscription.shares.of(LIMITED, LIMIT)

    def verify(self, token_id: str) -> None:
        """Answer from the cache, or ask a server, which need not be the one that the client
        watches."""
        started = self.world.steps
        key = token_id.encode()
        known = self.cache.entries.get(key)
        if known is not None and self.clock() < self.subscription.lease.end:
            self.world.count("from a client's cache")
            self.world.answered(token_id, started, valid=known.live)
            return

        def arrive(live: bool, position: Position) -> None:
            def deliver() -> None:
                if self.clock() < self.subscription.lease.end:
                    self.cache.store(key, Known(token_id, live=live), position)
                self.world.answered(token_id, started, valid=live)

            self.world.send(deliver)

        self.world.pick(self.world.servers).verify(token_id, arrive)

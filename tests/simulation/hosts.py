"""A host whose processes share one row: a lead and its siblings. The shipped rules decide.

One step does the same as the service's loops between two awaits (`host_rows.py`, `lead_server.py`).
Questions to the lead wait, or are lost. The lead stalls, and answers old questions later. The logs
that it sends without a question are delayed, reordered and lost.
"""

from collections.abc import Callable
from typing import Any

from latchkey_service.coherence.host_lead import HostLead, Renewal, UnaskedLog
from latchkey_service.coherence.host_lead import Sibling as Record
from latchkey_service.coherence.log import Log, Registration

from tests.simulation.processes import Clock, Server
from tests.simulation.world import World

__all__ = ["HostWorld", "Lead", "Sibling"]

SHARING = [
    *(["a_lead_stalls", "a_sibling_gives_up"] * 4),
    *(["a_sibling_works", "a_sibling_returns"] * 12),
]


class Lead(Server):
    """The process with the row of the host."""

    world: "HostWorld"

    def __init__(self, world: "HostWorld", name: str) -> None:
        super().__init__(world, name)
        self.clock = world.host_clock
        self.rules = HostLead(self.state, lambda: self.incarnation)
        self.stalled = False
        self.inbox: list[Callable[[], None]] = []

    def renew_once(self, *, news: bool = False) -> None:
        if not self.stalled:
            super().renew_once(news=news)

    def receive_reply(self) -> None:
        if not self.stalled:
            super().receive_reply()

    def _apply(self, log: Log, began: float) -> None:
        super()._apply(log, began)
        for sibling in self.world.siblings if self.world.sends_logs else ():
            connection = sibling.connection
            if connection is not None and connection.lead is self:
                self._send_log(sibling, connection)

    def _send_log(self, sibling: "Sibling", connection: "Connection") -> None:
        unasked = self.rules.unasked_log(connection.record)
        if unasked is None:
            return
        chance = self.world.random.random()
        if chance < 0.5:
            sibling.hear(connection, unasked)
        elif chance < 0.9:
            self.world.send(lambda: sibling.hear(connection, unasked))

    def stop(self) -> None:
        self.rules.closing = True
        super().stop()

    def stall(self) -> None:
        """Stop, or continue with the questions that have arrived meanwhile."""
        self.stalled = not self.stalled
        while self.inbox and not self.stalled:
            self.inbox.pop(0)()


class Connection:
    """A connection of a sibling, with its record at the lead."""

    def __init__(self, lead: Lead) -> None:
        self.lead = lead
        self.record = Record()


class Sibling(Server):
    """Another process of the host."""

    world: "HostWorld"

    def __init__(self, world: "HostWorld", name: str) -> None:
        super().__init__(world, name)
        self.clock = world.host_clock
        self.connection: Connection | None = None
        self.left: Connection | None = None
        self.shared = self.own = False
        # The question that waits for an answer.
        self.asked: object | None = None
        # The latest log that the lead has sent without a question.
        self.unasked: UnaskedLog | None = None

    def hear(self, connection: Connection, unasked: UnaskedLog) -> None:
        """Receive a log from the lead that this process uses, and apply it now or later."""
        if connection is self.connection and self.shared:
            self.unasked = unasked
            if self.asked is None and self.world.random.random() < 0.5:
                self._apply_unasked()

    def renew_once(self, *, news: bool = False) -> None:
        state = self.state
        if self.reply is not None or self.asked is not None:
            return
        self._apply_unasked()
        if not state.registered:
            clear = state.client_leases.floor(self.clock()) is None
            if not self.own and (self.shared or clear) and self.connect():
                self._ask(lambda lead, record: _register(lead, record, clear), self._registered)
            else:
                self._register(acknowledge=clear)
        elif self.shared:
            if not self.connect():
                self.gives_up()
            elif news:
                applied, began = state.cache.position, self.clock()
                self._ask(
                    lambda lead, record: _log(lead, record, applied),
                    lambda log: self._log_arrived(log, began),
                )
            else:
                self._renew_at_lead()
        elif not self.own:
            self._register_and_keep_the_cache()
        else:
            super().renew_once(news=news)

    def _apply_unasked(self) -> None:
        unasked, self.unasked = self.unasked, None
        if unasked is None or not self.shared or not self.state.registered:
            return
        log = unasked.following(self.state.cache.position)
        # As in the service, only a renewal may move the lease to another server.
        if log is not None and log.server == self.state.server:
            self._apply(log, self.clock())
            self.world.count("applied without a question")

    def connect(self) -> bool:
        """Return whether there is a lead to ask."""
        lead = self.world.lead
        if self.connection is None:
            self.connection = Connection(lead)
        return self.connection.lead.alive and not self.connection.lead.rules.closing

    def gives_up(self) -> None:
        """Leave a lead that is silent or will stop."""
        self.asked = None
        if self.shared:
            self.left = self.connection
            self.world.count("left the lead")
        self.connection, self.shared = None, False

    def returns(self) -> None:
        """Move back to the lead, if everything is acknowledged."""
        state = self.state
        position, acknowledged = state.cache.position, state.acknowledged
        if (
            self.shared
            or not (self.own and state.registered)
            or acknowledged != position.revision
            or self.reply is not None
            or self.asked is not None
            or not self.connect()
        ):
            return
        ends, server = state.lease_ends, state.server

        def answer(lead: Lead, record: Record) -> bool:
            now = lead.clock()
            return lead.rules.adopt(record, position, acknowledged, ends, server, now)

        self._ask(answer, self._adopted)

    def remove_dead_verifiers(self) -> None:
        """Leave that to the lead."""

    def acknowledge(self) -> None:
        state = self.state
        if state.registered and state.acknowledgeable(self.clock()) > state.acknowledged:
            self.renew_once()

    def stop(self) -> None:
        """Shut down. The release removes the row at the lead, but may be lost."""
        self.stopping = True
        for stream in self.streams:
            stream.session.close()
        if self.state.client_leases.floor(self.clock()) is None:
            self.state.lose()
            if self.own:
                self.renewal_database.remove(self.name)
            if self.shared:
                self._release(self.connection)
            self.die()

    def _ask(self, answer: Callable[[Lead, Record], Any], arrived: Callable[[Any], None]) -> None:
        connection = self.connection
        assert connection is not None
        question = self.asked = object()

        def receive(result: Any) -> None:
            if self.asked is question:
                self.asked = None
                if result is not None:
                    arrived(result)

        def process() -> None:
            if not connection.lead.alive:
                return
            if connection.lead.stalled:
                connection.lead.inbox.append(process)
                return
            result = answer(connection.lead, connection.record)
            if self.asked is question and self.alive:
                self.reply = lambda: receive(result)

        if self.world.random.random() < 0.7:
            process()
        else:
            self.world.send(process)

    def _renew_at_lead(self) -> None:
        state, began = self.state, self.clock()
        applied, acknowledged = state.cache.position, state.acknowledgeable(began)

        def arrived(renewal: Renewal) -> None:
            self._apply(renewal.log, began)
            if renewal.renewed:
                state.renew(began, acknowledged, renewal.ends)
                self.world.count("shared a lease")

        self._ask(lambda lead, record: _renew(lead, record, applied, acknowledged), arrived)

    def _log_arrived(self, log: Log, began: float) -> None:
        # As in the service, only a renewal may move the lease to another server.
        if not log.known or log.server == self.state.server:
            self._apply(log, began)

    def _registered(self, registration: Registration) -> None:
        self.shared = True
        self.state.register(*registration, self.clock())

    def _register(self, *, acknowledge: bool) -> None:
        self.incarnation += 1
        self.renewal_database = self.world.session(self.renewal_database)
        registration = self.renewal_database.register(
            self.name, self.incarnation, acknowledge=acknowledge
        )
        if registration is None:
            self.renewal_database = self.world.reached()
            return

        def arrive() -> None:
            self.own = True
            self.state.register(*registration, self.clock())

        self.reply = arrive

    def _register_and_keep_the_cache(self) -> None:
        self.incarnation += 1
        self.renewal_database = self.world.session(self.renewal_database)
        registration = self.renewal_database.register(
            self.name, self.incarnation, acknowledge=False
        )
        if registration is None:
            self.renewal_database = self.world.reached()
            return

        def arrive() -> None:
            self.own = True

        self.reply = arrive

    def _renewed(self, renewed: bool, log: Log, began: float, acknowledged: int) -> None:
        super()._renewed(renewed, log, began, acknowledged)
        if renewed and self.left is not None:
            self._release(self.left)
            self.left = None

    def _adopted(self, adopted: bool) -> None:
        if adopted:
            self.shared, self.own = True, False
            self.renewal_database.remove(self.name)
            self.world.count("returned")

    def _release(self, connection: Connection | None) -> None:
        assert connection is not None

        def process() -> None:
            if connection.lead.stalled:
                connection.lead.inbox.append(process)
            elif connection.lead.alive:
                connection.lead.rules.release(connection.record)

        self.world.send(process)


def _ready(lead: Lead, applied_revision: int = 0) -> bool:
    """Return whether the lead may answer, after it has read the log if the sibling is ahead."""
    if applied_revision > lead.state.cache.position.revision:
        lead.renew_once(news=True)
        lead.receive_reply()
    return lead.rules.ready(lead.clock()) and not lead.rules.closing


def _register(lead: Lead, record: Record, acknowledge: bool) -> Registration | None:
    return lead.rules.register(record, acknowledge=acknowledge) if _ready(lead) else None


def _log(lead: Lead, record: Record, applied: Any) -> Log | None:
    return lead.rules.log_after(record, applied) if _ready(lead, applied.revision) else None


def _renew(lead: Lead, record: Record, applied: Any, acknowledged: int) -> Renewal | None:
    if not _ready(lead, applied.revision):
        return None
    return lead.rules.renew(record, applied, acknowledged)


class HostWorld(World):
    """A world in which the first two processes share the row of the first one."""

    def __init__(
        self, random: Any, *, timelines: bool | None = None, sends_logs: bool = False
    ) -> None:
        super().__init__(random, timelines=timelines)
        # Whether the lead sends logs without a question.
        self.sends_logs = sends_logs
        self.kinds += SHARING
        self.host_clock = Clock(self)
        alone = self.servers[:1]
        self.lead = Lead(self, next(self.names))
        self.siblings = [Sibling(self, next(self.names)) for _ in range(2)]
        self.servers = [self.lead, *self.siblings, *alone]

    def a_lead_stalls(self) -> None:
        self.lead.stall()

    def a_sibling_gives_up(self) -> None:
        self.pick(self.siblings).gives_up()

    def a_sibling_returns(self) -> None:
        self.pick(self.siblings).returns()

    def a_sibling_works(self) -> None:
        sibling = self.pick(self.siblings)
        sibling.renew_once(news=self.random.random() < 0.3)
        sibling.receive_reply()

    def die(self) -> None:
        number = self.random.randrange(len(self.servers))
        self.servers[number].die()
        self._replace(number)

    def stop(self) -> None:
        number = self.random.randrange(len(self.servers))
        self.servers[number].stop()
        if not self.servers[number].alive:
            self.count("shut down")
            self._replace(number)

    def _replace(self, number: int) -> None:
        kind = type(self.servers[number])
        self.servers[number] = new = kind(self, next(self.names))
        if isinstance(new, Lead):
            self.lead = new
        elif isinstance(new, Sibling):
            self.siblings = [s for s in self.servers if isinstance(s, Sibling)]

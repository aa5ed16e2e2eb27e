"""Tests the client's cache, lease and subscription while everything around them fails.

Two servers follow coherence rules 3, 5 to 9 and 12 exactly. Messages are late, doubled, lost with
their stream, and reordered across streams. Clocks start anywhere and run at different rates. A
client may pause at any point. The second server may stay with a deposed primary, which has commits
that no other database has.

The invariant: a verify that starts after a Delete has returned is not answered VALID from the
cache. The machine must also detect every client that breaks a rule.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from unittest import mock

import latchkey
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from latchkey import Scope, Verdict, Verification
from latchkey._shape import checksum
from latchkey._subscription import (
    Closing,
    Event,
    Grant,
    Invalidation,
    Request,
    Reset,
    Stream,
    Subscription,
)
from latchkey_coherence.lease import DRIFT_MAX, outwait_seconds, server_lease_end
from latchkey_coherence.verdict_cache import NOWHERE, Position, VerdictCache

from tests.helpers.positions import at

LEASE_SECONDS = 3.0
# Two clocks may drift apart by a thousandth, half of it on each side of the true rate.
RATES = st.sampled_from([1 - DRIFT_MAX / 2.01, 1.0, 1 + DRIFT_MAX / 2.01])
STEPS = st.sampled_from([0.001, 0.01, 0.1, 0.3, 0.5, 0.999, 1.0, 2.0, 2.999, 3.1])
BIG = st.integers(0, 1_000)
# Frequent events are listed more than once.
WHAT = [
    *(["time_passes", "renew_all", "all_is_delivered"] * 4),
    *(["verify", "delete"] * 3),
    *(["ask", "an_answer_arrives", "watch", "renew_one", "stream_breaks"] * 2),
    *(["server_answers", "client_receives"] * 2),
    *("client_sends", "server_receives", "server_sends"),
    *("server_closes", "verifier_releases", "cut_off", "crash", "prune_the_log"),
    *(["fail_over", "server_reconnects"] * 2),
]


def secret_of(token_id: str) -> str:
    body = "lk" + "_" + token_id.rjust(51, "0")
    return body + checksum(body)


def answer_of(token_id: str, verdict: Verdict, position: Position) -> Verification:
    token = latchkey.Token(
        id=token_id,
        account_id="a",
        name="n",
        scope=Scope.READ,
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
    )
    return Verification(
        verdict=verdict, token=token, revision=position.revision, mark=position.mark
    )


@dataclass
class Clock:
    """A machine's clock, with its own start and rate."""

    offset: float = 0.0
    rate: float = 1.0
    true: float = 0.0

    def __call__(self) -> float:
        return self.offset + self.rate * self.true


@dataclass(eq=False)
class Link:
    """One Watch stream: both ends, and the messages in flight."""

    stream: Stream
    server: Server
    to_server: deque[Request] = field(default_factory=deque)
    to_client: deque[Event] = field(default_factory=deque)
    # State of the server's end.
    told: Position | None = None
    acknowledged: int = 0
    confirmed: bool = False
    # The position that the client claims, while the server does not know that position.
    claim: Position | None = None
    epoch: int = 0
    granted_until: float = -math.inf
    asked: int = 0
    closing: bool = False
    open: bool = True


@dataclass
class Row:
    """A server process as stored in the database."""

    acknowledged: int
    renewed: float  # in true time, because the process that outwaits it has a perfect clock here
    server: Server | None


class Server:
    """A server process that follows the rules, with its own clock."""

    def __init__(self, world: World, clock: Clock) -> None:
        self.world = world
        self.clock = clock
        self.cut_off = False
        self.database = world.database
        self.start()

    def start(self) -> None:
        """Start as a new process: empty cache, no streams, a new row."""
        self.links: list[Link] = []
        self.epoch = 0
        self.register()

    def register(self) -> None:
        """Rules 2 and 12: forget the earlier history, except for how long its leases run."""
        self.lease_end = -math.inf
        self.epoch += 1
        self.applied = self.database.head
        self.row = Row(self.applied.revision, self.world.true, self)
        self.world.rows.append(self.row)
        for link in self.links:
            link.acknowledged = 0
        self.acknowledge()

    def acknowledge(self) -> None:
        """Rule 7."""
        live = [link for link in self.links if link.granted_until > self.clock()]
        self.row.acknowledged = min([self.applied.revision, *(link.acknowledged for link in live)])

    def renew(self) -> None:
        """Rule 3: read the clock, then the log and the row. A deposed primary cannot renew."""
        if self.database is not self.world.database:
            self.applied = self.database.head
            return
        began = self.clock()
        if not self.database.knows(self.applied):
            self.row.server = None
            self.register()
            return
        self.applied = self.database.head
        self.acknowledge()
        self.row.renewed = self.world.true
        self.lease_end = server_lease_end(began, LEASE_SECONDS)

    def reconnect(self) -> None:
        """Connect to the new primary, which has a copy of the row. The rules decide the rest."""
        self.database = self.world.database

    def receive(self, link: Link, request: Request) -> None:
        if request.released:
            link.granted_until = -math.inf
        link.asked = max(link.asked, request.number)
        if link.told is not None and link.epoch != self.epoch:
            return  # the server will send a Reset
        known = self.database.known_upto(request.applied, self.applied)
        if link.told is None:
            link.claim = request.applied
            if known:
                link.told, link.epoch, link.claim = request.applied, self.epoch, None
                link.confirmed = True
        elif request.applied == link.told:
            link.confirmed, link.acknowledged = True, request.applied.revision
        elif known and request.applied.revision < link.told.revision and link.claim is None:
            link.acknowledged = request.applied.revision

    def send(self, link: Link) -> None:
        """Rule 6: send everything that was applied, and a grant after it was confirmed."""
        if link.told is None and link.claim is None:
            return
        if link.told is None or link.epoch != self.epoch:
            link.told, link.epoch = self.applied, self.epoch
            link.confirmed = link.claim == NOWHERE
            link.acknowledged = 0
            # After the Reset the client's claim counts again.
            link.claim = self.applied
            link.to_client.append(Reset(self.applied))
        elif link.told != self.applied:
            if self.database.pruned >= link.told.revision + 1:
                link.to_client.append(Reset(self.applied))
            else:
                named = self.database.named(link.told, self.applied)
                link.to_client.append(Invalidation(self.applied, named))
            link.told, link.confirmed = self.applied, link.granted_until <= self.clock()
        if link.asked and link.confirmed and not link.closing and self.clock() < self.lease_end:
            link.acknowledged = link.told.revision
            link.granted_until = max(link.granted_until, self.lease_end)
            link.to_client.append(Grant(link.told, link.asked, self.lease_end - self.clock()))
            link.asked = 0
            link.confirmed = False


class Database:
    """A log on one server. It may be copied before the server is deposed."""

    def __init__(self, history: int, log: list[tuple[Position, str]]) -> None:
        self.history = history
        self.log = log
        self.pruned = 0

    @property
    def head(self) -> Position:
        return self.log[-1][0]

    def delete(self, token_id: str) -> Position:
        position = at(self.head.revision + 1, self.history)
        self.log.append((position, token_id))
        return position

    def knows(self, position: Position) -> bool:
        return any(position == known for known, _ in self.log)

    def known_upto(self, position: Position, applied: Position) -> bool:
        return position.revision <= applied.revision and self.knows(position)

    def named(self, after: Position, upto: Position) -> tuple[str, ...]:
        return tuple(t for p, t in self.log if after.revision < p.revision <= upto.revision)

    def deleted(self, token_id: str, applied: Position) -> bool:
        return any(t == token_id and p.revision <= applied.revision for p, t in self.log)


class World(RuleBasedStateMachine):
    """A database, its deletions, two servers, and one client with the library's own classes."""

    subscription_class: type[Subscription] = Subscription
    cache_class: type[VerdictCache[Any]] = VerdictCache
    what: Sequence[str] = WHAT

    @initialize(rates=st.tuples(RATES, RATES, RATES), head=st.integers(0, 1))
    def begin(self, rates: tuple[float, ...], head: int) -> None:
        self.true = 0.0
        # Old deletions of tokens that the test does not use.
        self.database = Database(1, [(at(r), "old") for r in range(head + 1)])
        self.rows: list[Row] = []
        self.live = ["a", "b"]
        self.deleted: dict[str, tuple[int, float]] = {}
        self.confirmed: list[str] = []
        offsets = (1_000.0, -5_000.0, 9_000.0)
        self.clocks = [Clock(offset, rate) for offset, rate in zip(offsets, rates, strict=True)]
        self.clock = self.clocks[0]
        self.servers = [Server(self, clock) for clock in self.clocks[1:]]
        self.links: list[Link] = []
        self.under_way: list[tuple[str, Verification]] = []
        self.patched = mock.patch("latchkey.verifier.boottime", self.clock)
        self.patched.start()
        with (
            mock.patch("latchkey.verifier.VerdictCache", self.cache_class),
            mock.patch("latchkey.verifier.Subscription", self.subscription_class),
        ):
            self.verifier = latchkey.Verifier("nowhere:1")
        self.subscription = self.verifier._subscription
        # Start in a healthy state.
        self.renew_all(0)
        self.watch(0)
        self.all_is_delivered(0)

    def teardown(self) -> None:
        if hasattr(self, "patched"):
            self.patched.stop()

    def pick(self, links: Iterable[Link], number: int) -> Link | None:
        links = list(links)
        return links[number % len(links)] if links else None

    # Time passes.

    @rule(data=st.data(), number=BIG, seconds=STEPS)
    def one_event(self, data: st.DataObject, number: int, seconds: float) -> None:
        # One rule instead of twenty: Hypothesis omits rules at random, but the interesting
        # sequences need most of them.
        what = data.draw(st.sampled_from(self.what))
        if what == "time_passes":
            self.time_passes(seconds)
        else:
            getattr(self, what)(number)

    def time_passes(self, seconds: float) -> None:
        self.true += seconds
        for clock in self.clocks:
            clock.true = self.true
        self.confirm()

    # The database and the caller of Delete.

    def delete(self, number: int) -> None:
        token_id = self.live.pop(number % len(self.live))
        revision, _ = self.database.delete(token_id)
        self.deleted[token_id] = (revision, self.true)
        self.live.append(f"t{len(self.deleted)}")

    def prune_the_log(self, _number: int) -> None:
        self.database.pruned = self.database.head.revision

    def fail_over(self, number: int) -> None:
        """Promote the standby. The old primary has a few commits that were never confirmed."""
        old = self.database
        self.database = Database(old.history + 1, list(old.log))
        self.database.pruned = old.pruned
        for n in range(number % 4):
            old.delete(self.live[n % len(self.live)])

    def server_reconnects(self, number: int) -> None:
        self.servers[number % 2].reconnect()

    def confirm(self) -> None:
        """Rules 8 and 9: return each Delete as early as they allow."""
        for row in list(self.rows):
            gone = row.server is None or row.server.row is not row
            if gone and self.true - row.renewed > outwait_seconds(LEASE_SECONDS):
                self.rows.remove(row)
        for token_id, (revision, committed) in self.deleted.items():
            if token_id in self.confirmed:
                continue
            acknowledged = all(row.acknowledged >= revision for row in self.rows)
            if acknowledged or self.true - committed > outwait_seconds(LEASE_SECONDS):
                self.confirmed.append(token_id)

    # The servers.

    def renew_all(self, _number: int) -> None:
        for number in range(2):
            self.renew_one(number)

    def renew_one(self, number: int) -> None:
        server = self.servers[number % 2]
        if not server.cut_off:
            server.renew()
            self.confirm()

    def cut_off(self, number: int) -> None:
        server = self.servers[number % 2]
        server.cut_off = not server.cut_off

    def crash(self, number: int) -> None:
        server = self.servers[number % 2]
        for link in server.links:
            self.lose(link)
        server.row.server = None
        server.start()

    def server_sends(self, number: int) -> None:
        link = self.pick((link for link in self.links if link.open), number)
        if link is not None:
            link.server.send(link)

    def server_closes(self, number: int) -> None:
        link = self.pick((link for link in self.links if link.open), number)
        if link is not None and not link.closing:
            link.server.send(link)
            link.closing = True
            link.to_client.append(Closing())

    # The streams.

    def watch(self, number: int) -> None:
        if sum(link.open for link in self.links) < 3:
            link = Link(self.subscription.open(self.clock()), self.servers[number % 2])
            self.links.append(link)
            link.server.links.append(link)
            self.client_sends_on(link)

    def client_sends(self, number: int) -> None:
        link = self.pick((link for link in self.links if link.open), number)
        if link is not None:
            self.client_sends_on(link)

    def client_sends_on(self, link: Link) -> None:
        while (request := link.stream.take(self.clock())) is not None:
            link.to_server.append(request)

    def server_receives(self, number: int) -> None:
        link = self.pick((link for link in self.links if link.to_server), number)
        if link is not None:
            link.server.receive(link, link.to_server.popleft())

    def client_receives(self, number: int) -> None:
        link = self.pick((link for link in self.links if link.to_client), number)
        if link is not None:
            events = [link.to_client.popleft() for _ in range(len(link.to_client))]
            for event in events if number % 2 else [events[0]] * 2:
                link.stream.receive(event, self.clock())
            if not number % 2:
                link.to_client.extendleft(reversed(events[1:]))

    def server_answers(self, number: int) -> None:
        """Put the server's messages in flight while the client may be paused."""
        link = self.pick((link for link in self.links if link.open), number)
        if link is not None:
            self.client_sends_on(link)
            while link.to_server:
                link.server.receive(link, link.to_server.popleft())
            link.server.send(link)

    def all_is_delivered(self, number: int) -> None:
        """Deliver all messages of one stream."""
        link = self.pick((link for link in self.links if link.open), number)
        if link is None:
            return
        self.client_sends_on(link)
        while link.to_server:
            link.server.receive(link, link.to_server.popleft())
        link.server.send(link)
        while link.to_client:
            link.stream.receive(link.to_client.popleft(), self.clock())
        self.client_sends_on(link)
        while link.to_server:
            link.server.receive(link, link.to_server.popleft())

    def stream_breaks(self, number: int) -> None:
        link = self.pick((link for link in self.links if link.open), number)
        if link is not None:
            self.lose(link)

    def verifier_releases(self, _number: int) -> None:
        self.subscription.release()

    def lose(self, link: Link) -> None:
        """Lose a stream and its messages in flight. Grants that were sent remain valid."""
        link.open = False
        link.to_server.clear()
        link.to_client.clear()

    # Verifies.

    def ask(self, number: int) -> None:
        """A server with a lease answers a verify from its cache or from the database."""
        # Include the most recently deleted token, which a server that lags still finds VALID.
        tokens = [*self.live, *list(self.deleted)[-1:]]
        server, token_id = self.servers[number % 2], tokens[number // 2 % len(tokens)]
        from_memory = number // 6 % 2 == 0
        if server.clock() < server.lease_end:
            position = server.applied
            if not (from_memory or server.cut_off):
                position = server.database.head
                # Rule 12: it reads its log first, and then knows the position of its answer.
                server.applied = position
            deleted = server.database.deleted(token_id, position)
            verdict = Verdict.DELETED if deleted else Verdict.VALID
            self.under_way.append((token_id, answer_of(token_id, verdict, position)))

    def verify(self, number: int) -> None:
        """Verify, and receive the answer at once."""
        before = len(self.under_way)
        self.ask(number)
        if len(self.under_way) > before:
            self.an_answer_arrives(-1)

    def an_answer_arrives(self, number: int) -> None:
        if self.under_way:
            token_id, answer = self.under_way.pop(number % len(self.under_way))
            self.verifier._store(secret_of(token_id), None, answer)

    @invariant()
    def no_dead_token_is_valid(self) -> None:
        for token_id in getattr(self, "confirmed", ()):
            answer = self.verifier.verify_nowait(secret_of(token_id))
            assert answer is None or not answer.allowed, f"{token_id} is dead but was accepted"


def run(machine: type[World], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            print_blob=False,
            # Do not report a mutant's failure in detail: only its detection matters.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


class CountsFromReceipt(Stream):
    def receive(self, event: Event | None, now: float) -> None:
        if isinstance(event, Grant) and self._asked_at is not None:
            self._asked_at = now
        super().receive(event, now)


class OpensStreamsThatCountFromReceipt(Subscription):
    def open(self, now: float) -> Stream:
        return CountsFromReceipt(self, now)


class AppliesTooLate(Subscription):
    """Acknowledges and extends its lease before it has applied the changes."""

    later: tuple[str, ...] = ()

    def apply(self, position: Position, token_ids: Iterable[str]) -> bool:
        self.later, now = tuple(token_ids), self.later
        return super().apply(position, now)


class KeepsTheLongerLease(Subscription):
    def extend(self, stream: Stream, end: float) -> None:
        super().extend(stream, max(end, self.lease.end))


class ReleasesAndAnswersOn(Subscription):
    def release(self) -> None:
        end = self.lease.end
        super().release()
        self.lease.end = end


class TrustsAnyGrantAfterAReset(Subscription):
    def start_over(self, position: Position) -> None:
        self.cache.reset(position)


class KeepsTheLeaseAcrossAReset(Subscription):
    def start_over(self, position: Position) -> None:
        end = self.lease.end
        super().start_over(position)
        self.lease.end = end


class ComparesBareRevisions(VerdictCache[Any]):
    def knows(self, position: Position) -> bool:
        return position.revision in self._marks

    def agrees(self, position: Position) -> bool:
        return True


class AdmitsAnything(VerdictCache[Any]):
    def store(self, key: bytes, entry: Any, position: Position) -> bool:
        return super().store(key, entry, self.position)


class HasNoEnd(Subscription):
    def extend(self, stream: Stream, end: float) -> None:
        super().extend(stream, math.inf)


def test_no_dead_token_is_valid() -> None:
    """In every order of events, no verify that starts after a Delete has returned is VALID."""
    run(World, 300, 50)


# Each mutant with the rules that its sequence needs, so that it is found quickly.
MUTANTS: list[tuple[type[Subscription | VerdictCache[Any]], str]] = [
    (
        OpensStreamsThatCountFromReceipt,
        "time renew_all server_answers client_receives verify delete",
    ),
    (AppliesTooLate, "renew_all all_is_delivered verify delete"),
    (ReleasesAndAnswersOn, "renew_all all_is_delivered verify delete verifier_releases"),
    (AdmitsAnything, "renew_all all_is_delivered ask an_answer_arrives delete"),
    (HasNoEnd, "time renew_all stream_breaks verify delete"),
]


@pytest.mark.parametrize(("mutant", "story"), MUTANTS)
def test_every_broken_rule_is_detected(mutant: type[Any], story: str) -> None:
    """The machine finds a dead token accepted by a client that breaks one rule."""
    attribute = "cache_class" if issubclass(mutant, VerdictCache) else "subscription_class"
    what = story.replace("time", "time_passes").split()
    broken = type("BrokenWorld", (World,), {attribute: mutant, "what": what})
    with pytest.raises(AssertionError, match="is dead but was accepted"):
        run(broken, 20_000, 50)


def two_leases(world: World) -> None:
    """A client moves from a server with a long lease to one with a short lease, which then ends."""
    first = world.links[0]
    world.time_passes(2.0)
    world.renew_one(0)
    world.all_is_delivered(0)  # the first server grants until 5.0
    world.watch(1)
    world.all_is_delivered(1)  # the second server grants until 3.0
    world.all_is_delivered(0)  # the first server receives the release
    assert first.granted_until == -math.inf
    world.verify(0)
    world.time_passes(1.5)


def two_histories(world: World) -> None:
    """A client with a lease from one server receives an answer from another, which lags."""
    world.delete(0)
    world.renew_one(0)
    world.all_is_delivered(0)
    world.renew_one(0)  # the first server and its client confirm the deletion
    world.watch(1)
    # The second server has not applied the deletion. It has lost its own history, so it resets its
    # clients to its current position. Its stream breaks before it can grant anything.
    world.links[1].stream.receive(Reset(world.servers[1].applied), world.clock())
    world.ask(1 + 2 * 2)  # the second server still finds the dead token VALID
    world.an_answer_arrives(0)
    world.stream_breaks(1)
    world.renew_one(1)


@pytest.mark.parametrize(
    ("mutant", "story"),
    [(KeepsTheLongerLease, two_leases), (TrustsAnyGrantAfterAReset, two_histories)],
)
@pytest.mark.parametrize("broken", [False, True])
def test_long_stories(
    mutant: type[Subscription], story: Callable[[World], None], broken: bool
) -> None:
    """Scripted sequences that random search would take too long to find."""
    world = World()
    if broken:
        world.subscription_class = mutant
    world.begin((1.0, 1.0, 1.0), 1)
    try:
        story(world)
        for token in list(world.live):
            world.delete(world.live.index(token))
        world.renew_all(0)
        assert world.confirmed
        if broken:
            with pytest.raises(AssertionError, match="is dead but was accepted"):
                world.no_dead_token_is_valid()
        else:
            world.no_dead_token_is_valid()
    finally:
        world.teardown()

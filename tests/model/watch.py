"""A client that watches one server under a sub-lease and verifies through any server, and one
Delete.

Rules 4 to 9, and the clients of a server that loses its row, dies, or shuts down. The stream may
stall for any time, or break at any time and lose its messages. The client may move to another
server, or restart. An answer to a verify may arrive after any time, or never. Every process may
pause for any time.

server.py models the inside of a server. Here servers are simplified, and may do everything that
they may do there:

- A server says VALID to a verify that begins now only while its lease is live and it has not
  applied the deletion: LEMMA, there. here it always may, as if the token were in the cache.
- A renewal is one step: the process reads its clock and the log and updates its row in the same
  instant. An earlier clock reading would only shorten the lease. A later update would only delay
  the removal of the row, and the next update acknowledges the same.
- One client stands for any number, because a server keeps a separate record of each.

The revision is 0 before the deletion and 1 after it.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.explore import Model, Violation
from tests.model.watch_state import (
    ANSWERED,
    BEFORE,
    CLOSING,
    DOWN,
    DRAINING,
    EMPTY,
    FRESH,
    GUARANTEE,
    INVALIDATION,
    NAMES,
    NO_ROW,
    NOWHERE,
    REGISTERING,
    STEADY,
    UP,
    Client,
    Clocks,
    Lookup,
    Request,
    Server,
    State,
    World,
    ended,
    head,
    with_client,
    with_server,
)

# ---- Delete ----


def deletes(s: State, w: World) -> Iterator[State]:
    """Delete commits, and begins to wait (rule 8)."""
    if s.delete == BEFORE:
        yield s._replace(delete=w.clocks.wait)


def answers_by_acknowledgement(s: State, _: World) -> Iterator[State]:
    """Delete answers: every existing row has acknowledged its revision (rule 8)."""
    if s.delete >= 0 and all(server.row != 0 for server in s.servers):
        yield s._replace(delete=ANSWERED)


def answers_by_waiting(s: State, _: World) -> Iterator[State]:
    """Delete answers: T has passed since its commit (rule 8)."""
    if s.delete == 0:
        yield s._replace(delete=ANSWERED)


# ---- The servers ----


def begins_to_register(s: State, w: World) -> Iterator[State]:
    """A server process starts and begins to register: its transaction has read `head` (rule 2).

    Excluded while another server is healthy: two_servers models that.
    """
    if any(server.phase in {EMPTY, UP} for server in s.servers):
        return
    for i, server in enumerate(s.servers):
        free = server.row == NO_ROW or "9 a restart takes over the row" in w.broken
        if i in w.may_start and server.phase == DOWN and free:
            yield with_server(s, i, phase=REGISTERING, applied=head(s))


def registers(s: State, w: World) -> Iterator[State]:
    """The registration commits: the row exists, but there is no lease yet (rule 2)."""
    for i, server in enumerate(s.servers):
        if server.phase == REGISTERING:
            lease = w.clocks.lease if "3 registration gives a lease" in w.broken else 0
            quiet = w.clocks.ticks
            phase = UP if server.applied == head(s) else EMPTY
            yield with_server(s, i, phase=phase, row=server.applied, lease=lease, quiet=quiet)


def renews(s: State, w: World) -> Iterator[State]:
    """A server renews: it reads clock and log, informs its client, and updates its row (rules 3,
    7).

    Without a row, it ends its streams and registers again.
    """
    for i, server in enumerate(s.servers):
        if server.phase < EMPTY:
            continue
        if server.row == NO_ROW:
            if "3 clients not reset after the loss of the row" in w.broken:
                # Registers again and continues with its streams.
                yield with_server(s, i, row=head(s), applied=head(s), quiet=w.clocks.ticks)
            elif server.phase != DRAINING:
                yield with_server(ended(s, i), i, phase=DOWN, applied=0, lease=0)
            continue
        after = s
        if server.applied < head(s) and s.client.stream == i and s.client.applied != 1:
            after = with_client(s, inbox=(*s.client.inbox, INVALIDATION))
        changes = {"applied": head(s), "lease": w.clocks.lease, "quiet": w.clocks.ticks}
        if server.phase == EMPTY:
            changes["phase"] = UP
        if server.phase == DRAINING:
            changes["lease"] = 0  # it does not need one
        if head(s) and may_acknowledge(after, i, w):
            # Its acknowledgement stands, and with only one deletion, the record is needed only for
            # a shutdown.
            changes |= {"row": 1, "heard": False}
            if not w.may_shut_down:
                changes["sub_lease"] = 0
        yield with_server(after, i, **changes)


def may_acknowledge(s: State, i: int, w: World) -> bool:
    """Return whether each of server i's clients has acknowledged or its sub-lease has expired (rule
    7)."""
    return (
        s.servers[i].heard
        or s.servers[i].sub_lease == 0
        or "7 acknowledges before its clients" in w.broken
    )


def grants(s: State, w: World) -> Iterator[State]:
    """A server answers a request with a grant, after sending the changes that the client lacks
    (rule 6).

    The grant is recorded before it is sent. It may be shorter than the server's own lease.
    """
    client, i = s.client, s.client.stream
    answered = sum(message > 0 for message in client.inbox)
    if i == NOWHERE or len(client.requests) == answered:
        return
    server, (_, said, first) = s.servers[i], client.requests[answered]
    if server.phase not in {EMPTY, UP} or server.lease == 0:
        return
    sent = client.inbox
    # From then on, it receives each change when the server applies it: see `renews`.
    lacks = first and (said < server.applied or said == FRESH) and INVALIDATION not in sent
    if lacks and not (said == 0 and "6 nothing sent to a client that returns" in w.broken):
        sent = (*sent, -server.applied)
    longest = server.lease
    if "6 grant outlasts the server's lease" in w.broken:
        longest = w.clocks.lease
    for duration in {longest, min(longest, w.clocks.shortest)}:
        inbox = (*sent, duration)
        if "6 grant overtakes an invalidation" in w.broken:
            inbox = (duration, *sent)
        granted = with_client(s, inbox=inbox)
        if (server.row == 0 or w.may_shut_down) and "7 grant not recorded" not in w.broken:
            record = -(-duration * w.clocks.recorded_percent // 100)  # rounded up
            if "7 record shortened by the next grant" not in w.broken:
                record = max(record, server.sub_lease)
            heard = server.row == 0 and said == 1
            granted = with_server(granted, i, sub_lease=record, heard=heard)
        yield granted


def removes_row(s: State, w: World) -> Iterator[State]:
    """A watcher that has seen a row for T without a renewal removes it (rule 9)."""
    for i, server in enumerate(s.servers):
        if i in w.may_end and server.row != NO_ROW and server.quiet == 0:
            yield with_server(s, i, row=NO_ROW)


def dies(s: State, w: World) -> Iterator[State]:
    """A server process dies; its row stays."""
    for i, server in enumerate(s.servers):
        if i in w.may_end and server.phase != DOWN:
            yield with_server(
                ended(s, i), i, phase=DOWN, applied=0, lease=0, sub_lease=0, heard=False
            )


def shuts_down(s: State, w: World) -> Iterator[State]:
    """A server begins a clean shutdown: it stops answering and granting, and sends Closing."""
    for i, server in enumerate(s.servers):
        if i in w.may_end and server.phase in {EMPTY, UP}:
            after = s
            if s.client.stream == i:
                after = with_client(s, inbox=(*s.client.inbox, CLOSING))
            yield with_server(after, i, phase=DRAINING, lease=0)


def removes_own_row(s: State, w: World) -> Iterator[State]:
    """No client holds a sub-lease, so the server removes its row and exits (rule 9)."""
    for i, server in enumerate(s.servers):
        if server.phase == DRAINING and (
            server.sub_lease == 0 or "9 own row removed before the clients' leases end" in w.broken
        ):
            gone = with_server(
                ended(s, i), i, phase=DOWN, applied=0, lease=0, sub_lease=0, heard=False
            )
            yield with_server(gone, i, row=NO_ROW, quiet=0)


def answers_valid(s: State, _: World) -> Iterator[State]:
    """A server answers the client's verify: VALID, under its lease (rule 5)."""
    lookup = s.client.lookup
    if lookup is None or lookup.valid:
        return
    if any(server.phase == UP and server.lease and server.applied == 0 for server in s.servers):
        yield with_client(s, lookup=lookup._replace(valid=True))


# ---- The client: its stream and its lease ----


def connects(s: State, _: World) -> Iterator[State]:
    """The client opens a stream, sends its applied position, and asks for a lease (rule 6)."""
    if s.client.stream == NOWHERE:
        for i, server in enumerate(s.servers):
            if server.phase in {EMPTY, UP}:
                applied = s.client.applied
                # A client that has applied everything needs no messages.
                request = Request(0, applied, first=applied != 1)
                yield with_client(s, stream=i, requests=(request,))


def asks(s: State, w: World) -> Iterator[State]:
    """The client requests a longer lease (rule 6)."""
    client = s.client
    if client.stream != NOWHERE and len(client.requests) < w.requests_max:
        applied = client.applied
        if (
            "7 client acknowledges what it has not applied" in w.broken
            and INVALIDATION in client.inbox
        ):
            applied = 1
        yield with_client(s, requests=(*client.requests, Request(0, applied)))


def stream_breaks(s: State, w: World) -> Iterator[State]:
    """The stream breaks: its messages are lost, and its grants remain."""
    if s.client.stream != NOWHERE:
        if "7 a broken stream ends the record" in w.broken:
            s = with_server(s, s.client.stream, sub_lease=0)
        yield with_client(s, stream=NOWHERE, requests=(), inbox=())


def receives(s: State, w: World) -> Iterator[State]:
    """The client receives the next message: it applies it, or extends its lease (rule 6).

    A grant's duration starts before its request was sent.
    """
    client = s.client
    if not client.inbox:
        return
    message, *rest = client.inbox
    left = s._replace(client=client._replace(inbox=tuple(rest)))
    if message > 0:
        age = client.requests[0].age
        if "6 grant counted from its receipt" in w.broken:
            age = 0
        elif "6 grant counted from the latest request" in w.broken:
            age = client.requests[-1].age
        lease = max(client.lease, message * w.clocks.counted_percent // 100 - age)
        yield with_client(left, lease=lease, requests=client.requests[1:])
    elif message == CLOSING:
        # It releases its lease and reports that. It need not empty its cache: without a lease it
        # does not answer from it. The server receives the report at once, which can only make
        # Delete answer sooner.
        left = with_client(left, lease=0, stream=NOWHERE, requests=(), inbox=())
        yield with_server(left, client.stream, sub_lease=0)
    else:
        revision = -message
        # The first message to a new client is its starting position.
        cache = client.cache and revision == 0 and client.applied != FRESH
        lookup = client.lookup
        if (
            lookup is not None
            and revision == 1
            and "4 client shares by the time of sending" in w.broken
        ):
            lookup = lookup._replace(stale=True)
        applied = max(client.applied, revision)
        yield with_client(left, applied=applied, cache=cache, lookup=lookup)


def restarts(s: State, _: World) -> Iterator[State]:
    """The client dies, and another starts in its place."""
    yield s._replace(client=Client())


# ---- The client: its answers ----


def answers_from_memory(s: State, w: World) -> Iterator[State | Violation]:
    """A verify answers VALID from the client's cache, under its lease (rule 5)."""
    if s.client.cache and (s.client.lease or "5 client answers without a lease" in w.broken):
        if s.delete == ANSWERED:
            yield Violation(GUARANTEE)
        yield s


def sends_lookup(s: State, _: World) -> Iterator[State]:
    """A verify is sent to a server."""
    if s.client.lookup is None:
        yield with_client(s, lookup=Lookup(late=s.delete == ANSWERED))


def verifies_at_once(s: State, w: World) -> Iterator[State | Violation]:
    """A verify is sent and returns VALID: all four steps in one."""
    for sent in sends_lookup(s, w):
        for answered in answers_valid(sent, w):
            yield from takes_answer(answered, w)


def joins_lookup(s: State, w: World) -> Iterator[State]:
    """A verify that begins after Delete's answer, under a live lease, shares an earlier one (rule
    4)."""
    lookup = s.client.lookup
    if lookup is None or lookup.joined or s.delete != ANSWERED:
        return
    live = s.client.lease or "5 client shares without a lease" in w.broken
    if live and not lookup.stale:
        yield with_client(s, lookup=lookup._replace(joined=True))


def takes_answer(s: State, w: World) -> Iterator[State | Violation]:
    """VALID returns to its own call, and if rule 4 allows it, to other calls and the cache."""
    client, lookup = s.client, s.client.lookup
    if lookup is None or not lookup.valid:
        return
    # It was read at revision 0, and 1 names the token. A new client knows no revision.
    admitted = client.applied == 0 or "4 client has no fill rule" in w.broken
    if "4 verdict carries the revision at its sending" in w.broken:
        # The slow server has applied more changes by then, and returns the later revision instead.
        admitted = any(server.applied >= client.applied >= 0 for server in s.servers)
    shared = w.broken & {
        "4 client shares without a check",
        "4 client shares by the time of sending",
    }
    if lookup.late or (lookup.joined and (admitted or shared)):
        yield Violation(GUARANTEE)
    yield with_client(s, lookup=None, cache=client.cache or admitted)


def loses_lookup(s: State, _: World) -> Iterator[State]:
    """The verify is lost, rejected, or answered DELETED."""
    if s.client.lookup is not None:
        yield with_client(s, lookup=None)


# ---- Time ----


def time_passes(s: State, w: World) -> Iterator[State]:
    """A tick passes."""
    clocks, client = w.clocks, s.client
    for moves in clocks.server:
        servers = tuple(
            server._replace(
                lease=max(server.lease - moves, 0),
                quiet=max(server.quiet - 1, 0),
                sub_lease=max(server.sub_lease - moves, 0),
                # Without a sub-lease there is no record. The client confirms again with its next
                # request.
                heard=server.heard and server.sub_lease > moves,
            )
            for server in s.servers
        )
        yield State(
            max(s.delete - clocks.delete, 0) if s.delete > 0 else s.delete,
            servers,
            client._replace(
                lease=max(client.lease - clocks.client, 0),
                # Ages beyond the longest grant make no difference.
                requests=tuple(
                    request._replace(age=min(request.age + clocks.client, clocks.lease))
                    for request in client.requests
                ),
            ),
        )


DELETE = (deletes, answers_by_acknowledgement, answers_by_waiting)
STREAM = (renews, grants, connects, asks, stream_breaks, receives)
VERIFY = (
    answers_valid,
    answers_from_memory,
    sends_lookup,
    takes_answer,
    loses_lookup,
    joins_lookup,
)
# The actions of normal operation, which must be enough for Delete to end by acknowledgement.
HEALTHY = (renews, grants, connects, asks, receives, answers_by_acknowledgement)
LIVES = (removes_row, begins_to_register, registers, dies)


def one_server(*broken: str, clocks: Clocks = STEADY, requests_max: int = 1) -> Model:
    """Return the model of a server that may lose its row or die, and of successive clients."""
    world = World(frozenset(broken), clocks, requests_max, (0,), (0,), may_shut_down=False)
    actions = (*DELETE, *STREAM, *VERIFY, *LIVES, restarts, time_passes)
    return Model(State(BEFORE, (Server(),), Client()), actions, world, NAMES)


def two_servers(*broken: str, clocks: Clocks = STEADY, requests_max: int = 1) -> Model:
    """Return the model of two servers, and a client that watches one and verifies through both."""
    world = World(frozenset(broken), clocks, requests_max, (), (), may_shut_down=False)
    actions = (*DELETE, *STREAM, *VERIFY, time_passes)
    return Model(State(BEFORE, (Server(), Server()), Client()), actions, world, NAMES)


def succession(*broken: str, clocks: Clocks = STEADY, requests_max: int = 1) -> Model:
    """Return the model of a server that dies or shuts down, and one that takes over its clients.

    Other models cover slow answers.
    """
    world = World(frozenset(broken), clocks, requests_max, (1,), (0,), may_shut_down=True)
    verify = (verifies_at_once, answers_from_memory)
    actions = (*DELETE, *STREAM, *verify, *LIVES, shuts_down, removes_own_row, time_passes)
    servers = (Server(), Server(phase=DOWN, row=NO_ROW))
    return Model(State(BEFORE, servers, Client()), actions, world, NAMES)

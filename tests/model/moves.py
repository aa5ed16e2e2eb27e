"""A client that moves between two servers whose histories may differ, and one Delete.

Rules 4, 6, 7 and 12. The model begins after a failover: the old primary is deposed, still running,
and shows a change `o` that no other database has. The new primary commits. Each server may read the
log of either primary, and renews with the new one. The client keeps a stream to one server or to
both, verifies through either, and holds VALID under a sub-lease. Messages may be delayed for any
time in both directions; a stream may break at any time and lose its messages.

Positions are strings, as in histories.py: the beginning of a log. histories.py models the exchange
between a server and a database. Here, a server may answer VALID whenever its lease is live and it
has not applied the deletion.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.explore import Action, Model, Violation
from tests.model.moves_state import (
    ACKNOWLEDGED,
    ANSWERED,
    BEFORE,
    BEHIND,
    BOUND,
    FRESH,
    GRANT,
    GUARANTEE,
    INBOX_MAX,
    INVALIDATION,
    NAMES,
    NO_DEBT,
    NO_ROW,
    OLD_LOG,
    RESET,
    UNASKED,
    UNHEARD,
    UNREGISTERED,
    VOID,
    Client,
    Lookup,
    Message,
    Say,
    Server,
    State,
    Stream,
    World,
    indebted,
    is_over,
    lost,
    may_say_valid,
    put_server,
    settled,
    unasked,
    with_server,
)


def model(
    *broken: str,
    ticks: int = 1,
    servers: int = 2,
    first: State | None = None,
    streams_max: int = 1,
    others: str = "",
    slow_answers: bool = False,
    bounded: bool = False,
    renew: tuple[int, ...] = (0, 1),
    old: tuple[int, ...] = (0, 1),
) -> Model:
    """Return the model, with the rules named in `broken` broken."""
    world = World(frozenset(broken), ticks, streams_max, others, slow_answers, bounded, renew, old)
    actions = (*ACTIONS, *(SLOW_ANSWERS if slow_answers else (verifies_at_once,)))
    first = first or State("", BEFORE, (Server(lease=ticks),) * servers, Client())
    return Model(first, actions, world, NAMES, is_over)


def deletes(s: State, w: World) -> Iterator[State]:
    """Delete commits, and begins to wait (rule 8)."""
    if s.delete == BEFORE:
        yield s._replace(log=s.log + "N", delete=w.ticks)


def changes_another(s: State, w: World) -> Iterator[State]:
    """A change to another token commits (rule 1)."""
    if w.others and w.others not in s.log:
        yield s._replace(log=s.log + w.others)


def answers_by_acknowledgement(s: State, _: World) -> Iterator[State]:
    """Delete answers: every existing row has acknowledged its revision (rule 8)."""
    if s.delete >= 0 and not any(server.row == BEHIND for server in s.servers):
        yield s._replace(delete=ANSWERED)


def answers_by_waiting(s: State, _: World) -> Iterator[State]:
    """Delete answers: T has passed since its commit (rule 8)."""
    if s.delete == 0:
        yield s._replace(delete=ANSWERED)


def removes_row(s: State, _: World) -> Iterator[State]:
    """A watcher that has seen a row for T without a renewal removes it (rule 9).

    The model allows that as soon as the row's lease has ended.
    """
    for i, server in enumerate(s.servers):
        if server.row != NO_ROW and not server.lease and not server.sub_lease:
            yield with_server(s, i, row=NO_ROW)


# ---- The servers and their rows ----


def registers(s: State, w: World) -> Iterator[State]:
    """A server registers (rule 2); it acknowledges head only if no grant runs (rule 12)."""
    for i, server in enumerate(s.servers):
        if server.applied is UNREGISTERED and i in w.renew:
            careless = "12 registration acknowledges head while a grant runs" in w.broken
            behind = "N" not in s.log or (server.sub_lease and not careless)
            row = BEHIND if behind else ACKNOWLEDGED
            after = server._replace(applied=s.log, row=row)
            stream = after.stream
            if stream is not None and "12 clients of a lost history are not reset" in w.broken:
                after = after._replace(stream=stream._replace(sent=s.log))
            yield put_server(s, i, indebted(after, w))


def renews(s: State, w: World) -> Iterator[State]:
    """A server renews: checks, acknowledges, reads the log, all in one statement (rules 3, 7)."""
    for i, server in enumerate(s.servers):
        if server.applied is UNREGISTERED or i not in w.renew:
            continue
        if server.row == NO_ROW or not s.log.startswith(server.applied):
            yield lost(s, i, w)
            continue
        row = server.row
        number = len(server.confirmed or "") if server.sub_lease else len(server.applied)
        if "N" in server.applied and number > server.applied.find("N"):
            row = ACKNOWLEDGED
        after = server._replace(applied=s.log, lease=w.ticks, stands=s.log, row=row)
        yield put_server(s, i, indebted(after, w))


def reads_log(s: State, w: World) -> Iterator[State]:
    """A server reads only the log, from either primary, which gives no lease (rules 10, 12)."""
    for i, server in enumerate(s.servers):
        if server.applied is UNREGISTERED:
            continue
        for log in (OLD_LOG,) * (i in w.old) + (s.log,) * (i in w.renew):
            if not log.startswith(server.applied):
                yield lost(s, i, w)
            elif log != server.applied:
                after = indebted(server._replace(applied=log), w)
                yield put_server(s, i, after)


# ---- The servers and their streams ----


def hears(s: State, w: World) -> Iterator[State]:
    """A server receives the client's message: it confirms only the server's own history (rules 7,
    12)."""
    for i, server in enumerate(s.servers):
        stream = server.stream
        if stream is None or not stream.out or server.applied is UNREGISTERED:
            continue
        (said, asks), *rest = stream.out
        heard = stream._replace(out=tuple(rest), wanted=stream.wanted or asks)
        sent, confirmed = heard.sent, server.confirmed
        if sent is UNHEARD:
            # On another history, new, or ahead of a lagging server: a Reset comes next.
            known = said is not FRESH and server.applied.startswith(said)
            sent = said if known else VOID
            confirmed = said if known else confirmed
        else:
            # A position that this server never sent confirms nothing, and withdraws earlier
            # confirmations.
            confirmed = said if said is not FRESH and sent.startswith(said) else None
        if said is not FRESH and "12 a client's revision is accepted without its mark" in w.broken:
            number = min(len(said), len(server.applied if sent in {UNHEARD, VOID} else sent))
            confirmed = server.applied[:number]
            sent = confirmed if heard.sent is UNHEARD else sent
        after = server._replace(stream=heard._replace(sent=sent), confirmed=confirmed)
        yield put_server(s, i, settled(server, after, w))


def sends(s: State, w: World) -> Iterator[State]:
    """A server sends what the client lacks: an invalidation, or a Reset (rules 6 and 12)."""
    for i, server in enumerate(s.servers):
        stream, applied = server.stream, server.applied
        if stream is None or stream.sent is UNHEARD or applied in {UNREGISTERED, stream.sent}:
            continue
        if len(stream.inbox) == INBOX_MAX:
            continue
        kind = INVALIDATION if applied.startswith(stream.sent) else RESET
        names = kind == INVALIDATION and "N" in applied[len(stream.sent) :]
        inbox = (*stream.inbox, Message(kind, applied, names))
        confirmed = server.confirmed if kind == INVALIDATION else None
        yield with_server(
            s, i, stream=stream._replace(inbox=inbox, sent=applied), confirmed=confirmed
        )


def grants(s: State, w: World) -> Iterator[State | Violation]:
    """A server grants a sub-lease to a client that has confirmed the renewal's log (rules 6, 7)."""
    for i, server in enumerate(s.servers):
        stream = server.stream
        if stream is None or not stream.wanted or not server.lease:
            continue
        if len(stream.inbox) == INBOX_MAX or stream.sent in {UNHEARD, VOID}:
            continue
        owes = server.confirmed is None or not server.confirmed.startswith(server.stands)
        if "6 granted while applied changes are unsent" in w.broken:
            owes = server.confirmed != stream.sent
        elif "7 granted while a confirmation is due" in w.broken:
            owes = stream.sent != server.applied
        if owes:
            continue
        if server.debt == 0:
            yield Violation(BOUND)
        inbox = (*stream.inbox, Message(GRANT, stream.sent, duration=server.lease))
        yield with_server(
            s,
            i,
            sub_lease=max(server.sub_lease, server.lease),
            stream=stream._replace(inbox=inbox, wanted=False),
        )


# ---- The client: its streams and its lease ----


def connects(s: State, w: World) -> Iterator[State]:
    """The client opens a stream, sends its applied position, and asks for a lease (rule 6)."""
    if sum(server.stream is not None for server in s.servers) >= w.streams_max:
        return
    for i, server in enumerate(s.servers):
        if server.stream is None:
            sent: str | None = UNHEARD
            if "12 events sent before the client's first message" in w.broken:
                sent = server.applied or VOID
            first = Say(s.client.applied, asks=True)
            yield with_server(s, i, stream=Stream((first,), sent=sent, asked=0))


def says(s: State, _: World) -> Iterator[State]:
    """The client confirms what it has applied, or requests a longer lease (rules 6, 7)."""
    for i, server in enumerate(s.servers):
        stream = server.stream
        if stream is None or stream.out or not (stream.owes or stream.asked == UNASKED):
            continue
        asks = stream.asked == UNASKED
        said = Say(s.client.applied, asks)
        asked = 0 if asks else stream.asked
        yield with_server(s, i, stream=stream._replace(out=(said,), owes=False, asked=asked))


def receives(s: State, w: World) -> Iterator[State]:
    """The client receives the next message: it applies it, or extends its lease (rule 6)."""
    for i, server in enumerate(s.servers):
        stream = server.stream
        if stream is None or not stream.inbox:
            continue
        message, *rest = stream.inbox
        stream = stream._replace(inbox=tuple(rest))
        if message.kind == GRANT:
            yield from receives_grant(with_server(s, i, stream=stream), i, message)
            continue
        stream = stream._replace(owes=True)
        if message.kind == RESET:
            yield reset(with_server(s, i, stream=stream), i, message.position, w)
            continue
        client = s.client
        before = client.applied or ""
        # A message that another stream has already delivered does not move the client back.
        ahead = before.startswith(message.position)
        yield with_server(s, i, stream=stream)._replace(
            client=client._replace(
                applied=client.applied if ahead else message.position,
                cache=client.cache and not message.names,
            )
        )


def receives_grant(s: State, i: int, grant: Message) -> Iterator[State]:
    """The lease runs from before the request was sent, and the other stream is closed (rule 6)."""
    stream = s.servers[i].stream
    assert stream is not None
    if stream.asked == UNASKED:
        yield s
        return
    lease = grant.duration - stream.asked
    s = with_server(s, i, stream=stream._replace(asked=UNASKED))
    if lease <= 0:
        yield s
        return
    s = s._replace(client=s.client._replace(lease=lease))
    for j, other in enumerate(s.servers):
        if j != i and other.stream is not None:
            s = with_server(s, j, stream=None)
            # That server is informed that its grants are over.
            yield with_server(s, j, sub_lease=0, confirmed=None, debt=NO_DEBT)
    yield s


def reset(s: State, i: int, position: str, w: World) -> State:
    """A Reset empties the cache and ends lease, open requests and other streams (rule 12)."""
    stream = s.servers[i].stream
    assert stream is not None
    lease = s.client.lease if "12 a Reset does not end the lease" in w.broken else 0
    s = s._replace(client=s.client._replace(applied=position, cache=False, lease=lease))
    counts = "12 a grant requested before a Reset counts" in w.broken
    s = with_server(s, i, stream=stream if counts else unasked(stream))
    for j, other in enumerate(s.servers):
        if j != i and other.stream is not None:
            rest = unasked(other.stream) if "12 other streams continue" in w.broken else None
            s = with_server(s, j, stream=other.stream if counts else rest)
    return s


def stream_breaks(s: State, _: World) -> Iterator[State]:
    """A stream breaks: its messages are lost, and its grants remain."""
    for i, server in enumerate(s.servers):
        if server.stream is not None:
            yield with_server(s, i, stream=None)


# ---- The client: its answers ----


def answers_from_memory(s: State, _: World) -> Iterator[State | Violation]:
    """A verify answers VALID from the client's cache, under its lease (rule 5)."""
    if s.client.cache and s.client.lease:
        if s.delete == ANSWERED:
            yield Violation(GUARANTEE)
        yield s


def sends_lookup(s: State, _: World) -> Iterator[State]:
    """A verify is sent to a server."""
    if s.client.lookup is None:
        lookup = Lookup(late=s.delete == ANSWERED)
        yield s._replace(client=s.client._replace(lookup=lookup))


def answers_valid(s: State, _: World) -> Iterator[State]:
    """A server answers VALID under its lease, with the position applied (rule 5)."""
    lookup = s.client.lookup
    if lookup is None or lookup.read is not None:
        return
    for server in s.servers:
        if may_say_valid(server):
            answered = lookup._replace(read=server.applied)
            yield s._replace(client=s.client._replace(lookup=answered))


def takes_answer(s: State, w: World) -> Iterator[State | Violation]:
    """VALID returns to its call, and if its position is known, to cache and others (rule 4)."""
    client, lookup = s.client, s.client.lookup
    if lookup is None or lookup.read is None:
        return
    kept = client.applied is not FRESH and client.applied.startswith(lookup.read)
    kept = kept and "N" not in (client.applied or "")[len(lookup.read) :]
    if "12 a client caches a verdict of any later revision" in w.broken:
        kept = kept or len(lookup.read) >= len(client.applied or "")
    if "12 a client caches a verdict of an unknown position" in w.broken:
        kept = kept or not (client.applied or "").startswith(lookup.read)
    if lookup.late or (lookup.joined and kept):
        yield Violation(GUARANTEE)
    yield s._replace(client=client._replace(lookup=None, cache=client.cache or kept))


def verifies_at_once(s: State, w: World) -> Iterator[State | Violation]:
    """A verify is sent and returns VALID, in one step."""
    for sent in sends_lookup(s, w):
        for answered in answers_valid(sent, w):
            yield from takes_answer(answered, w)


def joins_lookup(s: State, _: World) -> Iterator[State]:
    """A verify that begins after Delete's answer, under a live lease, shares an earlier one (rule
    4)."""
    lookup = s.client.lookup
    if lookup and not lookup.joined and not lookup.late and s.delete == ANSWERED and s.client.lease:
        yield s._replace(client=s.client._replace(lookup=lookup._replace(joined=True)))


def loses_lookup(s: State, _: World) -> Iterator[State]:
    """The verify is lost, rejected, or answered DELETED."""
    if s.client.lookup is not None:
        yield s._replace(client=s.client._replace(lookup=None))


# ---- Time ----


def time_passes(s: State, w: World) -> Iterator[State | Violation]:
    """A tick passes."""
    servers = []
    for server in s.servers:
        stream, sub_lease = server.stream, max(server.sub_lease - 1, 0)
        if stream is not None and stream.asked >= 0:
            stream = stream._replace(asked=min(stream.asked + 1, w.ticks))
        lease = max(server.lease - 1, 0)
        after = server._replace(
            lease=lease,
            stands=server.stands if lease else "",
            sub_lease=sub_lease,
            confirmed=server.confirmed if sub_lease or stream else None,
            debt=max(server.debt - 1, 0) if server.debt != NO_DEBT else NO_DEBT,
            stream=stream,
        )
        servers.append(after)
        if after.debt == 0 and after.sub_lease:
            yield Violation(BOUND)
    yield s._replace(
        delete=s.delete - (s.delete > 0),
        servers=tuple(servers),
        client=s.client._replace(lease=max(s.client.lease - 1, 0)),
    )


ACTIONS: tuple[Action, ...] = (
    deletes,
    changes_another,
    answers_by_acknowledgement,
    answers_by_waiting,
    removes_row,
    registers,
    renews,
    reads_log,
    hears,
    sends,
    grants,
    connects,
    says,
    receives,
    stream_breaks,
    answers_from_memory,
    time_passes,
)
SLOW_ANSWERS: tuple[Action, ...] = (
    sends_lookup,
    answers_valid,
    takes_answer,
    joins_lookup,
    loses_lookup,
)

"""The state of moves.py: servers, a client, its streams, and the initial states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.model.explore import replaced_quickly

OLD_LOG = "o"
# A row: missing; has not acknowledged the deletion; has acknowledged it.
NO_ROW, BEHIND, ACKNOWLEDGED = range(3)
BEFORE, ANSWERED = -1, -2  # Delete; in between, the ticks still to wait
UNREGISTERED = FRESH = None
# What a server has sent on a stream: nothing, because it has not received the client's position; or
# messages that no longer count, so that a Reset comes next.
UNHEARD, VOID = None, "?"
UNASKED = -1
NO_DEBT = -1
INVALIDATION, RESET, GRANT = "invalidation", "reset", "grant"

GUARANTEE = "Delete had answered before this verify began, and it answers VALID"
BOUND = "a client that confirms nothing delays a server's acknowledgement for more than T"


class Say(NamedTuple):
    """A message from the client on a stream."""

    applied: str | None
    asks: bool  # for a grant


class Message(NamedTuple):
    """A message from a server on a stream."""

    kind: str
    position: str
    names: bool = False  # the token is among what changed since the last message
    duration: int = 0  # of a grant


@replaced_quickly
class Stream(NamedTuple):
    """The client's stream to a server; the client alone knows the last three fields."""

    out: tuple[Say, ...] = ()  # in transit to the server
    inbox: tuple[Message, ...] = ()  # in transit to the client
    sent: str | None = UNHEARD
    wanted: bool = False  # the server owes a grant
    asked: int = UNASKED  # age of the request that the client has no grant for yet
    owes: bool = False  # the client has applied something that it has not confirmed yet


@replaced_quickly
class Server(NamedTuple):
    """A server, its row, and its record of the client."""

    applied: str | None = ""
    lease: int = 0
    stands: str = ""  # the end of the log in the renewal that gave the lease
    row: int = BEHIND
    sub_lease: int = 0  # the rest of the client's, as far as this server knows
    confirmed: str | None = None  # what the client has confirmed
    debt: int = NO_DEBT  # ticks within which the client must confirm, or its lease ends
    stream: Stream | None = None


class Lookup(NamedTuple):
    """A verify sent to some server."""

    read: str | None = None  # the server's position when it answered VALID
    late: bool = False  # Delete had answered before it was sent
    joined: bool = False  # a verify that began after Delete's answer shares it


@replaced_quickly
class Client(NamedTuple):
    """The client's cache and lease."""

    applied: str | None = FRESH
    cache: bool = False  # holds VALID
    lease: int = 0
    lookup: Lookup | None = None


@replaced_quickly
class State(NamedTuple):
    """The complete state at one instant."""

    log: str  # of the new primary
    delete: int
    servers: tuple[Server, ...]
    client: Client


@dataclass(frozen=True)
class World:
    """The parameters of a run."""

    broken: frozenset[str]
    ticks: int
    streams_max: int
    others: str  # changes of another token on the new primary
    slow_answers: bool
    bounded: bool  # whether debts are modelled
    renew: tuple[int, ...]  # servers that reach the new primary; the others only read the old one
    old: tuple[int, ...]  # servers that may read the old primary


def with_server(s: State, i: int, **changes: Any) -> State:
    """Return `s` with server i changed."""
    servers = s.servers
    return s._replace(servers=(*servers[:i], servers[i]._replace(**changes), *servers[i + 1 :]))


def put_server(s: State, i: int, server: Server) -> State:
    """Return `s` with `server` as server i."""
    return s._replace(servers=(*s.servers[:i], server, *s.servers[i + 1 :]))


def unasked(stream: Stream) -> Stream:
    """Return `stream` without its request for a grant, and without the grant that answers it.

    Requests have numbers, so the client ignores such a grant. The server's record of it only makes
    Delete wait.
    """
    return stream._replace(
        out=tuple(said._replace(asks=False) for said in stream.out),
        inbox=tuple(message for message in stream.inbox if message.kind != GRANT),
        wanted=False,
        asked=UNASKED,
    )


def may_say_valid(server: Server) -> bool:
    """Return whether a server may answer VALID to a verify that begins now (rule 5)."""
    return server.lease > 0 and server.applied is not None and "N" not in server.applied


def lost(s: State, i: int, w: World) -> State:
    """Return `s` with server i's row or history lost: no lease, nothing confirmed (rule 12)."""
    server = s.servers[i]
    stream, confirmed = server.stream, None
    if stream is not None and stream.sent is not UNHEARD:
        stream = stream._replace(sent=VOID)
    if "12 confirmations of a lost history count" in w.broken:
        confirmed = server.confirmed
    return with_server(
        s, i, applied=UNREGISTERED, lease=0, stands="", confirmed=confirmed, stream=stream
    )


def indebted(server: Server, w: World) -> Server:
    """Return `server` after it applied a change, with the confirmation that the client now owes."""
    if (
        w.bounded
        and server.debt == NO_DEBT
        and server.stream is not None
        and server.confirmed != server.applied
    ):
        return server._replace(debt=w.ticks)
    return server


def settled(before: Server, after: Server, w: World) -> Server:
    """Return `after`, which has received the client's message, with the confirmations that the
    client still owes.
    """
    if after.confirmed == after.applied:
        return after._replace(debt=NO_DEBT)
    return (
        after._replace(debt=w.ticks) if w.bounded and after.confirmed != before.confirmed else after
    )


INBOX_MAX = 2
# The client watches A, which has renewed since the deletion. B still reads the old primary; one of
# two ticks remains of its last lease, as of Delete's wait.
SCATTERED = State(
    log="N",
    delete=1,
    servers=(
        Server("N", 2, "N", ACKNOWLEDGED, 2, "N", stream=Stream(sent="N")),
        Server("o", 1),
    ),
    client=Client("N", lease=2),
)
# The same, but another change has followed, and A's invalidation is on its way.
OVERTAKEN = SCATTERED._replace(
    log="Nn",
    servers=(
        Server(
            "Nn",
            2,
            "Nn",
            ACKNOWLEDGED,
            2,
            "N",
            stream=Stream(inbox=(Message(INVALIDATION, "Nn"),), sent="Nn"),
        ),
        SCATTERED.servers[1],
    ),
)
# A client of B has returned. The history of A's database has another change at its position.
RETURNING = State(
    log="N",
    delete=1,
    servers=(Server("N", 2, "N", ACKNOWLEDGED),),
    client=Client("o", cache=True),
)


def is_over(s: State) -> bool:
    """Return whether Delete has answered, and no cache holds VALID or can hold it again.

    A server whose lease is live has applied the deletion by then (histories.py; answers_valid looks
    for one that has not). So VALID cannot return to the cache.
    """
    return (
        s.delete == ANSWERED
        and not s.client.cache
        and s.client.lookup is None
        and not any(map(may_say_valid, s.servers))
    )


NAMES: Mapping[str, Mapping[Any, str]] = {
    "row": {NO_ROW: "none"},
    "delete": {BEFORE: "not begun", ANSWERED: "answered"},
    "applied": {None: "nothing known", "": "nothing"},
    "confirmed": {None: "nothing known", "": "nothing"},
    "sent": {UNHEARD: "not heard yet", VOID: "void", "": "nothing"},
    "stands": {"": "nothing"},
    "position": {"": "nothing"},
    "read": {None: "not yet", "": "nothing"},
    "asked": {UNASKED: "not asked"},
    "debt": {NO_DEBT: "none"},
    "stream": {None: "none"},
}

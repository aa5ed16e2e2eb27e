"""The states of the model in watch.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.model.explore import replaced_quickly

# Delete. Positive numbers are the rest of the wait.
BEFORE, ANSWERED = -1, -2
# A server. EMPTY is up, but registered after the deletion, so it cannot answer VALID.
DOWN, REGISTERING, EMPTY, UP, DRAINING = range(5)
NO_ROW = -1
# The client.
NOWHERE = -1
FRESH = -1  # has applied nothing, so its cache is empty
# Messages on the stream to the client, named as in the contract. A positive number is a grant of
# that duration.
RESET, INVALIDATION, CLOSING = 0, -1, -2

GUARANTEE = "Delete had answered before this verify began, and it answers VALID"


@replaced_quickly
class Server(NamedTuple):
    """A server process and its row."""

    phase: int = UP
    applied: int = 0  # while registering: the head that the registration has read
    lease: int = 0  # the rest of it
    row: int = 0  # acknowledged_revision
    quiet: int = 0  # ticks until the row has gone unrenewed for T, as others see it
    sub_lease: int = 0  # the rest of the client's sub-lease, according to this server's record
    heard: bool = False  # that client has confirmed that it has applied the deletion


class Request(NamedTuple):
    """A client's message on its stream: requests a lease, and confirms."""

    age: int  # since before it was sent, on the client's clock
    applied: int
    first: bool = False  # on its stream


class Lookup(NamedTuple):
    """A verify sent to some server."""

    valid: bool = False  # answered VALID, at revision 0; the answer is in transit
    late: bool = False  # Delete had answered before it was sent
    joined: bool = False  # a verify that began after Delete's answer shares it
    stale: bool = False  # the deletion was applied since; kept only where rule 4 is misread


@replaced_quickly
class Client(NamedTuple):
    """A client, its stream, and its cache."""

    applied: int = FRESH
    cache: bool = False  # holds VALID
    lease: int = 0  # the rest of the longest sub-lease
    stream: int = NOWHERE  # the server that it watches
    requests: tuple[Request, ...] = ()  # those without a grant so far, oldest first
    inbox: tuple[int, ...] = ()  # messages in transit, in order
    lookup: Lookup | None = None


@replaced_quickly
class State(NamedTuple):
    """The complete state at one instant."""

    delete: int
    servers: tuple[Server, ...]
    client: Client


@dataclass(frozen=True)
class Clocks:
    """The length of each period, and the advance of each clock in one tick of true time.

    A countdown uses the units of its owner's clock. Without drift a unit is a tick. With drift, an
    accurate clock moves by 4 in a tick, a slow one by 2 and a fast one by 6: ρ is a half, five
    hundred times the assumed value, so that three ticks are enough to show an effect. A server's
    clock may be slow or fast in each tick. The client's is slow, which prolongs its lease the most;
    Delete's is fast, which shortens its wait the most.
    """

    ticks: int = 2  # T in true time: the minimum for which a row is observed
    lease: int = 2  # T(1−ρ)
    wait: int = 2  # T(1+ρ)
    server: tuple[int, ...] = (1,)
    client: int = 1
    delete: int = 1
    counted_percent: int = 100  # of a grant, by the client: 1−ρ
    recorded_percent: int = 100  # of a grant, by the server: 1+2ρ
    shortest: int = 1  # the shortest grant that is tried, beside the longest


STEADY = Clocks()
# T is 12 units: three ticks of an accurate clock.
DRIFTING = Clocks(
    ticks=3,
    lease=6,
    wait=18,
    server=(2, 6),
    client=2,
    delete=6,
    counted_percent=50,
    recorded_percent=200,
    shortest=6,
)


@dataclass(frozen=True)
class World:
    """The parameters of a run."""

    broken: frozenset[str]
    clocks: Clocks
    requests_max: int
    may_start: tuple[int, ...]  # servers that may register
    may_end: tuple[int, ...]  # servers that may die, shut down, or lose their row
    may_shut_down: bool


def head(s: State) -> int:
    """Return the revision of the last committed change."""
    return int(s.delete != BEFORE)


def with_server(s: State, i: int, **changes: Any) -> State:
    """Return `s` with server i changed."""
    servers = s.servers
    return s._replace(servers=(*servers[:i], servers[i]._replace(**changes), *servers[i + 1 :]))


def with_client(s: State, **changes: Any) -> State:
    """Return `s` with the client changed."""
    return s._replace(client=s.client._replace(**changes))


def ended(s: State, i: int) -> State:
    """Return `s` with the client's stream to server i ended, if it has one."""
    if s.client.stream != i:
        return s
    return with_client(s, stream=NOWHERE, requests=(), inbox=())


NAMES = {
    "delete": {BEFORE: "not begun", ANSWERED: "answered"},
    "phase": {
        DOWN: "down",
        REGISTERING: "registering",
        EMPTY: "empty",
        UP: "up",
        DRAINING: "draining",
    },
    "row": {NO_ROW: "none"},
    "applied": {FRESH: "nothing"},
    "stream": {NOWHERE: "none", 0: "to A", 1: "to B"},
    "inbox": {RESET: "reset", INVALIDATION: "invalidation", CLOSING: "closing"}
    | {duration: f"grant of {duration}" for duration in range(1, 13)},
}

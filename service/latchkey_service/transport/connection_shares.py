"""Chooses the connections to end when there are too many. Pure; `connection_guard.py` ends them.

Idle connections end first, those with the longest silence before the others: their clients connect
again with their next call, and lose nothing. So clients that connect and then do nothing cannot
keep newcomers out. If no connection is idle, the newest end, as in a server that refuses
connections.

No peer address may have more than its share of a listener's connections. When the listener is full,
the address with the most connections loses one first.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

__all__ = ["IDLE_SECONDS", "EndReason", "Held", "busiest", "surplus"]

# From then on a connection counts as idle. Streams and busy clients send something every second or
# so; an attacker that sends as often still has only the share of its address.
IDLE_SECONDS: Final = 10.0

EndReason = Literal["address", "idle", "too_many"]


class Held(NamedTuple):
    """A connection of a listener. Sequences of them are ordered oldest first."""

    inode: int
    peer: str | None
    """The peer's address, or None if its connections have no common limit."""
    silent_seconds: float
    """The time since its client last sent anything."""


def surplus(connections: Sequence[Held], total_max: int, peer_max: int) -> dict[int, EndReason]:
    """Return the inodes of the connections to end, with the reasons. `peer_max` 0: no limit."""
    ended: dict[int, EndReason] = {}
    by_peer: dict[str | None, list[Held]] = {}
    for held in connections:
        by_peer.setdefault(held.peer, []).append(held)
    for peer, its in by_peer.items():
        if peer is not None and 0 < peer_max < len(its):
            order = _order(its)
            ended.update((held.inode, "address") for held in order[: len(its) - peer_max])
            by_peer[peer] = [held for held in its if held.inode not in ended]
    excess = len(connections) - len(ended) - total_max
    if excess > 0:
        ended.update(_largest_first(by_peer, excess))
    return ended


def busiest(connections: Sequence[Held]) -> int:
    """Return the number of connections of the address that has the most."""
    counts: dict[str, int] = {}
    for held in connections:
        if held.peer is not None:
            counts[held.peer] = counts.get(held.peer, 0) + 1
    return max(counts.values(), default=0)


def _largest_first(
    by_peer: Mapping[str | None, Sequence[Held]], excess: int
) -> dict[int, EndReason]:
    """Take `excess` connections, each from the address that has the most of them left."""
    kept = _level([len(its) for its in by_peer.values()], excess)
    candidates: list[Held] = []
    for its in by_peer.values():
        candidates += _order(its)[: max(0, len(its) - kept)]
    # Levelling may offer a few too many.
    candidates = _order(candidates)[:excess]
    return {
        held.inode: "idle" if held.silent_seconds >= IDLE_SECONDS else "too_many"
        for held in candidates
    }


def _level(counts: Sequence[int], excess: int) -> int:
    """Return the largest limit per address that makes the counts smaller by at least `excess`."""
    low, high = 0, max(counts)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(max(0, count - middle) for count in counts) >= excess:
            low = middle
        else:
            high = middle - 1
    return low


def _order(connections: Sequence[Held]) -> list[Held]:
    """Return the connections in the order in which they end: longest idle, then newest."""
    idle = [held for held in connections if held.silent_seconds >= IDLE_SECONDS]
    busy = [held for held in connections if held.silent_seconds < IDLE_SECONDS]
    return sorted(idle, key=lambda held: -held.silent_seconds) + busy[::-1]

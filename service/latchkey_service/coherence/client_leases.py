"""Tracks the clients that answer under this process's lease, and what they have confirmed (rule 7).

Pure. Streams and messages belong to `watch_sessions`. A client lease outlives its stream, because a
client that is cut off continues to answer under its last grant.
"""

import math

__all__ = ["ClientLease", "ClientLeases"]


class ClientLease:
    """The grants and confirmations of one stream's client."""

    __slots__ = ("client", "confirmed", "ends", "is_process")

    def __init__(self, client: str = "", *, is_process: bool = False) -> None:
        self.client = client
        """The caller's name and its address, for people."""
        self.is_process = is_process
        """Whether this is another process of this host. It answers for its own clients too."""
        self.confirmed = 0
        self.ends = -math.inf
        """The time, on this process's clock, at which it has certainly ended."""


class ClientLeases:
    """All client leases of a process that may be live.

    They are indexed by confirmed revision. There are thousands of leases but few distinct
    revisions, so the lowest one is found quickly.
    """

    __slots__ = ("_at", "outwaited", "pinned_until", "processes_outwaited")

    def __init__(self) -> None:
        self._at: dict[int, set[ClientLease]] = {}
        self.pinned_until = math.inf
        """When to call `floor` again at the latest, even if no client confirms anything before
        that.
        """
        self.outwaited = 0
        """How many leases of clients ended while a revision waited for them. Only rises."""
        self.processes_outwaited = 0
        """The same for the other processes of this host."""

    def grant(self, lease: ClientLease, confirmed: int, ends: float) -> None:
        """Record a grant until `ends`, before it is sent. Its client has confirmed everything that
        it was sent, up to the revision `confirmed`.
        """
        self._move(lease, confirmed)
        lease.ends = max(lease.ends, ends)

    def confirm(self, lease: ClientLease, revision: int) -> None:
        """Record that the client has dropped every token that was named up to `revision`.

        A `revision` of 0 means that nothing is known to be dropped.
        """
        if lease in self._at.get(lease.confirmed, ()):
            self._move(lease, revision)

    def unconfirm(self) -> None:
        """Discard all confirmations, because they were about another history."""
        for revision in [r for r in self._at if r]:
            for lease in tuple(self._at[revision]):
                self._move(lease, 0)

    def release(self, lease: ClientLease) -> None:
        """Remove a lease that its client has released."""
        self._remove(lease)
        lease.ends = -math.inf

    def floor(
        self, now: float, behind_since: float = math.inf, applied: float = math.inf
    ) -> int | None:
        """Return the revision that every client has confirmed, or None if no client has a lease.

        `behind_since` is the time since which a revision up to `applied` has been waiting for
        clients. If a lease ends later than that, and its client has not confirmed the revision, it
        counts as outwaited.
        """
        self.pinned_until = math.inf
        while self._at:
            lowest = min(self._at)
            # With one live lease, this is the lowest revision.
            lease = next(iter(self._at[lowest]))
            if lease.ends > now:
                self.pinned_until = lease.ends
                return lowest
            self._end(lease, behind_since, applied)
        return None

    def sweep(self, now: float, behind_since: float = math.inf, applied: float = math.inf) -> None:
        """Remove all leases that have ended, and count those that were outwaited.

        `floor` removes only the leases that affect its result.
        """
        for held in tuple(self._at.values()):
            for lease in [lease for lease in held if lease.ends <= now]:
                self._end(lease, behind_since, applied)

    def count_confirmed(self, revision: int, now: float) -> int:
        """Return how many clients with a lease have confirmed `revision`."""
        return sum(
            lease.ends > now and not lease.is_process
            for acknowledged, held in self._at.items()
            if acknowledged >= revision
            for lease in held
        )

    def count_processes(self, now: float) -> int:
        """Return how many other processes of this host have a lease."""
        return sum(
            lease.ends > now and lease.is_process for held in self._at.values() for lease in held
        )

    def behind(self, revision: int, now: float, limit: int) -> list[str]:
        """Return up to `limit` clients with a lease that have not confirmed `revision`."""
        found: list[str] = []
        for acknowledged in sorted(self._at):
            if acknowledged >= revision:
                break
            found += [lease.client for lease in self._at[acknowledged] if lease.ends > now]
            if len(found) >= limit:
                break
        return sorted(found[:limit])

    def count_behind(self, revision: int, now: float) -> int:
        """Return how many clients with a lease have not confirmed `revision`."""
        return sum(
            lease.ends > now and not lease.is_process
            for acknowledged, held in self._at.items()
            if acknowledged < revision
            for lease in held
        )

    def latest_end(self, now: float) -> float:
        """Return when the last lease will have ended, or `now` if there is no lease."""
        return max((lease.ends for held in self._at.values() for lease in held), default=now)

    def _end(self, lease: ClientLease, behind_since: float, applied: float) -> None:
        if lease.ends > behind_since and lease.confirmed < applied:
            if lease.is_process:
                self.processes_outwaited += 1
            else:
                self.outwaited += 1
        self._remove(lease)

    def _move(self, lease: ClientLease, revision: int) -> None:
        self._remove(lease)
        lease.confirmed = revision
        self._at.setdefault(revision, set()).add(lease)

    def _remove(self, lease: ClientLease) -> None:
        held = self._at.get(lease.confirmed)
        if held is not None:
            held.discard(lease)
            if not held:
                del self._at[lease.confirmed]

"""The clients that answer under this process's lease, and what they have confirmed. Pure (rule 7).

A record outlives its client's stream: a client that is cut off answers on under its last grant.
"""

import math

__all__ = ["ClientLease", "ClientLeases"]


class ClientLease:
    """What one stream's client was granted, and what it has confirmed."""

    __slots__ = ("client", "confirmed", "ends")

    def __init__(self, client: str = "") -> None:
        self.client = client
        """Its caller's name and its address, for people."""
        self.confirmed = 0
        self.ends = -math.inf
        """When it has ended for certain, on this process's clock."""


class ClientLeases:
    """All sub-leases of a process that may be live.

    They are kept by what they have confirmed. There are thousands of them, but few revisions at
    which they stand, so that the lowest is found at once.
    """

    __slots__ = ("_at", "outwaited", "pinned_until")

    def __init__(self) -> None:
        self._at: dict[int, set[ClientLease]] = {}
        self.pinned_until = math.inf
        """When to ask for `floor` again, at the latest, if nothing is confirmed before."""
        self.outwaited = 0
        """How many ended while a revision waited for them. Only rises."""

    def grant(self, lease: ClientLease, confirmed: int, ends: float) -> None:
        """Its client is about to be granted until `ends`, having confirmed all it was sent.

        `confirmed` is the revision of that.
        """
        self._move(lease, confirmed)
        lease.ends = max(lease.ends, ends)

    def confirm(self, lease: ClientLease, revision: int) -> None:
        """Its client has dropped what revisions up to `revision` named. 0: it is not known what."""
        if lease in self._at.get(lease.confirmed, ()):
            self._move(lease, revision)

    def unconfirm(self) -> None:
        """Take back all that was confirmed: it was about another history."""
        for revision in [r for r in self._at if r]:
            for lease in tuple(self._at[revision]):
                self._move(lease, 0)

    def release(self, lease: ClientLease) -> None:
        """Its client has said that it no longer answers under it."""
        self._remove(lease)
        lease.ends = -math.inf

    def floor(
        self, now: float, behind_since: float = math.inf, applied: float = math.inf
    ) -> int | None:
        """Return the revision that every client has confirmed; None if no client has a lease.

        `behind_since` is since when some revision, up to `applied`, has been waiting for clients.
        The sub-leases that have ended later than that, without having confirmed it, count as waited
        out.
        """
        self.pinned_until = math.inf
        while self._at:
            lowest = min(self._at)
            # One that is live will do: the lowest is then what it is.
            lease = next(iter(self._at[lowest]))
            if lease.ends > now:
                self.pinned_until = lease.ends
                return lowest
            self._end(lease, behind_since, applied)
        return None

    def sweep(self, now: float, behind_since: float = math.inf, applied: float = math.inf) -> None:
        """Drop the sub-leases that have ended, and count as `floor` does, which drops only those
        that it has to."""
        for held in tuple(self._at.values()):
            for lease in [lease for lease in held if lease.ends <= now]:
                self._end(lease, behind_since, applied)

    def count_confirmed(self, revision: int, now: float) -> int:
        """Return how many clients with a lease have confirmed `revision`."""
        return sum(
            lease.ends > now
            for acknowledged, held in self._at.items()
            if acknowledged >= revision
            for lease in held
        )

    def behind(self, revision: int, now: float, limit: int) -> list[str]:
        """Return up to `limit` of the clients with a lease that have not confirmed `revision`."""
        found: list[str] = []
        for acknowledged in sorted(self._at):
            if acknowledged >= revision:
                break
            found += [lease.client for lease in self._at[acknowledged] if lease.ends > now]
            if len(found) >= limit:
                break
        return sorted(found[:limit])

    def latest_end(self, now: float) -> float:
        """Return when the last of them will have ended, `now` if there is none."""
        return max((lease.ends for held in self._at.values() for lease in held), default=now)

    def _end(self, lease: ClientLease, behind_since: float, applied: float) -> None:
        if lease.ends > behind_since and lease.confirmed < applied:
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

"""The state of this process as a verifier: its cache, its lease, its row (rules 2-5, 7, 12).

Pure, with the clock passed in. Owns the rules. `lease_renewer` runs the statements, `client_leases`
tracks the clients, and `reads` decides which reads to accept. A verify may be answered until
`lease_ends`, from the cache or from a read (rule 5).
"""

import math
from typing import Generic, TypeVar

from latchkey_coherence.lease import LEASE_SECONDS_MAX, outwait_seconds, server_lease_end
from latchkey_coherence.verdict_cache import NOWHERE, Entry, Position, VerdictCache

from latchkey_service.coherence.ack_rules import OUTWAIT_MARGIN_SECONDS
from latchkey_service.coherence.client_leases import ClientLeases
from latchkey_service.coherence.log import EVERY_TOKEN, Change, Log, Server
from latchkey_service.coherence.recent_log import RecentLog

__all__ = ["EVERY_TOKEN", "Change", "Log", "Server", "VerifierState"]

E = TypeVar("E", bound=Entry)

# Limit of clients that a status or a log line names: enough to see a pattern.
WAITED_FOR_MAX = 5


class VerifierState(Generic[E]):
    """This process as a verifier. Times are seconds on its own clock."""

    __slots__ = (
        "_behind_since",
        "acknowledged",
        "cache",
        "client_leases",
        "epoch",
        "lease_ends",
        "lease_seconds",
        "log_read_began",
        "recent",
        "registered",
        "rows_complete_at",
        "server",
    )

    def __init__(
        self, cache: VerdictCache[E], client_leases: ClientLeases, lease_seconds: float
    ) -> None:
        self.cache = cache
        self.client_leases = client_leases
        self.lease_seconds = lease_seconds
        self.recent = RecentLog(NOWHERE)
        """The log that was applied since the process registered."""
        self.lease_ends = -math.inf
        self.registered = False
        self.acknowledged = 0
        """The revision that the process's row acknowledges."""
        self.server = Server(None, None)
        """The server of the last renewal, on which the lease is valid."""
        self.rows_complete_at = -math.inf
        """The time from which the verifiers' rows are certain to be complete (rule 8). Infinite
        from the loss of a history to the next registration."""
        self.epoch = 0
        """Increases whenever the cache starts over. Clients of an earlier epoch must be reset."""
        # The time since which a revision has been waiting for clients; infinite if none is.
        self._behind_since = math.inf
        self.log_read_began = -math.inf
        """When the latest read of the log that was applied began."""

    def register(self, position: Position, acknowledged: int, server: Server, now: float) -> None:
        """Record that the process's row was committed while `position` was the newest (rule 2).

        This does not grant a lease. The first lease comes with a renewal, which reads the log after
        the row was committed.
        """
        if self.epoch:
            self._await_earlier_leases(now)
        self._start_over(position)
        self.recent.restart(position)
        self.acknowledged = acknowledged
        self.server = server
        self.registered = True

    def apply(self, log: Log, began: float) -> bool:
        """Apply a log that was read after `cache.position`. Return whether anything changed.

        `began` is the clock before the read, or before the question to the lead of the host. Only a
        log from a renewal may come from another server, because the renewal also moves the lease to
        that server.

        If the log belongs to another history, the process is no longer registered (`lose`). Another
        server or timeline of the same history empties the cache: changes that are not in the log,
        such as a Create that no standby had, may be lost in a failover (rule 12).
        """
        if not log.known:
            self.lose()
            return True
        self.log_read_began = min(began, log.read_began)
        if log.server != self.server:
            self._await_earlier_leases(began)
        if log.complete:
            for change in log.changes:
                self.recent.append(change)
        elif log.head != self.cache.position:
            # The other processes of the host start over at this position too.
            self.recent.append(Change(log.head, (EVERY_TOKEN,)))
        if not log.complete or log.server != self.server:
            self.server = log.server
            self._start_over(log.head)
            return True
        for change in log.changes:
            if EVERY_TOKEN in change.token_ids:
                self._start_over(change.position)
            else:
                self.cache.apply(change.position, change.token_ids)
        if log.changes:
            self._behind_since = min(self._behind_since, began)
        return bool(log.changes)

    def acknowledgeable(self, now: float) -> int:
        """Return the revision that this process and every client under its lease have applied (rule
        7)."""
        applied = self.cache.position.revision
        floor = self.client_leases.floor(now, self._behind_since, applied)
        if floor is None or floor >= applied:
            self._behind_since = math.inf
            return applied
        # After the cache has started over, revisions wait for clients although the log had no new
        # entries.
        self._behind_since = min(self._behind_since, now)
        return floor

    def sweep(self, now: float) -> None:
        """Remove client leases that have ended. `acknowledgeable` removes only the leases that
        affect its result.
        """
        self.client_leases.sweep(now, self._behind_since, self.cache.position.revision)

    def waiting_for(self, now: float) -> tuple[float, list[str]]:
        """Return how many seconds a revision has been waiting for clients, and for which
        clients.
        """
        if self._behind_since == math.inf:
            return 0.0, []
        applied = self.cache.position.revision
        return now - self._behind_since, self.client_leases.behind(applied, now, WAITED_FOR_MAX)

    def renew(self, began: float, acknowledged: int, ends: float = math.inf) -> None:
        """Extend the lease after a renewal whose log has been applied, to `ends` at most.

        `began` is the clock before the statement was sent (rule 3). `ends` is the end of the lease
        that another process of this host holds and shares.
        """
        extended = min(server_lease_end(began, self.lease_seconds), ends)
        self.lease_ends = max(self.lease_ends, extended)
        self.acknowledged = acknowledged

    def lose(self) -> None:
        """Give up lease and registration, because the row or its history is lost.

        The process answers no verify until it registers again. The lease ends at once, because its
        row or its history may no longer exist. Clients are reset, and their confirmations no longer
        count, but the ends of their leases still do.
        """
        self.registered = False
        self.lease_ends = -math.inf
        # The row may be committed, and others' missing, before `register` is called.
        self.rows_complete_at = math.inf
        self._start_over(NOWHERE)
        self.recent.restart(NOWHERE)

    def _await_earlier_leases(self, now: float) -> None:
        """Delay the confirmation of deletions until each lease of the earlier history has ended.

        Verifiers may still hold such leases although this history lacks their rows: they registered
        after the restored backup was made, or on a primary whose last commits were lost.
        """
        longest = outwait_seconds(LEASE_SECONDS_MAX)
        self.rows_complete_at = now + longest + OUTWAIT_MARGIN_SECONDS

    def _start_over(self, position: Position) -> None:
        self.cache.reset(position)
        self.client_leases.unconfirm()
        self.epoch += 1

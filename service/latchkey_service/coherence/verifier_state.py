"""This process as a verifier: its memory, its lease, its row. Pure (coherence rules 2-5, 7, 12).

A verify may be answered while `lease_ends` lies ahead, from memory or from a read (rule 5).
"""

import enum
import math
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from latchkey_coherence.lease import LEASE_SECONDS_MAX, outwait_seconds, server_lease_end
from latchkey_coherence.memory import NOWHERE, Entry, Memory, Position

from latchkey_service.coherence.ack_rules import OUTWAIT_MARGIN_SECONDS
from latchkey_service.coherence.client_leases import SubLeases
from latchkey_service.coherence.snapshot import Snapshot

__all__ = ["EVERY_TOKEN", "Change", "Log", "Membership", "ReadBegan", "Server", "Standing"]

E = TypeVar("E", bound=Entry)

# Clients named where people look: enough to see a pattern.
WAITED_FOR_MAX = 5


# Stands in the log for a change that names every token.
EVERY_TOKEN = ""


class Server(NamedTuple):
    """The Postgres server that a statement reached, as far as it reports that."""

    identifier: str | None
    """`system_identifier` of the cluster: copies and standbys share it."""
    timeline: str | None
    """Eight hexadecimal digits. Another one after each promotion."""


class Change(NamedTuple):
    """The tokens that one revision invalidated."""

    position: Position
    token_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Log:
    """The log after a position, from one snapshot on one server."""

    known: bool
    """Whether the server's history holds that position. False: there are no changes here."""
    server: Server
    head: Position
    changes: tuple[Change, ...]
    """Oldest first."""
    complete: bool = True
    """False: more tokens were named than a reader takes in."""


class ReadBegan(NamedTuple):
    """What had been applied when a read was sent."""

    applied: int
    epoch: int


class Standing(enum.Enum):
    """How the snapshot of a read relates to the history that the lease stands on (rule 12)."""

    BELIEVED = enum.auto()
    AHEAD = enum.auto()
    """Its revision was not applied yet: read the log first, then ask again."""
    REFUSED = enum.auto()
    """Another history, another server, or too old."""


class Membership(Generic[E]):
    """The state of this process as a verifier. Times are seconds on its own clock."""

    __slots__ = (
        "_behind_since",
        "acknowledged",
        "epoch",
        "lease_ends",
        "lease_seconds",
        "log_read_began",
        "memory",
        "registered",
        "server",
        "settles_at",
        "subleases",
    )

    def __init__(self, memory: Memory[E], subleases: SubLeases, lease_seconds: float) -> None:
        self.memory = memory
        self.subleases = subleases
        self.lease_seconds = lease_seconds
        self.lease_ends = -math.inf
        self.registered = False
        self.acknowledged = 0
        """The revision that its row acknowledges."""
        self.server = Server(None, None)
        """The server that the lease stands on."""
        self.settles_at = -math.inf
        """From when on the verifiers' rows are certain to be complete (rule 8).

        Infinite from the loss of a history to the next registration."""
        self.epoch = 0
        """Rises whenever the memory starts over. Clients of an earlier epoch have to be reset."""
        # Since when a revision has been waiting for clients. Infinite: none is waiting.
        self._behind_since = math.inf
        self.log_read_began = -math.inf
        """When the latest read of the log that was applied began."""

    def register(self, position: Position, acknowledged: int, server: Server, now: float) -> None:
        """Its row is committed, while `position` was the newest one (rule 2).

        That gives no lease. The first lease comes with a renewal, which reads the log after the row
        was committed.
        """
        if self.epoch:
            self._unsettle(now)
        self._start_over(position)
        self.acknowledged = acknowledged
        self.server = server
        self.registered = True

    def apply(self, log: Log, began: float) -> bool:
        """Apply a log that was read after `memory.position`; tell whether anything changed.

        `began` is the clock before the read. Only a log that came with a renewal may be of another
        server: the lease moves there with it. The history may prove to be another one: then this
        process is no longer registered (`lose`). Another server or timeline of the same history
        empties the memory: what is not in the log, such as a Create that no standby had, may be
        lost with a failover (rule 12).
        """
        if not log.known:
            self.lose()
            return True
        self.log_read_began = began
        if log.server != self.server:
            self._unsettle(began)
        if not log.complete or log.server != self.server:
            self.server = log.server
            self._start_over(log.head)
            return True
        for change in log.changes:
            if EVERY_TOKEN in change.token_ids:
                self._start_over(change.position)
            else:
                self.memory.apply(change.position, change.token_ids)
        if log.changes:
            self._behind_since = min(self._behind_since, began)
        return bool(log.changes)

    def begin_read(self) -> ReadBegan:
        """Return what `standing` has to know of the moment before a read is sent."""
        return ReadBegan(self.memory.position.revision, self.epoch)

    def standing(self, snapshot: Snapshot, began: ReadBegan) -> Standing:
        """Tell whether a read may be believed whose snapshot was taken where `snapshot` says.

        A snapshot from before what was applied when the read was sent comes from another server,
        such as a deposed primary: on the same one it cannot be. A read that was sent under the
        lease of an earlier epoch has lost its permission: that lease stood on another history.
        """
        if snapshot.timeline != self.server.timeline or began.epoch != self.epoch:
            return Standing.REFUSED
        position = snapshot.position
        if position.revision > self.memory.position.revision:
            return Standing.AHEAD
        if position.revision < began.applied or not self.memory.knows(position):
            return Standing.REFUSED
        return Standing.BELIEVED

    def acknowledgeable(self, now: float) -> int:
        """Return the revision up to which it and each client under its lease are done (rule 7)."""
        applied = self.memory.position.revision
        floor = self.subleases.floor(now, self._behind_since, applied)
        if floor is None or floor >= applied:
            self._behind_since = math.inf
            return applied
        # Where the memory has started over, they are waited for although nothing new was read.
        self._behind_since = min(self._behind_since, now)
        return floor

    def sweep(self, now: float) -> None:
        """Forget the clients whose leases have ended. `acknowledgeable` does so where it has to."""
        self.subleases.sweep(now, self._behind_since, self.memory.position.revision)

    def waiting_for(self, now: float) -> tuple[float, list[str]]:
        """Return for how many seconds a revision has waited for clients, and for which of them."""
        if self._behind_since == math.inf:
            return 0.0, []
        applied = self.memory.position.revision
        return now - self._behind_since, self.subleases.behind(applied, now, WAITED_FOR_MAX)

    def renew(self, began: float, acknowledged: int) -> None:
        """Its row was renewed by a statement that also read the log, which has been applied since.

        The clock said `began` before the statement was sent (rule 3).
        """
        self.lease_ends = max(self.lease_ends, server_lease_end(began, self.lease_seconds))
        self.acknowledged = acknowledged

    def lose(self) -> None:
        """Its row is gone, or its history is. Nothing is answered until it registers again.

        The lease is void at once: it was granted by a row, on a history, that may be no more.
        Clients are reset, and what they have confirmed counts no longer. How long their leases run
        still does.
        """
        self.registered = False
        self.lease_ends = -math.inf
        # The row may be committed, and others' missing, before `register` is called.
        self.settles_at = math.inf
        self._start_over(NOWHERE)

    def _unsettle(self, now: float) -> None:
        """Confirm no deletion until each lease of the history before has ended.

        This history may lack the rows of verifiers that still hold one: of those that registered
        after a backup that was restored, or on a primary whose last commits were lost.
        """
        longest = outwait_seconds(LEASE_SECONDS_MAX)
        self.settles_at = now + longest + OUTWAIT_MARGIN_SECONDS

    def _start_over(self, position: Position) -> None:
        self.memory.reset(position)
        self.subleases.unconfirm()
        self.epoch += 1

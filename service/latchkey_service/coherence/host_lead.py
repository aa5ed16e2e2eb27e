"""The lead's side of sharing one row among the processes of a host. Pure, with the clock passed in.

One process of a host, the lead, has a row. The others, its siblings, answer under the lease of
that row. A sibling follows the rules of a row, with the lead in place of Postgres: it renews,
reads the log, acknowledges. Unlike a client on a Watch stream, it gets its lease although it owes
confirmations: otherwise one slow client of a sibling would end the sibling's lease.

Why this is sufficient (rules 3 and 7):
- A renewal returns everything that the lead has applied, and the sibling applies that first. A
  Delete with a later revision was committed after the statement that began the lead's lease, so it
  cannot outwait that lease before it has ended, and the sibling's lease ends no later.
- The lead records the lease before it answers. From then on the lead's row acknowledges no revision
  that the sibling and its clients have not confirmed, until that lease has ended.
- While the sibling has no lease on record, the row may acknowledge more than the sibling has
  applied. Then neither the sibling nor a client of it answers.
- A log that is sent before the sibling asks extends no lease and confirms nothing. The sibling
  applies it only after a position that it contains, mark included, so it skips no change and
  follows no other history (rule 12).

Owns the records of siblings, as leases in `client_leases`. The socket belongs to `lead_server`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from latchkey_coherence.verdict_cache import NOWHERE, Position

from latchkey_service.coherence.client_leases import ClientLease
from latchkey_service.coherence.log import Log, Registration, Server
from latchkey_service.coherence.verifier_state import VerifierState

__all__ = ["UNASKED_MAX", "HostLead", "Renewal", "Sibling", "UnaskedLog"]

# The longest log that is sent without a question, in changes and tokens. A sibling fetches a longer
# one: the lead would send it again with each change until the sibling has confirmed it.
UNASKED_MAX: Final = 100


class Renewal(NamedTuple):
    """The answer to a renewal of a sibling. Without a lease, `ends` is infinitely long ago."""

    renewed: bool
    log: Log
    ends: float = -math.inf


class UnaskedLog(NamedTuple):
    """A log that the lead sends as soon as it has read it. It spares a sibling the question."""

    after: Position
    """The position that the sibling stated last."""
    log: Log

    def following(self, applied: Position) -> Log | None:
        """Return the part after the position that the sibling has applied meanwhile.

        None if nothing follows, or if this log does not contain that position: the sibling has
        started over, perhaps on another history.
        """
        log = self.log
        if applied == self.after:
            return log
        for place, change in enumerate(log.changes[:-1], 1):
            if change.position == applied:
                return dataclasses.replace(log, changes=log.changes[place:])
        return None


class Sibling:
    """The record of one connection of a sibling. A sibling that reconnects gets another one: what
    it had on record before stays until it has ended.
    """

    __slots__ = ("applied", "incarnation", "lease")

    def __init__(self, name: str = "") -> None:
        self.lease = ClientLease(name, is_process=True)
        self.incarnation = 0
        """The registration of the lead under which the sibling has registered. 0: under none."""
        self.applied = NOWHERE
        """The position that the sibling stated last."""


class HostLead:
    """What the lead answers. Times are readings of the clock that all processes of a host share."""

    def __init__(self, state: VerifierState[Any], incarnation: Callable[[], int]) -> None:
        self._state = state
        # The incarnation of the lead's row.
        self.incarnation = incarnation
        self.closing = False
        """Whether siblings have to take their own rows, because this process will stop."""

    def ready(self, now: float) -> bool:
        """Return whether there is a lease to share."""
        return self._state.registered and now < self._state.lease_ends

    def behind(self, applied: Position) -> bool:
        """Return whether a sibling may know more than the lead, which has to read its log first."""
        return applied.revision > self._state.cache.position.revision

    def register(self, sibling: Sibling, *, acknowledge: bool) -> Registration:
        """Let a sibling begin with an empty cache and no lease (rule 2). Requires `ready`.

        Without `acknowledge`, clients of the sibling may still answer under its earlier leases.
        Their confirmations no longer count. The ends of their leases do, which are on record.
        """
        state = self._state
        sibling.incarnation = self.incarnation()
        position = sibling.applied = state.cache.position
        acknowledged = position.revision if acknowledge else 0
        state.client_leases.confirm(sibling.lease, acknowledged)
        return Registration(position, acknowledged, state.server)

    def log_after(self, sibling: Sibling, applied: Position) -> Log:
        """Return the log after a position of a sibling.

        The position is not known if the lead itself has registered again meanwhile: it then starts
        over, and delays the confirmation of deletions, and so must its siblings (rules 8 and 12).
        """
        state = self._state
        sibling.applied = applied
        changes = None
        if state.registered and sibling.incarnation == self.incarnation():
            changes = state.recent.after(applied)
        return Log(
            changes is not None,
            state.server,
            state.cache.position,
            changes or (),
            read_began=state.log_read_began,
        )

    def unasked_log(self, sibling: Sibling) -> UnaskedLog | None:
        """Return the log after the position that a sibling stated last.

        None if it is empty, long, or not known. The sibling then has to ask.
        """
        if self._state.cache.position.revision - sibling.applied.revision > UNASKED_MAX:
            # Each revision is a change. A sibling that is stopped may lack thousands.
            return None
        log = self.log_after(sibling, sibling.applied)
        size = sum(1 + len(change.token_ids) for change in log.changes)
        if not 0 < size <= UNASKED_MAX:
            return None
        return UnaskedLog(sibling.applied, log)

    def renew(self, sibling: Sibling, applied: Position, acknowledged: int) -> Renewal:
        """Share the lease, and record that (rules 3, 6 and 7). Requires `ready`.

        `acknowledged` is the revision that the sibling and its clients have applied.
        """
        state = self._state
        log = self.log_after(sibling, applied)
        if not log.known:
            # It was about another history.
            state.client_leases.confirm(sibling.lease, 0)
            return Renewal(renewed=False, log=log)
        confirmed = min(acknowledged, applied.revision)
        # Recorded before it is sent. The end is a reading of the common clock, so a lead that is
        # stopped between these lines shares no more than it has recorded.
        state.client_leases.grant(sibling.lease, confirmed, state.lease_ends)
        return Renewal(renewed=True, log=log, ends=state.lease_ends)

    def adopt(
        self,
        sibling: Sibling,
        applied: Position,
        acknowledged: int,
        ends: float,
        server: Server,
        now: float,
    ) -> bool:
        """Take over a sibling that has a row, and answers until `ends`. Return whether this is
        done: the sibling may then remove its row.

        The lead's row may already have acknowledged what the lead has applied. A Delete that waits
        for the sibling's row alone would return when that row is removed. So the sibling and its
        clients must have confirmed everything that the lead has applied.
        """
        state = self._state
        if (
            self.closing
            or not self.ready(now)
            or server != state.server
            or state.recent.after(applied) is None
            or acknowledged < state.cache.position.revision
        ):
            return False
        sibling.incarnation, sibling.applied = self.incarnation(), applied
        # Until both leases have ended: that of the sibling's row, too.
        state.client_leases.grant(sibling.lease, acknowledged, ends)
        return True

    def release(self, sibling: Sibling) -> None:
        """Forget a sibling that answers no longer under a lease of this process: it has stopped, or
        has its own row, which was renewed.
        """
        self._state.client_leases.release(sibling.lease)

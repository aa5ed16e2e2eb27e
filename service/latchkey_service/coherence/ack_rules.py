"""Decides when a Delete may return and which verifiers are dead. Pure functions of rows and clock
readings. Owns only the rules (8 and 9). `ack_waiter` reads the rows and waits; `lease_renewer`
removes dead verifiers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from latchkey_coherence.lease import outwait_seconds
from latchkey_coherence.verdict_cache import Position

__all__ = [
    "NO_ACKNOWLEDGEMENTS",
    "OUTWAIT_MARGIN_SECONDS",
    "Acknowledgements",
    "DeadVerifierDetector",
    "PendingDeletion",
    "VerifierRow",
    "pause_seconds",
]

# Added to the longest lease. Covers the granularity of the clock and a reader that was delayed
# between two lines.
OUTWAIT_MARGIN_SECONDS = 0.05
# Between two looks at the rows. A healthy verifier acknowledges within a few milliseconds, while a
# lease takes seconds to expire. Each look costs every verifier a little.
PAUSE_SECONDS_MIN = 0.0015
PAUSE_SECONDS_MAX = 0.05
PAUSE_FACTOR = 1.3


class VerifierRow(NamedTuple):
    """The part of a verifier's row on which other processes base decisions."""

    id: str
    incarnation: int
    renewal: int
    acknowledged_revision: int
    lease_seconds: float
    clients_confirmed: int = 0
    clients_outwaited: int = 0
    processes: int = 1
    """How many processes of a host the row represents."""
    processes_outwaited: int = 0


class Acknowledgements(NamedTuple):
    """Proof that no verifier can still answer with a token invalidated up to a revision."""

    acknowledged: int
    """How many verifiers have dropped the token."""
    outwaited: int
    """How many verifiers have not acknowledged, but can no longer hold a lease.
    """
    clients_acknowledged: int = 0
    """How many clients of the verifiers that acknowledged have dropped the token."""
    clients_outwaited: int = 0
    """How many clients of the verifiers that acknowledged let their lease expire instead."""


# For a receipt that is already stored and must not change.
NO_ACKNOWLEDGEMENTS = Acknowledgements(0, 0)


@dataclass(slots=True, eq=False)
class PendingDeletion:
    """A Delete that waits until the revision of `position` is acknowledged.

    `committed` is a reading of this process's clock from after the commit.

    Why the rule is sufficient (Gray & Cheriton): a lease that began before the commit ends within a
    lease's length after it, and a verifier whose lease began after the commit has read the log. If
    a row disappears during the wait, either its own process removed it after the leases of its
    clients had ended, or another process saw its lease expire. If a row appears, its process read
    nothing before it committed the row.
    """

    position: Position
    committed: float
    _processes: dict[str, int] = field(default_factory=dict, init=False)
    """For each verifier that was read: the number of processes that it represented when it
    acknowledged, or else when it was last read."""
    _pending: set[str] = field(default_factory=set, init=False)
    """The verifiers that were behind when they were last read."""
    newly_acknowledged: int = field(default=0, init=False)
    """How many verifiers had acknowledged at the last look that had not at the one before."""
    _clients: dict[str, int] = field(default_factory=dict, init=False)
    """For each verifier that acknowledged: how many of its clients had confirmed at that time."""
    _outwaited: dict[str, tuple[int, int]] = field(default_factory=dict, init=False)
    """For each verifier that was behind: its `clients_outwaited` when it was first read, and when
    it was last read."""
    _processes_outwaited: dict[str, tuple[int, int]] = field(default_factory=dict, init=False)
    """The same for its `processes_outwaited`."""

    @property
    def behind(self) -> int:
        """How many verifiers had not acknowledged at the last look."""
        return len(self._pending)

    def evaluate(self, rows: Iterable[VerifierRow], now: float) -> Acknowledgements | None:
        """Return the acknowledgements if `rows` prove that no verifier can answer with the token.

        Returns None otherwise. All rows were read after the commit, and `now` was read before the
        rows. The rows come from a database whose history holds `position`: an acknowledgement of a
        revision of another history proves nothing (rule 12).
        """
        behind: dict[str, float] = {}
        acknowledged = len(self._clients)
        for row in rows:
            if row.id not in self._processes or row.id in self._pending:
                self._processes[row.id] = row.processes
            if row.acknowledged_revision < self.position.revision:
                behind[row.id] = row.lease_seconds
                self._outwaited.setdefault(row.id, (row.clients_outwaited, row.clients_outwaited))
                self._processes_outwaited.setdefault(
                    row.id, (row.processes_outwaited, row.processes_outwaited)
                )
            else:
                if row.id in self._outwaited and row.id in self._pending:
                    self._outwaited[row.id] = (self._outwaited[row.id][0], row.clients_outwaited)
                    self._processes_outwaited[row.id] = (
                        self._processes_outwaited[row.id][0],
                        row.processes_outwaited,
                    )
                self._clients.setdefault(row.id, row.clients_confirmed)
                self._pending.discard(row.id)
        self._pending.update(behind)
        self.newly_acknowledged = len(self._clients) - acknowledged
        longest = max(behind.values(), default=0.0)
        if behind and now < self.committed + outwait_seconds(longest) + OUTWAIT_MARGIN_SECONDS:
            return None
        # A row that was removed before it acknowledged counts as outwaited.
        outwaited = sum(self._processes[each] for each in self._pending)
        return Acknowledgements(
            sum(self._processes.values()) - outwaited,
            # The lease of a sibling may have ended before its host's row acknowledged.
            outwaited + sum(last - first for first, last in self._processes_outwaited.values()),
            sum(self._clients.values()),
            sum(last - first for first, last in self._outwaited.values()),
        )


def pause_seconds(before: float, waits: Iterable[PendingDeletion]) -> float:
    """Return how long to wait until the next look at the rows.

    `before` is how long the last pause was. The pauses grow, but none is longer than the verifiers
    that are still behind should need, at the rate of the last pause, for the first of `waits`.
    """
    pauses = (
        before * wait.behind / wait.newly_acknowledged for wait in waits if wait.newly_acknowledged
    )
    return max(PAUSE_SECONDS_MIN, min([before * PAUSE_FACTOR, PAUSE_SECONDS_MAX, *pauses]))


class DeadVerifierDetector:
    """Finds rows whose process is dead, measured by this process's own clock."""

    def __init__(self) -> None:
        self._unchanged_since: dict[tuple[str, int, int], float] = {}

    def dead(self, rows: Iterable[VerifierRow], asked: float, now: float) -> list[VerifierRow]:
        """Return the rows whose `renewal` has not changed for longer than their lease.

        The rows were read between `asked` and `now`. A caller that removes one must do so on
        condition that its renewal is still the same (rule 9).
        """
        before, self._unchanged_since = self._unchanged_since, {}
        found = []
        for row in rows:
            key = (row.id, row.incarnation, row.renewal)
            since = self._unchanged_since[key] = before.get(key, now)
            if asked - since > outwait_seconds(row.lease_seconds) + OUTWAIT_MARGIN_SECONDS:
                found.append(row)
        return found

"""What a Delete waits for, and which verifiers are dead. Pure (rules 8 and 9)."""

from collections.abc import Iterable
from typing import NamedTuple

from latchkey_coherence.lease import outwait_seconds
from latchkey_coherence.memory import Position

__all__ = [
    "NO_ACKNOWLEDGEMENTS",
    "OUTWAIT_MARGIN_SECONDS",
    "Acknowledgements",
    "DeadVerifierDetector",
    "PendingDeletion",
    "VerifierRow",
]

# On top of the longest lease: what a clock that is read in steps, and a reader that was held up
# between two lines, might be wrong by.
OUTWAIT_MARGIN_SECONDS = 0.05


class VerifierRow(NamedTuple):
    """A verifier's row, as far as others decide by it."""

    id: str
    incarnation: int
    renewal: int
    acknowledged_revision: int
    lease_seconds: float
    clients_confirmed: int = 0
    clients_outwaited: int = 0


class Acknowledgements(NamedTuple):
    """No verifier can answer with a token that revisions up to the one waited for made invalid."""

    acknowledged: int
    """How many verifiers have dropped it."""
    outwaited: int
    """How many have not said so, but have lost every lease that they could have had."""
    clients_acknowledged: int = 0
    """How many clients of those that acknowledged have dropped it."""
    clients_outwaited: int = 0
    """How many clients of those that acknowledged were waited out until their leases had ended."""


# For a receipt that is written already, and stays as it is.
NO_ACKNOWLEDGEMENTS = Acknowledgements(0, 0)


class PendingDeletion:
    """The wait for the revision of `position`, committed before the clock said `committed`.

    Why it is enough: a lease that began before the commit ends within its length of it, and one
    that began after it has read the log (Gray & Cheriton). A row that goes meanwhile was removed
    by its own process, which had ended its clients' leases first, or by one that had seen it
    lapse. A row that comes meanwhile is of a process that read nothing before it committed it.
    """

    __slots__ = ("_clients", "_committed", "_outwaited", "_pending", "_seen", "position")

    def __init__(self, position: Position, committed: float) -> None:
        self.position = position
        self._committed = committed
        self._seen: set[str] = set()
        self._pending: set[str] = set()
        # By verifier: how many of its clients have confirmed; and how many had been waited out when
        # it was first seen to be behind, and have been since.
        self._clients: dict[str, int] = {}
        self._outwaited: dict[str, tuple[int, int]] = {}

    def evaluate(self, rows: Iterable[VerifierRow], now: float) -> Acknowledgements | None:
        """Return the acknowledgements if these rows, which were all read after the commit, give it.

        `now` is read before the rows are. The rows come from a database whose history holds
        `position`: an acknowledgement of another history's revision proves nothing (rule 12).
        """
        behind: dict[str, float] = {}
        for row in rows:
            self._seen.add(row.id)
            if row.acknowledged_revision < self.position.revision:
                behind[row.id] = row.lease_seconds
                self._outwaited.setdefault(row.id, (row.clients_outwaited, row.clients_outwaited))
            else:
                if row.id in self._outwaited and row.id in self._pending:
                    self._outwaited[row.id] = (self._outwaited[row.id][0], row.clients_outwaited)
                self._clients.setdefault(row.id, row.clients_confirmed)
                self._pending.discard(row.id)
        self._pending.update(behind)
        longest = max(behind.values(), default=0.0)
        if behind and now < self._committed + outwait_seconds(longest) + OUTWAIT_MARGIN_SECONDS:
            return None
        # Those that were removed before they had acknowledged it count as waited out.
        return Acknowledgements(
            len(self._seen) - len(self._pending),
            len(self._pending),
            sum(self._clients.values()),
            sum(last - first for first, last in self._outwaited.values()),
        )


class DeadVerifierDetector:
    """Watches the rows for those whose process is dead, by this process's own clock."""

    def __init__(self) -> None:
        self._unchanged_since: dict[tuple[str, int, int], float] = {}

    def dead(self, rows: Iterable[VerifierRow], asked: float, now: float) -> list[VerifierRow]:
        """Return the rows whose `renewal` has been the same for longer than their lease.

        The rows were read between `asked` and `now`. Whoever removes one does so on condition that
        its renewal is still the same (rule 9).
        """
        before, self._unchanged_since = self._unchanged_since, {}
        found = []
        for row in rows:
            key = (row.id, row.incarnation, row.renewal)
            since = self._unchanged_since[key] = before.get(key, now)
            if asked - since > outwait_seconds(row.lease_seconds) + OUTWAIT_MARGIN_SECONDS:
                found.append(row)
        return found

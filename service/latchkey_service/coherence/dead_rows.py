"""Removes the rows of dead processes, so that no further Delete waits for them (rule 9).

Owns how often a process looks for them. `ack_rules` decides which processes are dead.
"""

import random
from collections.abc import Callable

from latchkey_service.coherence.ack_rules import DeadVerifierDetector
from latchkey_service.coherence.verifier_table import OwnRow
from latchkey_service.postgres.circuit_breaker import jittered
from latchkey_service.settings.logs import logger

__all__ = ["DeadRows"]

# To find dead rows, a process reads all rows. If every process did so often, the cost would grow
# with the square of their number. So only those with the lowest ids read them once per lease. The
# others read them rarely, in case all of those are dead.
DETECTORS = 8
OTHERS_DETECT_SECONDS = 60.0


class DeadRows:
    """Looks for dead rows in the name of a process."""

    def __init__(self, own_id: str, lease_seconds: float, clock: Callable[[], float]) -> None:
        self._id = own_id
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._detector = DeadVerifierDetector()
        self._log = logger()

    async def remove(self, row: OwnRow) -> float:
        """Read all rows, and remove those that are dead. Return when to do so again.

        `row` is the row of this process. Raises StoreUnavailable.
        """
        asked = self._clock()
        rows = await row.all_rows()
        for dead in self._detector.dead(rows, asked, self._clock()):
            if await row.remove_dead(dead):
                self._log.warning("dead verifier removed", verifier=dead.id)
        lower = sum(other.id < self._id for other in rows)
        if lower < DETECTORS:
            return asked + self._lease_seconds
        return asked + jittered(OTHERS_DETECT_SECONDS, random.random())  # noqa: S311 - jitter

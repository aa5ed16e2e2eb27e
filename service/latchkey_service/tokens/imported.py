"""Looks up imported secrets, and bounds what made-up ones can cost.

An imported secret has neither checksum nor tag, so only the database can say that one is made up.
Three bounds keep that from harming others:

- Imported secrets have a queue and a connection apart from those of other secrets. A flood of
  made-up ones fills that queue, and leaves the other one alone.
- A caller may have only so many of them in the queue, so that it leaves room for other callers.
- A secret that the database does not have is remembered for a moment, so that a program that
  repeats one wrong secret costs nothing.

A remembered secret is UNKNOWN without a read. That refuses it, so no lease could make it unsafe; it
must only not outlast an import. Import takes a revision, and what was remembered at an earlier
position does not count any more.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from latchkey_coherence.verdict_cache import Position

from latchkey_service.coherence.verifier_state import VerifierState
from latchkey_service.errors import Overloaded
from latchkey_service.secret_format import Keyring
from latchkey_service.tokens.batched_lookup import Found, LeasedLookup
from latchkey_service.tokens.verdict import CachedToken

__all__ = ["Imported", "ImportedSecrets"]

# Digests of one caller that wait for a look-up: two full batches of verifies. A secret has one for
# each pepper. Most of the queue (`batched_lookup.WAITING_MAX`) stays free for other callers.
PENDING_MAX: Final = 2_000
# Longer than the pauses of a program that tries again and again. Bounds what an error in the
# reasoning above could cost.
ABSENT_SECONDS: Final = 5.0
# At about 200 bytes each.
ABSENT_MAX: Final = 10_000


class Imported(NamedTuple):
    """A presented secret that may be an imported one: its possible digests, one per pepper."""

    digests: tuple[bytes, ...]


class ImportedSecrets:
    """Recognises and looks up imported secrets. Event loop only."""

    def __init__(
        self,
        keyring: Keyring,
        lookup: LeasedLookup,
        verifier_state: VerifierState[CachedToken],
        clock: Callable[[], float],
    ) -> None:
        self._keyring = keyring
        self._lookup = lookup
        self._verifier_state = verifier_state
        self._clock = clock
        self._pending: Counter[str] = Counter()
        # By the first digest: the position of the read, and until when it counts. Oldest first.
        self._absent: dict[bytes, tuple[Position, float]] = {}
        self.results: Counter[str] = Counter()
        """Questions that `verify_cached` left open, by result: `found` and `absent` in a look-up,
        `remembered` as absent, or `rejected` because too many waited."""

    @property
    def waiting(self) -> int:
        """How many digests wait for a query."""
        return self._lookup.waiting

    def parse(self, presented: str) -> Imported | None:
        """Return the secret's possible digests, or None if it is not an imported one."""
        digests = self._keyring.imported_digests_of(presented)
        return None if digests is None else Imported(digests)

    def is_absent(self, secret: Imported) -> bool:
        """Return whether the database is known not to have this secret, under the lease."""
        remembered = self._absent.get(secret.digests[0])
        if remembered is None:
            return False
        position, until = remembered
        now, state = self._clock(), self._verifier_state
        if position != state.cache.position or now >= until or now >= state.lease_ends:
            return False
        self.results["remembered"] += 1
        return True

    async def find(self, secrets: Sequence[Imported], caller: str, deadline: float) -> list[Found]:
        """Look up secrets, in order. Raises Overloaded, and the errors of `LeasedLookup.find`."""
        digests = [digest for one in secrets for digest in one.digests]
        with self._admitted(caller, len(secrets), len(digests)):
            found = iter(await self._lookup.find(digests, deadline))
        results = []
        for secret in secrets:
            candidates = [next(found) for _ in secret.digests]
            present = [one for one in candidates if one.record is not None]
            self.results["found" if present else "absent"] += 1
            if not present:
                self._remember(secret, candidates[0].snapshot.position)
            results.append(present[0] if present else candidates[0])
        return results

    @contextlib.contextmanager
    def _admitted(self, caller: str, secrets: int, digests: int) -> Iterator[None]:
        # A single batch is always admitted if nothing else waits.
        if self._pending[caller] and self._pending[caller] + digests > PENDING_MAX:
            self.results["rejected"] += secrets
            raise Overloaded("Too many imported secrets are waiting for the database; try again.")
        self._pending[caller] += digests
        try:
            yield
        finally:
            self._pending[caller] -= digests
            if not self._pending[caller]:
                del self._pending[caller]

    def _remember(self, secret: Imported, position: Position) -> None:
        cache = self._verifier_state.cache
        # With LATCHKEY_CACHE=off, each verify reads the database. And if something has changed
        # since this read, it may have been by an import.
        if not cache.entries_max or position != cache.position:
            return
        key = secret.digests[0]
        self._absent.pop(key, None)
        if len(self._absent) >= ABSENT_MAX:
            del self._absent[next(iter(self._absent))]
        self._absent[key] = (position, self._clock() + ABSENT_SECONDS)

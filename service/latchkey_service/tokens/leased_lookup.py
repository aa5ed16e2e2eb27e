"""Looks up digests under the process's lease, for Verify."""

import contextlib
from collections.abc import Sequence
from typing import Final

from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.errors import CacheStartedOver
from latchkey_service.tokens.batched_lookup import Found, Lookup

__all__ = ["LeasedLookup"]

# The cache rarely starts over, and hardly ever twice within one round trip.
READS_MAX: Final = 3


class LeasedLookup:
    """A look-up whose results count only under the lease."""

    def __init__(self, lookup: Lookup, reads: LeasedReads) -> None:
        self._lookup = lookup
        self._reads = reads

    async def find(self, digests: Sequence[bytes], deadline: float) -> list[Found]:
        """Look up digests, and return the accepted records, in order.

        If the cache starts over during the read, because of an `InvalidateAll` or a new timeline,
        the read is not acceptable, and is repeated.
        """
        for _ in range(READS_MAX - 1):
            with contextlib.suppress(CacheStartedOver):
                return await self._find_once(digests, deadline)
        return await self._find_once(digests, deadline)

    async def _find_once(self, digests: Sequence[bytes], deadline: float) -> list[Found]:
        began = await self._reads.begin(deadline)
        found = await self._lookup.find_all(digests, deadline)
        await self._reads.accept(found[0].snapshot, began, deadline)
        return found

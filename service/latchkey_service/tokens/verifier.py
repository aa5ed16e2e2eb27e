"""Answers "may this secret do this?" from the cache, or else by parsing, looking up and deciding.

Owns the path of a verify. It does not own the cache's rules (`latchkey_coherence`), the
lease (`coherence`) or the look-up (`batched_lookup.py`).

It answers only while this process holds its lease, whether from the cache or from a read (coherence
rule 5). One reading of the clock after the verify began is enough: if the process then holds its
lease, no earlier Delete has returned without this process's acknowledgement.

A secret with a wrong checksum or tag needs neither a query nor a lease. Unknown secrets are never
cached, so a verify recognises a new token at once.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Final, NamedTuple

from latchkey_coherence.verdict_cache import NOWHERE, Position

from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.coherence.verifier_state import VerifierState
from latchkey_service.errors import CacheStartedOver
from latchkey_service.secret_format import SECRET_LENGTH_MAX, Keyring, Malformed
from latchkey_service.tokens.batched_lookup import Found, Lookup
from latchkey_service.tokens.verdict import CachedToken, TokenRecord, Verdict, decide

__all__ = ["MALFORMED", "UNKNOWN", "Answer", "Question", "Verifier"]


class Answer(NamedTuple):
    """A verdict, the encoded token if the secret has one, and the position at which both hold.

    The position is NOWHERE if nothing was read.
    """

    verdict: Verdict
    token: bytes = b""
    account_id: str = ""
    """The token's account; empty without a token."""
    position: Position = NOWHERE


# A presented secret and the number of the required scope.
Question = tuple[str, int]

# A verify gives up after this share of its caller's time, so that the caller receives our reason
# and not its own timeout: when Postgres hangs, hundreds of calls reach theirs at once.
PATIENCE = 0.9
# Limit for callers with more time, or without a deadline: no healthy look-up takes as long.
SECONDS_MAX = 10.0
# The cache rarely starts over, and hardly ever twice within one round trip.
READS_MAX = 3
# No secret has this digest: HMAC-SHA-256 returns all zeros with a probability of 2**-256.
ABSENT_DIGEST = bytes(32)

MALFORMED: Final = Answer(Verdict.MALFORMED)
UNKNOWN: Final = Answer(Verdict.UNKNOWN)


class Verifier:
    """Answers verifies. Fails closed: raises StoreUnavailable without a lease or a needed read."""

    def __init__(
        self,
        keyring: Keyring,
        lookup: Lookup,
        reads: LeasedReads,
        verifier_state: VerifierState[CachedToken],
        encode: Callable[[TokenRecord], bytes],
        clock: Callable[[], float],
        unix_time: Callable[[], float],
        *,
        cache_seconds: float,
        randomness: Callable[[], float],
    ) -> None:
        self._keyring = keyring
        self._lookup = lookup
        self._reads = reads
        self._verifier_state = verifier_state
        self._cache = verifier_state.cache
        self._entries = verifier_state.cache.entries
        self._encode = encode
        self._clock = clock
        self._unix_time = unix_time
        self._cache_seconds = cache_seconds
        self._randomness = randomness

    def verify_cached(self, presented: str, required_scope: int) -> Answer | None:
        """Return the answer to one question from the cache, or None."""
        if len(presented) > SECRET_LENGTH_MAX:
            return None
        if not self._entries or (now := self._clock()) >= self._verifier_state.lease_ends:
            return None
        record = self._entries.get(sha256(presented.encode()).digest())
        if record is None or now >= record.keep_until:
            return None
        record.used = True
        # No applied invalidation names it, or it would not be in the cache.
        return Answer(
            decide(record, required_scope, self._unix_time()),
            record.token,
            record.account_id,
            self._cache.position,
        )

    async def verify(
        self, presented: str, required_scope: int, seconds_left: float | None
    ) -> Answer:
        """Return the answer to one question that `verify_cached` cannot answer.

        At most one round trip, shared with other calls. `seconds_left` is how long its caller
        waits; None means no limit. Raises StoreUnavailable and Overloaded, and Unavailable shortly
        before the caller stops waiting.
        """
        digest = self._parse(presented)
        if isinstance(digest, Answer):
            return digest
        (found,) = await self._find((digest,), self._deadline(seconds_left))
        # Reads the time after the wait, because expiry is judged at the time of the answer.
        return self._judge(presented, found, required_scope, self._unix_time())

    async def verify_batch(
        self, questions: Sequence[Question], seconds_left: float | None
    ) -> list[Answer]:
        """Return the answers to up to 1,000 questions, in order, with one look-up."""
        parsed = [
            self.verify_cached(presented, required_scope) or self._parse(presented)
            for presented, required_scope in questions
        ]
        digests = [digest for digest in parsed if isinstance(digest, bytes)]
        if not digests:
            return [answer for answer in parsed if isinstance(answer, Answer)]
        founds = iter(await self._find(digests, self._deadline(seconds_left)))
        now = self._unix_time()
        return [
            digest
            if isinstance(digest, Answer)
            else self._judge(presented, next(founds), required_scope, now)
            for digest, (presented, required_scope) in zip(parsed, questions, strict=True)
        ]

    async def check(self, deadline: float) -> None:
        """Return if a verify that needs a look-up would succeed now; otherwise raise as `verify`.

        For the health service.
        """
        await self._find((ABSENT_DIGEST,), deadline)

    def _deadline(self, seconds_left: float | None) -> float:
        """Return when a verify that began now gives up."""
        if seconds_left is None:
            return self._clock() + SECONDS_MAX
        return self._clock() + min(SECONDS_MAX, PATIENCE * seconds_left)

    async def _find(self, digests: Sequence[bytes], deadline: float) -> list[Found]:
        """Look up 1 to 1,000 digests, under the lease, and return the accepted records, in order.
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

    def _judge(self, presented: str, found: Found, required_scope: int, now: float) -> Answer:
        """Decide on a token that was read, and cache it if the fill rule allows."""
        read = found.record
        if read is None:
            return Answer(Verdict.UNKNOWN, position=found.snapshot.position)
        record = CachedToken(
            read.id,
            read.account_id,
            int(read.scope),
            math.inf if read.expire_time is None else read.expire_time.timestamp(),
            self._encode(read),
            deleted=read.delete_time is not None,
            # Random, from half of the time to all of it, so that tokens read together, for example
            # after a start, do not expire together.
            keep_until=self._clock() + self._cache_seconds * (0.5 + 0.5 * self._randomness()),
        )
        position = found.snapshot.position
        if self._cache.entries_max:
            self._cache.store(sha256(presented.encode()).digest(), record, position)
        verdict = decide(record, required_scope, now)
        return Answer(verdict, record.token, record.account_id, position)

    def _parse(self, presented: str) -> bytes | Answer:
        """Return the digest to look up, or the answer if no look-up is needed."""
        try:
            digest = self._keyring.digest_of(presented)
        except Malformed:
            return MALFORMED
        return UNKNOWN if digest is None else digest

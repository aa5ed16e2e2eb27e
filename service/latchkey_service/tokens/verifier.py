"""Answers "may this secret do this?" from the cache, or else by parsing, looking up and deciding.

Owns the path of a verify. It does not own the cache's rules (`latchkey_coherence`), the
lease (`coherence`) or the look-up (`batched_lookup.py`).

It answers only while this process holds its lease, whether from the cache or from a read (coherence
rule 5). One reading of the clock after the verify began is enough: if the process then holds its
lease, no earlier Delete has returned without this process's acknowledgement.

A secret with a wrong checksum or tag needs neither a query nor a lease. Unknown secrets are never
cached, so a verify recognises a new token at once.
"""

import math
from collections.abc import Callable, Collection, Sequence
from hashlib import sha256
from sys import intern
from typing import Final, NamedTuple

from latchkey_coherence.rate import Share
from latchkey_coherence.verdict import Networks
from latchkey_coherence.verdict_cache import NOWHERE, Position

from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.coherence.verifier_state import VerifierState
from latchkey_service.secret_format import IMPORTED_LENGTH_MAX, Keyring, Malformed
from latchkey_service.tokens.batched_lookup import Found, LeasedLookup, Lookup
from latchkey_service.tokens.imported import Imported, ImportedSecrets
from latchkey_service.tokens.seal import SealGuard
from latchkey_service.tokens.token_rates import TokenRates
from latchkey_service.tokens.verdict import (
    CachedToken,
    SecretRecord,
    TokenRecord,
    Verdict,
    decide,
)

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
    record: CachedToken | None = None
    retry_seconds: float = 0.0
    """With RATE_LIMITED: when to try again."""
    decided_at: float = 0.0
    """Unix time, if the answer came from the cache without a look at a rate limit. 0: not known."""


class Question(NamedTuple):
    """A presented secret, and what its holder wants to do."""

    presented: str
    required_scope: int
    """The number of the scope."""
    client_address: str = ""
    required_permissions: Collection[str] = ()


# A verify gives up after this share of its caller's time, so that the caller receives our reason
# and not its own timeout: when Postgres hangs, hundreds of calls reach theirs at once.
PATIENCE = 0.9
# Limit for callers with more time, or without a deadline: no healthy look-up takes as long.
SECONDS_MAX = 10.0
# No secret has this digest: HMAC-SHA-256 returns all zeros with a probability of 2**-256.
ABSENT_DIGEST = bytes(32)

MALFORMED: Final = Answer(Verdict.MALFORMED)
UNKNOWN: Final = Answer(Verdict.UNKNOWN)
_new_tuple: Final = tuple.__new__


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
        guard: SealGuard,
        rates: TokenRates,
        imported: ImportedSecrets,
    ) -> None:
        self._guard = guard
        self._rates = rates
        self._keyring = keyring
        self._lookup = LeasedLookup(lookup, reads)
        self.imported = imported
        self._verifier_state = verifier_state
        self._cache = verifier_state.cache
        self._entries = verifier_state.cache.entries
        self._encode = encode
        self._clock = clock
        self._unix_time = unix_time
        self._cache_seconds = cache_seconds
        self._randomness = randomness
        self.answered_by_read = 0
        """The questions that a read of the database answered."""
        self.answered_by_form = 0
        """The questions that the form of the secret answered: no Latchkey secret looks like
        that."""

    def verify_cached(
        self,
        presented: str,
        required_scope: int,
        client_address: str = "",
        required_permissions: Collection[str] = (),
    ) -> Answer | None:
        """Return the answer to one question from the cache, or None."""
        # The longest secrets are imported ones.
        if len(presented) > IMPORTED_LENGTH_MAX:
            return None
        if not self._entries or (now := self._clock()) >= self._verifier_state.lease_ends:
            return None
        record = self._entries.get(sha256(presented.encode()).digest())
        if record is None or now >= record.keep_until:
            return None
        record.used = True
        if record.share is not None:
            question = Question(presented, required_scope, client_address, required_permissions)
            return self._limited_from_cache(record, record.share, question, now)
        # No applied invalidation names it, or it would not be in the cache.
        unix_time = self._unix_time()
        verdict = decide(record, required_scope, unix_time, client_address, required_permissions)
        position = self._cache.position
        # `Answer(...)` takes as long as the decision; this, a third of that.
        return _new_tuple(
            Answer, (verdict, record.token, record.account_id, position, record, 0.0, unix_time)
        )

    async def verify(
        self, question: Question, seconds_left: float | None, caller: str = ""
    ) -> Answer:
        """Return the answer to one question that `verify_cached` cannot answer.

        At most one round trip, shared with other calls. `seconds_left` is how long the caller of
        this name waits; None means no limit. Raises StoreUnavailable and Overloaded, and
        Unavailable shortly before the caller stops waiting.
        """
        parsed = self._parse(question.presented)
        if isinstance(parsed, Answer):
            self.answered_by_form += 1
            return parsed
        deadline = self._deadline(seconds_left)
        if isinstance(parsed, Imported):
            (found,) = await self.imported.find((parsed,), caller, deadline)
        else:
            (found,) = await self._lookup.find((parsed,), deadline)
        self.answered_by_read += 1
        # Reads the time after the wait, because expiry is judged at the time of the answer.
        answer = self._judge(question, found, self._unix_time())
        if _is_limited(answer):
            (answer,) = await self._admit([(question, answer)], deadline)
        return answer

    async def verify_batch(
        self, questions: Sequence[Question], seconds_left: float | None, caller: str = ""
    ) -> list[Answer]:
        """Return the answers to up to 1,000 questions, in order, with one look-up.

        Imported secrets take another one.
        """
        parsed = [
            self.verify_cached(*question) or self._parse(question.presented)
            for question in questions
        ]
        digests = [digest for digest in parsed if isinstance(digest, bytes)]
        by_form = sum(answer is MALFORMED or answer is UNKNOWN for answer in parsed)
        imported = [one for one in parsed if isinstance(one, Imported)]
        if not digests and not imported:
            self.answered_by_form += by_form
            return [answer for answer in parsed if isinstance(answer, Answer)]
        deadline = self._deadline(seconds_left)
        founds = iter(await self._lookup.find(digests, deadline) if digests else ())
        others = iter(await self.imported.find(imported, caller, deadline) if imported else ())
        self.answered_by_form += by_form
        self.answered_by_read += len(digests) + len(imported)
        now = self._unix_time()
        answers = [
            one
            if isinstance(one, Answer)
            else self._judge(question, next(others if isinstance(one, Imported) else founds), now)
            for one, question in zip(parsed, questions, strict=True)
        ]
        # Answers from the cache have spent their calls.
        limited = [
            number
            for number, (one, answer) in enumerate(zip(parsed, answers, strict=True))
            if not isinstance(one, Answer) and _is_limited(answer)
        ]
        if limited:
            admitted = await self._admit([(questions[n], answers[n]) for n in limited], deadline)
            for number, answer in zip(limited, admitted, strict=True):
                answers[number] = answer
        return answers

    async def check(self, deadline: float) -> None:
        """Return if a verify that needs a look-up would succeed now; otherwise raise as `verify`.

        For the health service.
        """
        await self._lookup.find((ABSENT_DIGEST,), deadline)

    def _limited_from_cache(
        self, record: CachedToken, share: Share, question: Question, now: float
    ) -> Answer | None:
        """Return the answer about a token with a rate limit, or None if a draw is needed.

        Only a verify that would be VALID spends a call.
        """
        answer = Answer(
            decide(record, question.required_scope, self._unix_time(), *question[2:]),
            record.token,
            record.account_id,
            self._cache.position,
            record,
        )
        if answer.verdict is not Verdict.VALID:
            return answer
        retry_seconds = self._rates.admit_now(share, now)
        return None if retry_seconds is None else _limited(answer, retry_seconds)

    async def _admit(
        self, limited: Sequence[tuple[Question, Answer]], deadline: float
    ) -> list[Answer]:
        """Spend a call for each VALID answer about a token with a rate limit, if there is one."""
        shares = [
            answer.record.share
            for _, answer in limited
            if answer.record is not None and answer.record.share is not None
        ]
        retries = await self._rates.admit(shares, deadline)
        # The secret may have expired during the wait.
        now = self._unix_time()
        return [
            answer._replace(verdict=Verdict.EXPIRED)
            if answer.record is not None and answer.record.expires <= now
            else _limited(answer, retry_seconds)
            for (_, answer), retry_seconds in zip(limited, retries, strict=True)
        ]

    def _deadline(self, seconds_left: float | None) -> float:
        """Return when a verify that began now gives up."""
        if seconds_left is None:
            return self._clock() + SECONDS_MAX
        return self._clock() + min(SECONDS_MAX, PATIENCE * seconds_left)

    def _judge(self, question: Question, found: Found, now: float) -> Answer:
        """Decide on a token that was read, and cache it if the fill rule allows.

        A row that is not genuine is UNKNOWN and not cached. What has ended needs no seal, because
        it is refused anyway.
        """
        read, secret, position = found.record, found.secret, found.snapshot.position
        if read is None or secret is None:
            return Answer(Verdict.UNKNOWN, position=position)
        ended = read.delete_time is not None or secret.retire_time is not None
        if not (ended or found.proven or self._guard.trusts(read, secret)):
            return Answer(Verdict.UNKNOWN, position=position)
        expires = _ends_at(read, secret)
        if secret.expire_time is not None and secret.expire_time.timestamp() == expires:
            read = read._replace(expire_time=secret.expire_time)
        record = CachedToken(
            token_id=read.id,
            account_id=intern(read.account_id),
            scope=int(read.scope),
            expires=expires,
            token=self._encode(read),
            deleted=read.delete_time is not None,
            disabled=read.disable_time is not None,
            # What has ended is not sealed, so its networks may be damaged.
            networks=Networks(read.allowed_networks)
            if read.allowed_networks and not ended
            else None,
            permissions=frozenset(read.permissions) if read.permissions else None,
            share=None
            if ended or read.rate_limit is None
            else self._rates.share_of(read.id, read.rate_limit),
            retires_older=secret.digest if secret.older and not ended else None,
            # Random, from half of the time to all of it, so that tokens read together, for example
            # after a start, do not expire together.
            keep_until=self._clock() + self._cache_seconds * (0.5 + 0.5 * self._randomness()),
        )
        if self._cache.entries_max:
            self._cache.store(sha256(question.presented.encode()).digest(), record, position)
        verdict = decide(
            record,
            question.required_scope,
            now,
            question.client_address,
            question.required_permissions,
        )
        return Answer(verdict, record.token, record.account_id, position, record)

    def _parse(self, presented: str) -> bytes | Imported | Answer:
        """Return what to look up, or the answer if no look-up is needed."""
        try:
            digest = self._keyring.digest_of(presented)
        except Malformed:
            imported = self.imported.parse(presented)
            if imported is None:
                return MALFORMED
            if self.imported.is_absent(imported):
                return Answer(Verdict.UNKNOWN, position=self._cache.position)
            return imported
        return UNKNOWN if digest is None else digest


def _is_limited(answer: Answer) -> bool:
    """Return whether an answer is VALID only if its token has a call to spend."""
    record = answer.record
    return answer.verdict is Verdict.VALID and record is not None and record.share is not None


def _limited(answer: Answer, retry_seconds: float) -> Answer:
    """Return an answer that is VALID, or RATE_LIMITED if its token has to wait."""
    if not retry_seconds:
        return answer
    return answer._replace(verdict=Verdict.RATE_LIMITED, retry_seconds=retry_seconds)


def _ends_at(token: TokenRecord, secret: SecretRecord) -> float:
    """Return when the secret stops working: seconds of Unix time, or plus or minus infinity."""
    if secret.retire_time is not None:
        return -math.inf
    return min(
        math.inf if moment is None else moment.timestamp()
        for moment in (token.expire_time, secret.expire_time)
    )

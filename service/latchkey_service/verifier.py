"""The answer to "may this secret do this?": parse → look up → decide.

A secret with a wrong checksum or tag is answered without a query. Nothing is kept in memory, so an
answer is as fresh as the database.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import NamedTuple

from latchkey_service.lookup import Lookup
from latchkey_service.secrets import Keyring, Malformed
from latchkey_service.verdict import TokenRecord, Verdict, decide

__all__ = ["Answer", "Question", "Verifier"]


class Answer(NamedTuple):
    """A verdict, the token if the secret has one, and the revision read (0: nothing was read)."""

    verdict: Verdict
    record: TokenRecord | None = None
    revision: int = 0


# A presented secret and the number of the scope that is asked for.
Question = tuple[str, int]

_MALFORMED = Answer(Verdict.MALFORMED)
_UNKNOWN = Answer(Verdict.UNKNOWN)


class Verifier:
    """Answers verifies. Fails closed: when Postgres cannot be read, it raises StoreUnavailable."""

    def __init__(self, keyring: Keyring, lookup: Lookup, now: Callable[[], datetime]) -> None:
        self._keyring = keyring
        self._lookup = lookup
        self._now = now

    async def verify(self, presented: str, required_scope: int, deadline: float) -> Answer:
        """Return the answer to one question. At most one round trip, shared with others'.

        Raises StoreUnavailable, Overloaded, and Unavailable at `deadline` (monotonic seconds).
        """
        digest = self._parse(presented)
        if isinstance(digest, Answer):
            return digest
        found = await self._lookup.find(digest, deadline)
        # The clock is read after the wait: expiry is judged at the moment of the answer.
        verdict = decide(found.record, required_scope, self._now())
        return Answer(verdict, found.record, found.revision)

    async def verify_batch(self, questions: Sequence[Question], deadline: float) -> list[Answer]:
        """Return the answers to up to 1,000 questions, in order, at the cost of one `verify`."""
        parsed = [self._parse(presented) for presented, _ in questions]
        digests = [digest for digest in parsed if isinstance(digest, bytes)]
        founds = iter(await self._lookup.find_all(digests, deadline) if digests else ())
        now = self._now()
        answers = []
        for digest, (_, required_scope) in zip(parsed, questions, strict=True):
            if isinstance(digest, Answer):
                answers.append(digest)
            else:
                found = next(founds)
                verdict = decide(found.record, required_scope, now)
                answers.append(Answer(verdict, found.record, found.revision))
        return answers

    def _parse(self, presented: str) -> bytes | Answer:
        """Return the digest to look up, or the answer where none is needed."""
        try:
            digest = self._keyring.digest_of(presented)
        except Malformed:
            return _MALFORMED
        return _UNKNOWN if digest is None else digest

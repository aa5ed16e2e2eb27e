"""Faults in the shares of tokens with a rate limit (rule 13)."""

from __future__ import annotations

from typing import Any

from latchkey import Verdict, Verification, _shares, verifier
from latchkey._entry import CacheEntry
from latchkey._shares import ShareLog, SharesReceived
from latchkey.verifier import Verifier
from latchkey_coherence.rate import RateLimit, Share, Shares, share_end
from latchkey_coherence.verdict_cache import Position, VerdictCache

from tests.conformance.mutants.base import Patch, mutant, on_store


@mutant(13, "a-limited-token-at-no-position")
def keeps_limited_tokens_at_no_position(patch: Patch) -> None:
    def change(cache: VerdictCache[Any], _entry: Any, position: Position) -> Position:
        return position if position.mark else cache.position

    on_store(patch, change)


@mutant(13, "a-limited-token-without-a-share")
def ignores_limits(patch: Patch) -> None:
    patch.setattr(Share, "spend", lambda _self, _now: True)


@mutant(13, "calls-are-spent-once")
def spends_calls_twice(patch: Patch) -> None:
    add = Share.add
    patch.setattr(Share, "add", lambda self, calls, ends: add(self, 2 * calls, ends))


@mutant(13, "calls-end")
def counts_calls_from_their_arrival(patch: Patch) -> None:
    receive = ShareLog.receive

    def mutated(self: ShareLog, answer: SharesReceived) -> None:
        if self._asked is not None:
            self._asked = (self._asked[0], vars(verifier)["boottime"]())
        receive(self, answer)

    patch.setattr(ShareLog, "receive", mutated)


@mutant(13, "calls-end")
def subtracts_nothing_for_clocks(patch: Patch) -> None:
    patch.setattr(_shares, "share_end", lambda began, seconds: began + min(seconds, 1.0))


@mutant(13, "calls-that-last-too-long")
def believes_any_duration(patch: Patch) -> None:
    patch.setattr(_shares, "share_end", lambda began, seconds: began + seconds * 0.999)


@mutant(13, "shorter-calls")
def keeps_calls_for_a_second(patch: Patch) -> None:
    patch.setattr(_shares, "share_end", lambda began, _seconds: share_end(began))


@mutant(13, "calls-under-another-limit")
def ignores_the_limit_of_calls(patch: Patch) -> None:
    patch.setattr(Shares, "find", lambda self, token_id, _limit: self._by_token.get(token_id))


@mutant(13, "calls-that-answer-no-question")
def believes_any_number(patch: Patch) -> None:
    receive = ShareLog.receive

    def mutated(self: ShareLog, answer: SharesReceived) -> None:
        self._asked = (answer.number, vars(verifier)["boottime"]())
        receive(self, answer)

    patch.setattr(ShareLog, "receive", mutated)


@mutant(13, "a-tighter-limit")
def keeps_calls_under_a_new_limit(patch: Patch) -> None:
    kept: dict[str, Share] = {}

    def mutated(self: Shares, token_id: str, limit: RateLimit) -> Share:
        share = self._by_token[token_id] = kept.setdefault(token_id, Share(token_id, limit))
        return share

    patch.setattr(Shares, "of", mutated)


@mutant(13, "only-valid-spends-a-call")
def spends_before_it_decides(patch: Patch) -> None:
    other_answer = Verifier._other_answer

    def mutated(
        self: Verifier, entry: CacheEntry, answer: Verification, secret: str, now: float
    ) -> Verification | None:
        if entry.share is not None and answer.verdict is not Verdict.VALID:
            entry.share.spend(now)
        return other_answer(self, entry, answer, secret, now)

    patch.setattr(Verifier, "_other_answer", mutated)


@mutant(13, "a-refusal-until-its-time")
def refuses_for_ever(patch: Patch) -> None:
    deny = Share.deny
    patch.setattr(Share, "deny", lambda self, _until: deny(self, 1e6))


@mutant(13, "a-question-for-no-more-than-was-used")
def asks_for_all_that_the_limit_permits(patch: Patch) -> None:
    patch.setattr(Share, "ask", lambda self, _now: self.limit.ahead_max)

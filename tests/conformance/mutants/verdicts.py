"""Faults in the stored verdicts and in the answers (rules 4 and 5)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from latchkey import Scope, Verdict, Verification, _entry, verifier
from latchkey._entry import CacheEntry, cache_entry
from latchkey._subscription import Subscription
from latchkey_coherence import verdict
from latchkey_coherence.verdict_cache import Position, VerdictCache

from tests.conformance.mutants.base import Patch, mutant, on_store


@mutant(4, "a-verdict-named-since")
def keeps_a_verdict_named_since(patch: Patch) -> None:
    def change(cache: VerdictCache[Any], entry: Any, position: Position) -> Position:
        cache._named.pop(entry.token_id, None)
        return position

    on_store(patch, change)


@mutant(4, "an-unknown-secret")
def keeps_unknown(patch: Patch) -> None:
    def mutated(
        answer: Verification, scope: Scope | None, keep_until: float, *question: Any
    ) -> CacheEntry | None:
        if answer.verdict is Verdict.UNKNOWN:
            return CacheEntry("", answer, None, keep_until)
        return cache_entry(answer, scope, keep_until, *question)

    patch.setattr(verifier, "cache_entry", mutated)


@mutant(4, "a-token-with-a-narrow-scope")
def answers_every_scope_alike(patch: Patch) -> None:
    def mutated(
        answer: Verification, scope: Scope | None, keep_until: float, *question: Any
    ) -> CacheEntry | None:
        entry = cache_entry(answer, scope, keep_until, *question)
        if entry is not None:
            entry.ready_write = entry.ready_read
        return entry

    patch.setattr(verifier, "cache_entry", mutated)


@mutant(4, "final-verdicts")
def keeps_no_final_verdict(patch: Patch) -> None:
    def mutated(
        answer: Verification, scope: Scope | None, keep_until: float, *question: Any
    ) -> CacheEntry | None:
        final = answer.verdict in (Verdict.DELETED, Verdict.EXPIRED)
        return None if final else cache_entry(answer, scope, keep_until, *question)

    patch.setattr(verifier, "cache_entry", mutated)


@mutant(4, "an-insufficient-scope")
def keeps_valid_alone(patch: Patch) -> None:
    def mutated(
        answer: Verification, scope: Scope | None, keep_until: float, *question: Any
    ) -> CacheEntry | None:
        return cache_entry(answer, scope, keep_until, *question) if answer.allowed else None

    patch.setattr(verifier, "cache_entry", mutated)


@mutant(4, "a-token-limited-to-networks")
def ignores_networks(patch: Patch) -> None:
    def mutated(
        answer: Verification, scope: Scope | None, keep_until: float, *question: Any
    ) -> CacheEntry | None:
        entry = cache_entry(answer, scope, keep_until, *question)
        if entry is not None:
            entry.networks = None
            entry.read = entry.ready_read = entry.ready_write = answer
        return entry

    patch.setattr(verifier, "cache_entry", mutated)


@mutant(4, "required-permissions")
def ignores_permissions(patch: Patch) -> None:
    patch.setattr(verdict, "includes", lambda granted, required: True)


@mutant(4, "a-disabled-token")
def judges_a_disabled_token_by_its_scope(patch: Patch) -> None:
    def mutated(
        answer: Verification, scope: Scope | None, keep_until: float, *question: Any
    ) -> CacheEntry | None:
        if answer.verdict is Verdict.DISABLED:
            answer = replace(answer, verdict=Verdict.VALID)
            scope, question = Scope.READ, ("10.1.2.3", ())
        return cache_entry(answer, scope, keep_until, *question)

    patch.setattr(verifier, "cache_entry", mutated)


@mutant(4, "a-verdict-that-the-client-does-not-know")
def keeps_what_it_does_not_know(patch: Patch) -> None:
    patch.setattr(_entry, "_FINAL", (*_entry._FINAL, Verdict.UNSPECIFIED))


@mutant(4, "an-answer-that-the-client-would-not-give")
def trusts_its_own_rules(patch: Patch) -> None:
    def mutated(
        answer: Verification, scope: Scope | None, keep_until: float, *question: Any
    ) -> CacheEntry | None:
        assert answer.token is not None
        return CacheEntry(answer.token.id, answer, None, keep_until)

    patch.setattr(verifier, "cache_entry", mutated)


@mutant(4, "a-cache-of-size-zero")
def keeps_in_a_memory_of_no_size(patch: Patch) -> None:
    def change(cache: VerdictCache[Any], entry: Any, position: Position) -> Position:
        cache.entries_max = max(1, cache.entries_max)
        return position

    on_store(patch, change)


@mutant(5, "a-lease-ends-on-time")
def answers_after_the_lease(patch: Patch) -> None:
    extend = Subscription.extend
    patch.setattr(
        Subscription, "extend", lambda self, stream, end: extend(self, stream, end + 10.0)
    )


@mutant(5, "a-verdict-without-a-lease")
def keeps_without_a_lease(patch: Patch) -> None:
    keep = verifier.Verifier._store

    def mutated(
        self: verifier.Verifier,
        secret: str,
        scope: Scope | None,
        answer: Verification,
        *question: Any,
    ) -> None:
        end, self._lease.end = self._lease.end, math.inf
        keep(self, secret, scope, answer, *question)
        self._lease.end = end

    patch.setattr(verifier.Verifier, "_store", mutated)

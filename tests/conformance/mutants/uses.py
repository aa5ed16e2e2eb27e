"""Faults in the reports of uses."""

from __future__ import annotations

from collections.abc import Collection

from latchkey import Scope, Verification
from latchkey._entry import CacheEntry
from latchkey._subscription import Stream
from latchkey._uses import UseLog, _merge
from latchkey.verifier import Verifier

from tests.conformance.mutants.base import Patch, mutant


@mutant(6, "uses-of-answers-from-the-cache")
def counts_every_answer(patch: Patch) -> None:
    def mutated(
        self: Verifier, entry: CacheEntry, answer: Verification, secret: str, now: float
    ) -> Verification:
        entry.uses += 1
        entry.last_use = now
        if entry.idle:
            self._begin_use(entry, secret, now)
        return answer

    patch.setattr(Verifier, "_other_answer", mutated)


@mutant(6, "uses-of-answers-from-the-cache")
def counts_what_the_service_answered(patch: Patch) -> None:
    store = Verifier._store

    def mutated(
        self: Verifier,
        secret: str,
        scope: Scope | None,
        answer: Verification,
        client_address: str = "",
        permissions: Collection[str] = (),
    ) -> None:
        store(self, secret, scope, answer, client_address, permissions)
        self.verify_nowait(secret, scope, client_address=client_address, permissions=permissions)

    patch.setattr(Verifier, "_store", mutated)


@mutant(6, "a-lost-report")
def repeats_the_counts_of_a_lost_report(patch: Patch) -> None:
    def mutated(self: UseLog) -> None:
        for spans in self._sent.values():
            for key, span in spans.items():
                _merge(self._unsure, key, span.first, span.last, span.count)
        self._sent.clear()

    patch.setattr(UseLog, "lose", mutated)


@mutant(6, "the-last-uses")
def stops_without_a_last_report(patch: Patch) -> None:
    patch.setattr(Stream, "hand_on", Stream.retire)

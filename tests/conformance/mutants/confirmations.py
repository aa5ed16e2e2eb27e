"""Faults in confirmations and releases (rule 7)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from latchkey._subscription import Event, Invalidation, Stream, Subscription
from latchkey_coherence.verdict_cache import Position, VerdictCache

from tests.conformance.mutants.base import Patch, mutant, on_receive


@mutant(7, "an-invalidation-drops-its-tokens")
def confirms_before_it_applies(patch: Patch) -> None:
    apply = Subscription.apply
    later: list[Iterable[str]] = [()]

    def mutated(self: Subscription, position: Position, token_ids: Iterable[str]) -> bool:
        later.append(tuple(token_ids))
        return apply(self, position, later.pop(0))

    patch.setattr(Subscription, "apply", mutated)


@mutant(7, "an-invalidation-of-many-tokens")
def applies_the_first_token_alone(patch: Patch) -> None:
    apply = Subscription.apply
    patch.setattr(
        Subscription, "apply", lambda self, position, ids: apply(self, position, tuple(ids)[:1])
    )


@mutant(7, "a-confirmation-comes-at-once")
def confirms_with_the_next_request(patch: Patch) -> None:
    receive = Stream.receive

    def mutated(self: Stream, event: Event | None, now: float) -> None:
        receive(self, event, now)
        if isinstance(event, Invalidation):
            self._owes_ack = False

    patch.setattr(Stream, "receive", mutated)


@mutant(7, "an-invalidation-without-tokens")
def confirms_what_names_tokens_alone(patch: Patch) -> None:
    on_receive(
        patch,
        lambda _stream, event, _now: not (isinstance(event, Invalidation) and not event.token_ids),
    )


@mutant(7, "a-confirmation-without-a-lease")
def confirms_under_a_lease_alone(patch: Patch) -> None:
    take = Stream.take

    def mutated(self: Stream, now: float) -> Any:
        if not self.granted and not self._retired:
            self._owes_ack = False
        return take(self, now)

    patch.setattr(Stream, "take", mutated)


@mutant(7, "an-invalidation-that-was-applied-before")
def goes_back_to_an_earlier_revision(patch: Patch) -> None:
    apply = VerdictCache.apply

    def mutated(self: VerdictCache[Any], position: Position, token_ids: Iterable[str]) -> None:
        apply(self, position, token_ids)
        self.position = position

    patch.setattr(VerdictCache, "apply", mutated)


@mutant(7, "a-release")
def sends_no_release(patch: Patch) -> None:
    retire = Stream.retire

    def mutated(self: Stream) -> None:
        retire(self)
        self._owes_release = False

    patch.setattr(Stream, "retire", mutated)


@mutant(7, "a-release")
def answers_on_after_a_release(patch: Patch) -> None:
    release = Subscription.release

    def mutated(self: Subscription) -> None:
        end = self.lease.end
        release(self)
        self.lease.end = end

    patch.setattr(Subscription, "release", mutated)


@mutant(7, "a-release-with-an-open-request")
def counts_grants_after_a_release(patch: Patch) -> None:
    def mutated(self: Subscription) -> None:
        self.lease.drop()

    patch.setattr(Subscription, "release", mutated)


@mutant(7, "a-release-with-a-second-stream")
def releases_one_stream_alone(patch: Patch) -> None:
    release = Subscription.release

    def mutated(self: Subscription) -> None:
        epoch = self._epoch
        release(self)
        self._epoch = epoch

    patch.setattr(Subscription, "release", mutated)

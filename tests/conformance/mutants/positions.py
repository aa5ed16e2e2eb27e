"""Faults that confuse histories (rule 12)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from latchkey import verifier
from latchkey._entry import cache_entry
from latchkey._subscription import Event, Grant, Invalidation, Reset, Stream, Subscription
from latchkey_coherence.verdict_cache import NOWHERE, Position, VerdictCache

from tests.conformance.mutants.base import Patch, mutant, on_grant, on_receive, on_store


@mutant(12, "a-grant-with-another-mark")
def ignores_marks(patch: Patch) -> None:
    patch.setattr(VerdictCache, "knows", lambda self, position: position.revision in self._marks)
    patch.setattr(VerdictCache, "agrees", lambda _self, _position: True)


@mutant(12, "a-grant-for-an-unknown-revision")
def accepts_a_grant_of_any_position(patch: Patch) -> None:
    on_grant(
        patch,
        lambda stream, grant, _: replace(grant, position=stream._subscription.cache.position),
    )


@mutant(12, "a-grant-before-a-position")
def begins_with_a_known_position(patch: Patch) -> None:
    knows = VerdictCache.knows
    patch.setattr(
        VerdictCache, "knows", lambda self, position: position == NOWHERE or knows(self, position)
    )


@mutant(12, "a-grant-at-an-earlier-known-position")
def accepts_grants_at_its_own_position_alone(patch: Patch) -> None:
    def change(stream: Stream, grant: Grant, _: float) -> Grant:
        exact = grant.position == stream._subscription.cache.position
        return grant if exact else replace(grant, number=-1)

    on_grant(patch, change)


@mutant(12, "marks-have-64-bits")
def keeps_marks_in_floating_point(patch: Patch) -> None:
    def knows(self: VerdictCache[Any], position: Position) -> bool:
        mark = self._marks.get(position.revision)
        return mark is not None and float(mark) == float(position.mark)

    patch.setattr(VerdictCache, "knows", knows)


def believe_the_mark_zero(patch: Patch) -> None:
    """Treat stored positions with the mark 0 as known."""
    patch.setattr(
        VerdictCache,
        "knows",
        lambda self, position: self._marks.get(position.revision) == position.mark,
    )


@mutant(12, "an-invalidation-without-a-mark")
def knows_revisions_without_marks(patch: Patch) -> None:
    believe_the_mark_zero(patch)
    apply = VerdictCache.apply

    def mutated(self: VerdictCache[Any], position: Position, token_ids: Iterable[str]) -> None:
        apply(self, position, token_ids)
        self._marks.setdefault(position.revision, position.mark)

    patch.setattr(VerdictCache, "apply", mutated)


@mutant(12, "a-reset-without-a-mark")
def knows_resets_without_marks(patch: Patch) -> None:
    believe_the_mark_zero(patch)
    reset = VerdictCache.reset

    def mutated(self: VerdictCache[Any], position: Position) -> None:
        reset(self, position)
        self._marks[position.revision] = position.mark

    patch.setattr(VerdictCache, "reset", mutated)


@mutant(12, "a-conflict-of-marks")
def ignores_a_conflict(patch: Patch) -> None:
    patch.setattr(VerdictCache, "agrees", lambda _self, _position: True)


@mutant(12, "a-conflict-at-an-earlier-revision")
def looks_for_conflicts_at_its_own_position_alone(patch: Patch) -> None:
    patch.setattr(
        VerdictCache,
        "agrees",
        lambda self, position: (
            position.revision != self.position.revision or position == self.position
        ),
    )


@mutant(12, "a-reset-ends-the-lease")
def keeps_the_lease_at_a_reset(patch: Patch) -> None:
    start_over = Subscription.start_over

    def mutated(self: Subscription, position: Position) -> None:
        end = self.lease.end
        start_over(self, position)
        self.lease.end = end

    patch.setattr(Subscription, "start_over", mutated)


@mutant(12, "a-reset-empties-the-cache")
def keeps_the_memory_at_a_reset(patch: Patch) -> None:
    def mutated(self: VerdictCache[Any], position: Position) -> None:
        self._named.clear()
        self._marks = {position.revision: position.mark} if position.mark else {}
        self.position = position

    patch.setattr(VerdictCache, "reset", mutated)


@mutant(12, "a-verdict-from-before-a-reset")
def keeps_old_positions_at_a_reset(patch: Patch) -> None:
    reset = VerdictCache.reset

    def mutated(self: VerdictCache[Any], position: Position) -> None:
        marks = dict(self._marks)
        reset(self, position)
        self._marks = {**marks, **self._marks}

    patch.setattr(VerdictCache, "reset", mutated)


@mutant(12, "a-reset-to-a-lower-revision")
def never_goes_back(patch: Patch) -> None:
    def before(stream: Stream, event: Event | None, _: float) -> bool:
        applied = stream._subscription.cache.position.revision
        return not (isinstance(event, Reset) and event.position.revision < applied)

    on_receive(patch, before)


@mutant(12, "a-reset-to-the-same-revision")
def takes_a_reset_to_its_own_revision_for_a_repetition(patch: Patch) -> None:
    def before(stream: Stream, event: Event | None, _: float) -> bool:
        applied = stream._subscription.cache.position.revision
        return not (isinstance(event, Reset) and event.position.revision == applied)

    on_receive(patch, before)


@mutant(12, "an-open-request-is-answered-after-a-reset")
def withdraws_its_request_at_a_reset(patch: Patch) -> None:
    def before(stream: Stream, event: Event | None, _: float) -> bool:
        if isinstance(event, Reset):
            stream._asked_at = None
        return True

    on_receive(patch, before)


@mutant(12, "a-reset-ends-the-lease")
def does_not_ask_again_after_a_reset(patch: Patch) -> None:
    reset = Stream._reset

    def mutated(self: Stream, position: Position, now: float) -> None:
        ask_at = self._ask_at
        reset(self, position, now)
        self._ask_at = ask_at

    patch.setattr(Stream, "_reset", mutated)


@mutant(12, "a-reset-after-closing")
def asks_a_closing_stream(patch: Patch) -> None:
    reset = Stream._reset

    def mutated(self: Stream, position: Position, now: float) -> None:
        reset(self, position, now)
        if self._asked_at is None:
            self._ask_at = now

    patch.setattr(Stream, "_reset", mutated)


@mutant(12, "a-second-stream-that-skips-ahead")
def follows_two_streams_at_once(patch: Patch) -> None:
    def before(stream: Stream, _event: Event | None, _now: float) -> bool:
        stream._left_at = stream._subscription.cache.position
        return True

    on_receive(patch, before)


@mutant(12, "a-second-stream-that-skips-ahead")
def evicts_nothing_for_a_stream_that_skips_ahead(patch: Patch) -> None:
    receive = Stream._receive_invalidation

    def mutated(self: Stream, event: Invalidation, now: float) -> None:
        cache = self._subscription.cache
        apart = cache.position != self._left_at and not cache.knows(event.position)
        if apart and event.position.revision > cache.position.revision:
            event = replace(event, token_ids=())
        receive(self, event, now)

    patch.setattr(Stream, "_receive_invalidation", mutated)


@mutant(12, "the-stream-in-use-skips-ahead")
def leaves_the_stream_in_use_when_it_skips_ahead(patch: Patch) -> None:
    patch.setattr(Subscription, "granted_by", lambda _self, _stream: False)


@mutant(12, "a-second-stream-that-skips-ahead")
def starts_over_for_a_stream_that_skips_ahead(patch: Patch) -> None:
    patch.setattr(Subscription, "granted_by", lambda _self, _stream: True)


@mutant(12, "two-streams-take-turns")
def takes_every_second_stream_for_another_history(patch: Patch) -> None:
    receive = Stream._receive_invalidation

    def mutated(self: Stream, event: Invalidation, now: float) -> None:
        left_at = self._left_at
        receive(self, event, now)
        self._left_at = left_at

    patch.setattr(Stream, "_receive_invalidation", mutated)


@mutant(12, "a-grant-from-before-a-reset")
def lets_old_grants_last_after_a_reset(patch: Patch) -> None:
    knows = VerdictCache.knows
    known: set[Position] = set()

    def mutated(self: VerdictCache[Any], position: Position) -> bool:
        if knows(self, position):
            known.add(position)
        return position in known

    patch.setattr(VerdictCache, "knows", mutated)


@mutant(12, "grants-of-other-streams-after-a-reset")
def keeps_other_streams_after_a_reset(patch: Patch) -> None:
    def mutated(self: Stream) -> None:
        self._epoch = self._subscription.epoch

    patch.setattr(Stream, "_notice_other_history", mutated)


@mutant(12, "a-verdict-of-a-higher-revision")
def keeps_a_verdict_of_a_higher_revision(patch: Patch) -> None:
    on_store(
        patch,
        lambda cache, _entry, position: (
            cache.position if position.revision > cache.position.revision else position
        ),
    )


@mutant(12, "a-verdict-with-another-mark")
def keeps_a_verdict_with_another_mark(patch: Patch) -> None:
    on_store(
        patch,
        lambda cache, _entry, position: Position(
            position.revision, cache._marks.get(position.revision, 0)
        ),
    )


@mutant(12, "a-verdict-without-a-mark")
def keeps_a_verdict_without_a_mark(patch: Patch) -> None:
    on_store(
        patch,
        lambda cache, _entry, position: position if position.mark else cache.position,
    )


@mutant(12, "a-verdict-of-a-revision-before-the-first-known")
def keeps_a_verdict_from_before_its_time(patch: Patch) -> None:
    on_store(
        patch,
        lambda cache, _entry, position: (
            cache.position if position.revision < min(cache._marks, default=0) else position
        ),
    )


@mutant(12, "several-revisions-in-one-event")
def keeps_a_verdict_of_a_skipped_revision(patch: Patch) -> None:
    def change(cache: VerdictCache[Any], _entry: Any, position: Position) -> Position:
        between = min(cache._marks, default=0) < position.revision < cache.position.revision
        skipped = between and position.revision not in cache._marks
        return cache.position if skipped else position

    on_store(patch, change)


@mutant(12, "several-revisions-in-one-event")
def keeps_verdicts_at_its_own_position_alone(patch: Patch) -> None:
    on_store(
        patch,
        lambda cache, _entry, position: position if position == cache.position else NOWHERE,
    )


@mutant(12, "an-event-that-is-not-known")
def ignores_an_unknown_event(patch: Patch) -> None:
    on_receive(patch, lambda _stream, event, _now: event is not None)


@mutant(12, "a-verdict-under-way-at-an-unknown-event")
def keeps_positions_at_an_unknown_event(patch: Patch) -> None:
    def before(stream: Stream, event: Event | None, _: float) -> bool:
        if event is None:
            stream._subscription.cache.entries.clear()
            stream._subscription.cache._of_token.clear()
        return event is not None

    on_receive(patch, before)


@mutant(12, "a-verdict-that-is-too-old")
def keeps_verdicts_for_ever(patch: Patch) -> None:
    patch.setattr(
        verifier, "cache_entry", lambda answer, scope, *_: cache_entry(answer, scope, math.inf)
    )


@mutant(12, "a-broken-stream")
def begins_again_with_each_stream(patch: Patch) -> None:
    open_stream = Subscription.open

    def mutated(self: Subscription, now: float) -> Stream:
        self.cache.reset(NOWHERE)
        return open_stream(self, now)

    patch.setattr(Subscription, "open", mutated)

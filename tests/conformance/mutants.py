"""Faults in a client's core, each of which breaks one rule, and the cases that find them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from latchkey import Scope, Verdict, Verification, _subscription, verifier
from latchkey._entry import Remembered, remembered
from latchkey._subscription import Closing, Event, Grant, Invalidation, Reset, Stream, Subscription
from latchkey_coherence.memory import NOWHERE, Memory, Position

__all__ = ["MUTANTS", "Mutant"]

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutant:
    """A fault, the rule that it breaks, and a case that has to find it."""

    rule: int
    case: str
    apply: Callable[[Patch], None]

    @property
    def name(self) -> str:
        return self.apply.__name__


MUTANTS: list[Mutant] = []


def mutant(rule: int, case: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Enter a fault into `MUTANTS`."""

    def enter(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS.append(Mutant(rule, case, apply))
        return apply

    return enter


def on_receive(patch: Patch, before: Callable[[Stream, Event | None, float], bool]) -> None:
    """Call `before` first. If it returns False, the stream does not receive the event."""
    receive = Stream.receive

    def mutated(self: Stream, event: Event | None, now: float) -> None:
        if before(self, event, now):
            receive(self, event, now)

    patch.setattr(Stream, "receive", mutated)


def on_grant(patch: Patch, change: Callable[[Stream, Grant, float], Grant]) -> None:
    """Let a stream receive what `change` makes of a grant."""
    receive_grant = Stream._receive_grant

    def mutated(self: Stream, grant: Grant, now: float) -> None:
        receive_grant(self, change(self, grant, now), now)

    patch.setattr(Stream, "_receive_grant", mutated)


def on_admit(patch: Patch, change: Callable[[Memory[Any], Any, Position], Position]) -> None:
    """Let a memory take a verdict for one that was read at the position that `change` returns."""
    admit = Memory.admit

    def mutated(self: Memory[Any], key: bytes, entry: Any, position: Position) -> bool:
        return admit(self, key, entry, change(self, entry, position))

    patch.setattr(Memory, "admit", mutated)


# Rule 4: which verdicts enter the memory.


@mutant(4, "a-verdict-named-since")
def keeps_a_verdict_named_since(patch: Patch) -> None:
    def change(memory: Memory[Any], entry: Any, position: Position) -> Position:
        memory._named.pop(entry.token_id, None)
        return position

    on_admit(patch, change)


@mutant(4, "an-unknown-secret")
def keeps_unknown(patch: Patch) -> None:
    def mutated(answer: Verification, scope: Scope | None, keep_until: float) -> Remembered | None:
        if answer.verdict is Verdict.UNKNOWN:
            return Remembered("", answer, answer, None, keep_until)
        return remembered(answer, scope, keep_until)

    patch.setattr(verifier, "remembered", mutated)


@mutant(4, "a-token-with-a-narrow-scope")
def answers_every_scope_alike(patch: Patch) -> None:
    def mutated(answer: Verification, scope: Scope | None, keep_until: float) -> Remembered | None:
        entry = remembered(answer, scope, keep_until)
        if entry is not None:
            entry.write = entry.read
        return entry

    patch.setattr(verifier, "remembered", mutated)


@mutant(4, "final-verdicts")
def keeps_no_final_verdict(patch: Patch) -> None:
    def mutated(answer: Verification, scope: Scope | None, keep_until: float) -> Remembered | None:
        final = answer.verdict in (Verdict.DELETED, Verdict.EXPIRED)
        return None if final else remembered(answer, scope, keep_until)

    patch.setattr(verifier, "remembered", mutated)


@mutant(4, "an-insufficient-scope")
def keeps_valid_alone(patch: Patch) -> None:
    def mutated(answer: Verification, scope: Scope | None, keep_until: float) -> Remembered | None:
        return remembered(answer, scope, keep_until) if answer.allowed else None

    patch.setattr(verifier, "remembered", mutated)


@mutant(4, "a-memory-of-no-size")
def keeps_in_a_memory_of_no_size(patch: Patch) -> None:
    def change(memory: Memory[Any], entry: Any, position: Position) -> Position:
        memory.entries_max = max(1, memory.entries_max)
        return position

    on_admit(patch, change)


# Rule 5: answers are given under a lease.


@mutant(5, "a-lease-ends-on-time")
def answers_after_the_lease(patch: Patch) -> None:
    extend = Subscription.extend
    patch.setattr(
        Subscription, "extend", lambda self, stream, end: extend(self, stream, end + 10.0)
    )


@mutant(5, "a-verdict-without-a-lease")
def keeps_without_a_lease(patch: Patch) -> None:
    keep = verifier.Verifier._remember

    def mutated(
        self: verifier.Verifier, secret: str, scope: Scope | None, answer: Verification
    ) -> None:
        end, self._lease.end = self._lease.end, math.inf
        keep(self, secret, scope, answer)
        self._lease.end = end

    patch.setattr(verifier.Verifier, "_remember", mutated)


# Rule 6: grants.


@mutant(6, "the-first-message")
def waits_for_the_server_to_begin(patch: Patch) -> None:
    open_stream = Subscription.open

    def mutated(self: Subscription, now: float) -> Stream:
        stream = open_stream(self, now)
        stream._ask_at = None
        return stream

    patch.setattr(Subscription, "open", mutated)


@mutant(6, "a-lease-counts-from-before-its-request")
def counts_from_the_answer(patch: Patch) -> None:
    def change(stream: Stream, grant: Grant, now: float) -> Grant:
        if stream._asked_at is not None:
            stream._asked_at = now
        return grant

    on_grant(patch, change)


@mutant(6, "a-grant-of-another-number")
def accepts_any_number(patch: Patch) -> None:
    on_grant(patch, lambda stream, grant, _: replace(grant, number=stream._number))


@mutant(6, "a-grant-of-an-old-number")
def accepts_an_old_number(patch: Patch) -> None:
    on_grant(
        patch,
        lambda stream, grant, _: (
            replace(grant, number=stream._number) if 0 < grant.number < stream._number else grant
        ),
    )


@mutant(6, "a-grant-of-number-zero")
def accepts_number_zero(patch: Patch) -> None:
    on_grant(
        patch,
        lambda stream, grant, _: grant if grant.number else replace(grant, number=stream._number),
    )


@mutant(6, "a-grant-that-comes-twice")
def accepts_a_grant_twice(patch: Patch) -> None:
    receive_grant = Stream._receive_grant

    def mutated(self: Stream, grant: Grant, now: float) -> None:
        asked_at = self._asked_at
        receive_grant(self, grant, now)
        self._asked_at = self._asked_at or asked_at

    patch.setattr(Stream, "_receive_grant", mutated)


@mutant(6, "a-lease-ends-on-time")
def takes_clocks_for_equal(patch: Patch) -> None:
    patch.setattr(_subscription, "client_lease_end", lambda asked, seconds: asked + seconds)


@mutant(6, "a-grant-that-is-too-long")
def believes_in_endless_grants(patch: Patch) -> None:
    patch.setattr(_subscription, "LEASE_SECONDS_MAX", math.inf)


@mutant(6, "a-grant-that-has-ended-on-arrival")
def asks_without_a_pause(patch: Patch) -> None:
    patch.setattr(_subscription, "ASK_GAP_SECONDS", 0.0)


@mutant(6, "asking-again-in-time")
def asks_too_early(patch: Patch) -> None:
    patch.setattr(Subscription, "ask_share", lambda _: 0.9)


@mutant(6, "asking-again-in-time")
def asks_too_late(patch: Patch) -> None:
    patch.setattr(Subscription, "ask_share", lambda _: 0.0)


@mutant(6, "asking-again-in-time")
def waits_for_ever_for_the_next_grant(patch: Patch) -> None:
    patch.setattr(_subscription, "LATE_SHARE", -math.inf)


@mutant(6, "a-stream-that-never-grants")
def waits_for_ever_for_the_first_grant(patch: Patch) -> None:
    patch.setattr(_subscription, "FIRST_GRANT_SECONDS", math.inf)


@mutant(6, "a-lease-of-one-stream-only-grows")
def lets_a_lease_shrink(patch: Patch) -> None:
    def change(stream: Stream, grant: Grant, _: float) -> Grant:
        stream._end = -math.inf
        return grant

    on_grant(patch, change)


@mutant(6, "a-second-stream-takes-over")
def keeps_the_longer_of_two_leases(patch: Patch) -> None:
    extend = Subscription.extend
    patch.setattr(
        Subscription,
        "extend",
        lambda self, stream, end: extend(self, stream, max(end, self.lease.end)),
    )


@mutant(6, "a-second-stream-takes-over")
def counts_grants_of_two_streams(patch: Patch) -> None:
    def mutated(self: Subscription, stream: Stream, end: float) -> None:
        self._granting = stream
        self.lease.end = end

    patch.setattr(Subscription, "extend", mutated)


@mutant(6, "a-second-stream-before-its-first-grant")
def leaves_a_stream_too_early(patch: Patch) -> None:
    def before(stream: Stream, event: Event | None, _: float) -> bool:
        granting = stream._subscription._granting
        if granting is not None and granting is not stream:
            granting.retire()
        return True

    on_receive(patch, before)


@mutant(6, "events-of-a-released-stream")
def obeys_a_released_stream(patch: Patch) -> None:
    def before(stream: Stream, _event: Event | None, _now: float) -> bool:
        stream._retired = False
        return True

    on_receive(patch, before)


@mutant(6, "closing-asks-no-more")
def ignores_closing(patch: Patch) -> None:
    on_receive(patch, lambda _stream, event, _now: not isinstance(event, Closing))


@mutant(6, "closing-asks-no-more")
def hears_nothing_after_closing(patch: Patch) -> None:
    on_receive(patch, lambda stream, _event, _now: not stream.closing)


@mutant(6, "moving-after-closing")
def drops_the_lease_at_closing(patch: Patch) -> None:
    def before(stream: Stream, event: Event | None, _: float) -> bool:
        if isinstance(event, Closing):
            stream._subscription.lease.drop()
        return True

    on_receive(patch, before)


@mutant(6, "a-grant-after-closing")
def counts_grants_after_closing(patch: Patch) -> None:
    def before(stream: Stream, event: Event | None, _: float) -> bool:
        if isinstance(event, Closing):
            stream.closing = True
            return False
        return True

    on_receive(patch, before)


# Rule 7: confirmations.


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
    apply = Memory.apply

    def mutated(self: Memory[Any], position: Position, token_ids: Iterable[str]) -> None:
        apply(self, position, token_ids)
        self.position = position

    patch.setattr(Memory, "apply", mutated)


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


# Rule 12: positions.


@mutant(12, "a-grant-with-another-mark")
def ignores_marks(patch: Patch) -> None:
    patch.setattr(Memory, "knows", lambda self, position: position.revision in self._marks)
    patch.setattr(Memory, "agrees", lambda _self, _position: True)


@mutant(12, "a-grant-for-an-unknown-revision")
def accepts_a_grant_of_any_position(patch: Patch) -> None:
    on_grant(
        patch,
        lambda stream, grant, _: replace(grant, position=stream._subscription.memory.position),
    )


@mutant(12, "a-grant-before-a-position")
def begins_with_a_known_position(patch: Patch) -> None:
    knows = Memory.knows
    patch.setattr(
        Memory, "knows", lambda self, position: position == NOWHERE or knows(self, position)
    )


@mutant(12, "a-grant-at-an-earlier-known-position")
def accepts_grants_at_its_own_position_alone(patch: Patch) -> None:
    def change(stream: Stream, grant: Grant, _: float) -> Grant:
        exact = grant.position == stream._subscription.memory.position
        return grant if exact else replace(grant, number=-1)

    on_grant(patch, change)


@mutant(12, "marks-have-64-bits")
def keeps_marks_in_floating_point(patch: Patch) -> None:
    def knows(self: Memory[Any], position: Position) -> bool:
        mark = self._marks.get(position.revision)
        return mark is not None and float(mark) == float(position.mark)

    patch.setattr(Memory, "knows", knows)


def believe_the_mark_zero(patch: Patch) -> None:
    """Let positions with the mark 0 count as known where they are stored."""
    patch.setattr(
        Memory,
        "knows",
        lambda self, position: self._marks.get(position.revision) == position.mark,
    )


@mutant(12, "an-invalidation-without-a-mark")
def knows_revisions_without_marks(patch: Patch) -> None:
    believe_the_mark_zero(patch)
    apply = Memory.apply

    def mutated(self: Memory[Any], position: Position, token_ids: Iterable[str]) -> None:
        apply(self, position, token_ids)
        self._marks.setdefault(position.revision, position.mark)

    patch.setattr(Memory, "apply", mutated)


@mutant(12, "a-reset-without-a-mark")
def knows_resets_without_marks(patch: Patch) -> None:
    believe_the_mark_zero(patch)
    reset = Memory.reset

    def mutated(self: Memory[Any], position: Position) -> None:
        reset(self, position)
        self._marks[position.revision] = position.mark

    patch.setattr(Memory, "reset", mutated)


@mutant(12, "a-conflict-of-marks")
def ignores_a_conflict(patch: Patch) -> None:
    patch.setattr(Memory, "agrees", lambda _self, _position: True)


@mutant(12, "a-conflict-at-an-earlier-revision")
def looks_for_conflicts_at_its_own_position_alone(patch: Patch) -> None:
    patch.setattr(
        Memory,
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


@mutant(12, "a-reset-empties-the-memory")
def keeps_the_memory_at_a_reset(patch: Patch) -> None:
    def mutated(self: Memory[Any], position: Position) -> None:
        self._named.clear()
        self._marks = {position.revision: position.mark} if position.mark else {}
        self.position = position

    patch.setattr(Memory, "reset", mutated)


@mutant(12, "a-verdict-from-before-a-reset")
def remembers_old_positions_at_a_reset(patch: Patch) -> None:
    reset = Memory.reset

    def mutated(self: Memory[Any], position: Position) -> None:
        marks = dict(self._marks)
        reset(self, position)
        self._marks = {**marks, **self._marks}

    patch.setattr(Memory, "reset", mutated)


@mutant(12, "a-reset-to-a-lower-revision")
def never_goes_back(patch: Patch) -> None:
    def before(stream: Stream, event: Event | None, _: float) -> bool:
        applied = stream._subscription.memory.position.revision
        return not (isinstance(event, Reset) and event.position.revision < applied)

    on_receive(patch, before)


@mutant(12, "a-reset-to-the-same-revision")
def takes_a_reset_to_its_own_revision_for_a_repetition(patch: Patch) -> None:
    def before(stream: Stream, event: Event | None, _: float) -> bool:
        applied = stream._subscription.memory.position.revision
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
    def mutated(self: Stream, _now: float) -> None:
        self._epoch = self._subscription.epoch
        self._end = -math.inf

    patch.setattr(Stream, "_start_over", mutated)


@mutant(12, "a-reset-after-closing")
def asks_a_closing_stream(patch: Patch) -> None:
    def mutated(self: Stream, now: float) -> None:
        self._epoch = self._subscription.epoch
        self._end = -math.inf
        if self._asked_at is None:
            self._ask_at = now

    patch.setattr(Stream, "_start_over", mutated)


@mutant(12, "a-grant-from-before-a-reset")
def lets_old_grants_last_after_a_reset(patch: Patch) -> None:
    knows = Memory.knows
    known: set[Position] = set()

    def mutated(self: Memory[Any], position: Position) -> bool:
        if knows(self, position):
            known.add(position)
        return position in known

    patch.setattr(Memory, "knows", mutated)


@mutant(12, "grants-of-other-streams-after-a-reset")
def keeps_other_streams_after_a_reset(patch: Patch) -> None:
    def mutated(self: Stream) -> None:
        self._epoch = self._subscription.epoch

    patch.setattr(Stream, "_notice_other_history", mutated)


@mutant(12, "a-verdict-of-a-higher-revision")
def keeps_a_verdict_of_a_higher_revision(patch: Patch) -> None:
    on_admit(
        patch,
        lambda memory, _entry, position: (
            memory.position if position.revision > memory.position.revision else position
        ),
    )


@mutant(12, "a-verdict-with-another-mark")
def keeps_a_verdict_with_another_mark(patch: Patch) -> None:
    on_admit(
        patch,
        lambda memory, _entry, position: Position(
            position.revision, memory._marks.get(position.revision, 0)
        ),
    )


@mutant(12, "a-verdict-without-a-mark")
def keeps_a_verdict_without_a_mark(patch: Patch) -> None:
    on_admit(
        patch,
        lambda memory, _entry, position: position if position.mark else memory.position,
    )


@mutant(12, "a-verdict-of-a-revision-before-the-first-known")
def keeps_a_verdict_from_before_its_time(patch: Patch) -> None:
    on_admit(
        patch,
        lambda memory, _entry, position: (
            memory.position if position.revision < min(memory._marks, default=0) else position
        ),
    )


@mutant(12, "several-revisions-in-one-event")
def keeps_a_verdict_of_a_skipped_revision(patch: Patch) -> None:
    def change(memory: Memory[Any], _entry: Any, position: Position) -> Position:
        between = min(memory._marks, default=0) < position.revision < memory.position.revision
        skipped = between and position.revision not in memory._marks
        return memory.position if skipped else position

    on_admit(patch, change)


@mutant(12, "several-revisions-in-one-event")
def keeps_verdicts_at_its_own_position_alone(patch: Patch) -> None:
    on_admit(
        patch,
        lambda memory, _entry, position: position if position == memory.position else NOWHERE,
    )


@mutant(12, "an-event-that-is-not-known")
def ignores_an_unknown_event(patch: Patch) -> None:
    on_receive(patch, lambda _stream, event, _now: event is not None)


@mutant(12, "a-verdict-under-way-at-an-unknown-event")
def remembers_positions_at_an_unknown_event(patch: Patch) -> None:
    def before(stream: Stream, event: Event | None, _: float) -> bool:
        if event is None:
            stream._subscription.memory.entries.clear()
            stream._subscription.memory._of_token.clear()
        return event is not None

    on_receive(patch, before)


@mutant(12, "a-verdict-that-is-too-old")
def keeps_verdicts_for_ever(patch: Patch) -> None:
    patch.setattr(
        verifier, "remembered", lambda answer, scope, _: remembered(answer, scope, math.inf)
    )


@mutant(12, "a-broken-stream")
def begins_again_with_each_stream(patch: Patch) -> None:
    open_stream = Subscription.open

    def mutated(self: Subscription, now: float) -> Stream:
        self.memory.reset(NOWHERE)
        return open_stream(self, now)

    patch.setattr(Subscription, "open", mutated)

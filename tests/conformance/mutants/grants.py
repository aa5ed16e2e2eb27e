"""Faults in streams and their grants (rule 6)."""

from __future__ import annotations

import math
from dataclasses import replace

from latchkey import _subscription
from latchkey._subscription import Closing, Event, Grant, Stream, Subscription

from tests.conformance.mutants.base import Patch, mutant, on_grant, on_receive


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

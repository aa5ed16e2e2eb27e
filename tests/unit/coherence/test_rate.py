"""The core of rate limits: what a bucket issues, what a share spends, and the bound on the sum."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latchkey_coherence.lease import DRIFT_MAX
from latchkey_coherence.rate import (
    AHEAD_SECONDS,
    SHARE_SECONDS,
    RateLimit,
    Share,
    Shares,
    draw,
    share_end,
)

MICROSECONDS = 1_000_000
LIMITS = st.builds(
    RateLimit,
    st.integers(1, 1_000_000),
    st.sampled_from([1, 60, 3_600]),
    st.integers(1, 1_000_000),
)


@given(LIMITS, st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 50)), max_size=60))
def test_bucket_issues_at_most_its_burst_and_its_rate(
    limit: RateLimit, draws: list[tuple[int, int]]
) -> None:
    """In any window, a bucket issues at most the burst and what the rate adds meanwhile."""
    now, full_at = 10**15, 0
    issued: list[tuple[int, int]] = []
    for passed, needed in draws:
        now += passed
        result = draw(limit, full_at, now, needed, needed)
        assert 0 <= result.calls <= 2 * needed
        full_at = result.full_at
        issued.append((now, result.calls))
    for first, (began, _) in enumerate(issued):
        total = 0
        for ended, calls in issued[first:]:
            total += calls
            # Times are whole microseconds, so one more of them may be counted.
            assert total <= limit.burst + limit.per_second * (ended - began + 1) / MICROSECONDS


@given(LIMITS, st.integers(1, 2_000_000))
def test_full_bucket_issues_its_burst_and_then_says_when_it_has_more(
    limit: RateLimit, more: int
) -> None:
    """A full bucket issues exactly its burst. After `retry_seconds` it issues another call, and not
    a microsecond earlier."""
    now = 10**15
    result = draw(limit, 0, now, limit.burst + more, 0)
    assert result.calls == limit.burst
    assert result.retry_seconds > 0
    at = now + round(result.retry_seconds * MICROSECONDS)
    assert draw(limit, result.full_at, at - 1, 1, 0).calls == 0
    assert draw(limit, result.full_at, at, 1, 0).calls == 1


def test_calls_ahead_of_demand_leave_half_for_others() -> None:
    """Waiting verifies come first. What is asked for ahead takes half of the rest, and at most half
    a second's calls."""
    limit = RateLimit(100, 1, 100)
    assert draw(limit, 0, 10**15, 60, 1_000).calls == 60 + 20
    assert draw(limit, 0, 10**15, 0, 1_000).calls == 50
    assert draw(limit, 0, 10**15, 100, 1_000).calls == 100
    slow = RateLimit(100, 60, 100)
    assert draw(slow, 0, 10**15, 0, 1_000).calls == 0


@pytest.mark.parametrize("full_at", [2 * 10**15, 10**18])
def test_clock_that_was_set_back_refuses_no_longer_than_the_bucket_takes_to_fill(
    full_at: int,
) -> None:
    """A time of filling that is too far away counts as an empty bucket."""
    limit = RateLimit(60, 60, 5)
    result = draw(limit, full_at, 10**15, 1, 0)
    assert (result.calls, result.retry_seconds) == (0, 1.0)
    assert draw(limit, result.full_at, 10**15 + 5 * MICROSECONDS, 9, 0).calls == 5


def test_share_begins_empty_and_ends() -> None:
    """A share has only what was added to it, oldest first, and only until it ends."""
    share = Share("t1", RateLimit(10, 1, 10))
    assert not share.spend(0.0)
    share.add(2, 1.0)
    share.add(1, 2.0)
    share.add(0, 9.0)
    assert share.spend(0.5)
    assert share.spend(1.0)
    assert not share.spend(1.0), "the second call of the first part had ended"
    share.add(1, 2.0)
    assert not share.spend(2.0)


def test_share_asks_for_what_was_used() -> None:
    """At most what was used since the last question, scaled to half a second, and without what is
    left."""
    share = Share("t1", RateLimit(100, 1, 100))
    share.count(40)
    assert share.ask(10.0) == 0, "the time since the first use is not known"
    share.count(40)
    assert share.ask(10.25) == 40
    share.count(40)
    assert share.ask(11.25) == 20, "half of it took half a second"
    share.count(400)
    assert share.ask(11.5) == 50, "half a second's calls of the limit"
    share.count(30)
    share.add(12, 12.0)
    share.add(99, 11.6)
    assert share.ask(11.75) == 18
    assert share.ask(12.0) == 0


def test_slow_limits_are_not_asked_for_ahead() -> None:
    """A limit below two calls a second never leaves calls in a verifier that does not need them."""
    share = Share("t1", RateLimit(119, 60, 100))
    share.ask(10.0)
    share.count(100)
    assert share.ask(10.1) == 0


def test_denial_ends() -> None:
    """A share refuses without asking until the time that it was given."""
    share = Share("t1", RateLimit(1, 1, 1))
    assert share.denied_seconds(5.0) == 0
    share.deny(7.0)
    assert share.denied_seconds(5.0) == 2.0
    assert share.denied_seconds(7.0) == 0


def test_threads_never_spend_a_call_twice() -> None:
    """Threads that spend at the same time get exactly as many calls as there are."""
    share = Share("t1", RateLimit(1_000, 1, 1_000))
    share.add(5_000, 9.0)
    spent: list[int] = []

    def spend() -> None:
        spent.append(sum(share.spend(0.0) for _ in range(2_000)))

    threads = [threading.Thread(target=spend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sum(spent) == 5_000


def test_share_belongs_to_one_limit() -> None:
    """The secrets of a token share its calls. Another limit begins with none."""
    shares, limit = Shares(), RateLimit(10, 1, 10)
    first = shares.of("t1", limit)
    first.add(5, 9.0)
    assert shares.of("t1", limit) is first
    assert shares.find("t1", limit._replace(burst=9)) is None
    other = shares.of("t1", limit._replace(burst=9))
    assert not other.spend(0.0)
    assert shares.find("t1", limit) is None
    del first, other
    assert shares.find("t1", limit._replace(burst=9)) is None, "nothing refers to it"


@dataclass
class Verifier:
    """A server process or a client library, with its own clock."""

    rate: float
    offset: float
    share: Share
    # Issued calls in transit: when they arrive, how many, and until when they count here.
    arriving: list[tuple[float, int, float]] = field(default_factory=list)

    def clock(self, now: float) -> float:
        return self.offset + now * self.rate


class Fleet:
    """One bucket, and verifiers that join, leave, crash, and are cut off."""

    def __init__(self, limit: RateLimit, randomness: random.Random) -> None:
        self.limit = limit
        self.random = randomness
        self.now = 0.0
        self.full_at = 0
        self.accepted: list[float] = []
        self.issued = 0
        self.verifiers: list[Verifier] = []

    def join(self) -> None:
        drift = self.random.uniform(-DRIFT_MAX, DRIFT_MAX) / 2
        offset = self.random.uniform(-1e6, 1e6)
        self.verifiers.append(Verifier(1 + drift, offset, Share("t1", self.limit)))

    def leave(self) -> None:
        """Remove a verifier, with what it has and what is on its way."""
        self.verifiers.pop(self.random.randrange(len(self.verifiers)))

    def draw(self, verifier: Verifier, needed: int) -> int:
        """Draw for a verifier. The answer may be late, or lost."""
        began = verifier.clock(self.now)
        ahead = verifier.share.ask(began)
        # The statement may run some time after it was sent.
        executed = self.now + self.random.choice((0.0, 0.001, 0.3, 2.0))
        if executed > self.now + 0.01:
            # Nobody waits for so long. What comes is kept until it ends.
            needed = 0
        result = draw(self.limit, self.full_at, round(executed * MICROSECONDS), needed, ahead)
        self.full_at = max(self.full_at, result.full_at)
        self.issued += result.calls
        taken = min(needed, result.calls)
        if self.random.random() < 0.8:
            delay = self.random.choice((0.0, 0.01, 0.5, 1.5))
            rest = result.calls - taken
            verifier.arriving.append((executed + delay, rest, share_end(began)))
        return taken

    def verify(self, verifier: Verifier) -> None:
        clock = verifier.clock(self.now)
        for part in [part for part in verifier.arriving if part[0] <= self.now]:
            verifier.arriving.remove(part)
            verifier.share.add(part[1], part[2])
        if verifier.share.spend(clock):
            self.accepted.append(self.now)
        elif not verifier.share.denied_seconds(clock):
            taken = self.draw(verifier, 1)
            verifier.share.count(taken)
            if taken:
                self.accepted.append(self.now)
            else:
                verifier.share.deny(clock + self.random.choice((0.005, 0.1)))

    def step(self) -> None:
        self.now += self.random.choice((0.0, 0.0001, 0.001, 0.01, 0.2))
        chance = self.random.random()
        if not self.verifiers or (chance < 0.005 and len(self.verifiers) < 12):
            self.join()
        elif chance < 0.009:
            self.leave()
        else:
            # Most of the load reaches one verifier, for a while.
            favourite = int(self.now) % len(self.verifiers)
            some = self.random.choice((favourite, self.random.randrange(len(self.verifiers))))
            for _ in range(self.random.choice((1, 1, 5))):
                self.verify(self.verifiers[some])


def exceeds(limit: RateLimit, accepted: list[float]) -> float:
    """Return by how many calls the worst window exceeds the bound, in one pass.

    The bound holds in every window if a bucket that starts full, and holds the burst and a second's
    calls more, never runs out.
    """
    size = limit.burst + limit.per_second * SHARE_SECONDS
    level, last, worst = size, 0.0, 0.0
    # The bucket of the database fills by its own clock, which may run faster.
    rate = limit.per_second * (1 + DRIFT_MAX)
    for moment in accepted:
        level = min(size, level + (moment - last) * rate) - 1
        last = moment
        worst = max(worst, -level)
    return worst


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from(
        [
            RateLimit(1_000, 1, 1),
            RateLimit(1_000, 1, 300),
            RateLimit(50, 1, 20),
            RateLimit(100, 60, 20),
            RateLimit(5, 3_600, 3),
        ]
    ),
)
def test_sum_over_all_verifiers_stays_within_the_bound(seed: int, limit: RateLimit) -> None:
    """Whatever verifiers join, leave, crash or are cut off, and however late answers arrive, the
    calls accepted in any window of w seconds are at most burst + rate * (w + 1 s)."""
    fleet = Fleet(limit, random.Random(seed))  # noqa: S311 - a seed to repeat
    for _ in range(1_500):
        fleet.step()
    assert exceeds(limit, fleet.accepted) <= 0
    assert len(fleet.accepted) <= fleet.issued


def test_bound_is_exceeded_by_a_verifier_that_begins_with_a_burst() -> None:
    """The check above finds a verifier that starts with a share, as after an unbounded refill."""

    class Refilling(Fleet):
        def join(self) -> None:
            super().join()
            self.verifiers[-1].share.add(self.limit.burst, float("inf"))

    limit = RateLimit(60, 3_600, 20)
    fleet = Refilling(limit, random.Random(1))  # noqa: S311 - a seed to repeat
    for _ in range(1_500):
        fleet.step()
    assert exceeds(limit, fleet.accepted) > 0


def test_bound_is_exceeded_by_calls_that_never_end() -> None:
    """The check above finds a verifier that keeps calls for as long as it likes."""
    limit = RateLimit(10, 1, 10)
    kept = [Share("t1", limit) for _ in range(30)]
    full_at = 0
    for second, share in enumerate(kept):
        result = draw(limit, full_at, second * MICROSECONDS, 0, 5)
        full_at = result.full_at
        share.add(result.calls, float("inf"))
    accepted = [31.0 for share in kept for _ in range(5) if share.spend(31.0)]
    assert exceeds(limit, accepted) > 0


@pytest.mark.parametrize("verifiers", [1, 2, 5])
def test_one_verifier_can_use_the_whole_limit(verifiers: int) -> None:
    """If one verifier has all the load, it uses the whole limit. However the load moves between
    verifiers, they use at least half of it."""
    limit = RateLimit(200, 1, 50)
    now, full_at, accepted = 0.0, 0, 0
    shares = [Share("t1", limit) for _ in range(verifiers)]
    while now < 20.0:
        now += 0.001
        # The load moves as soon as a verifier has drawn ahead of demand.
        share = shares[int(now / AHEAD_SECONDS) % verifiers]
        if share.spend(now):
            accepted += 1
        elif not share.denied_seconds(now):
            result = draw(limit, full_at, round(now * MICROSECONDS), 1, share.ask(now))
            full_at = result.full_at
            if result.calls:
                share.count(1)
                accepted += 1
                share.add(result.calls - 1, share_end(now))
            else:
                share.deny(now + max(0.005, result.retry_seconds))
    use = accepted / (limit.burst + limit.per_second * now)
    assert use > (0.95 if verifiers == 1 else 0.5), use

"""The core of rate limits: what a bucket issues for any limit, and what a share spends.

`tests/model` and `tests/simulation` check the bound on the sum of all verifiers.
"""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latchkey_coherence.rate import (
    AHEAD_SECONDS,
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

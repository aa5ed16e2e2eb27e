"""Rate limits of a caller, for any pattern of calls."""

from hypothesis import given
from hypothesis import strategies as st
from latchkey_service.access.rates import BURST_SECONDS, RateLimits


@given(
    rate=st.integers(1, 1_000),
    calls=st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 50)), max_size=200),
)
def test_never_more_than_the_rate_and_one_burst(rate: int, calls: list[tuple[float, int]]) -> None:
    """In any period, the allowed calls are at most those of the rate, one burst, and the last call,
    which counts in full."""
    limits = RateLimits({"verifier": rate})
    now, passed = 100.0, []
    for pause, count in calls:
        now += pause
        if not limits.charge("verifier", count, now):
            passed.append((now, count))
    for first in range(len(passed)):
        counted = 0
        for now, count in passed[first:]:
            assert counted <= rate * (now - passed[first][0] + BURST_SECONDS) + 1e-6
            counted += count


@given(rate=st.integers(1, 1_000), batch=st.integers(1, 5_000))
def test_suggested_wait_is_exact(rate: int, batch: int) -> None:
    """A refused call reports how long to wait, neither too short nor too long. This also holds
    after a batch larger than the burst, which is never refused for its size."""
    limits = RateLimits({"verifier": rate})
    assert limits.charge("verifier", batch, 100.0) == 0
    asked = 0
    while not (wait := limits.charge("verifier", 1, 100.0)):
        asked += 1
        assert asked <= rate
    assert limits.charge("verifier", 1, 100.0 + wait * 0.99 - 1e-6) > 0
    assert limits.charge("verifier", 1, 100.0 + wait) == 0


def test_burst_of_one_second() -> None:
    """An idle caller may make one second's calls at once, and then continues at the rate."""
    limits = RateLimits({"manager": 20})
    assert [limits.charge("manager", 1, 100.0) for _ in range(20)] == [0.0] * 20
    assert limits.charge("manager", 1, 100.0) > 0.04
    assert limits.charge("manager", 1, 100.051) == 0
    assert limits.charge("manager", 1, 100.052) > 0


def test_role_without_a_limit() -> None:
    """Limits apply per role."""
    limits = RateLimits({"manager": 1})
    assert not any(limits.charge("verifier", 1_000, 100.0) for _ in range(100))

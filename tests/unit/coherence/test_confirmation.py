"""What a Delete waits for, and which rows are dead: by the waiter's own clock, never too soon."""

from hypothesis import given
from hypothesis import strategies as st
from latchkey_coherence.lease import outwait_seconds
from latchkey_service.coherence.confirmation import (
    OUTWAIT_MARGIN_SECONDS,
    Census,
    Confirmation,
    VerifierRow,
    Wait,
)

LEASE = 3.0
OUTWAIT = outwait_seconds(LEASE) + OUTWAIT_MARGIN_SECONDS


def row(name: str = "a", acknowledged: int = 0, renewal: int = 1, lease: float = LEASE):
    return VerifierRow(name, 1, renewal, acknowledged, lease)


def test_all_have_acknowledged():
    """It is confirmed as soon as every row has acknowledged the revision, or a later one."""
    wait = Wait(5, 100.0)
    assert wait.judge([row("a", 5), row("b", 4)], 100.0) is None
    assert wait.judge([row("a", 5), row("b", 7)], 100.1) == Confirmation(2, 0)


def test_nobody_is_there():
    """Without verifiers there is nothing to wait for."""
    assert Wait(5, 100.0).judge([], 100.0) == Confirmation(0, 0)


@given(st.floats(0.3, 5.0), st.floats(0.3, 5.0))
def test_the_longest_lease_is_waited_out(short, long):
    """Of those that have not, the longest lease counts, from the commit on."""
    wait = Wait(5, 100.0)
    rows = [row("a", 4, lease=short), row("b", 4, lease=long), row("c", 5, lease=50.0)]
    end = 100.0 + max(short, long) * 1.001
    assert wait.judge(rows, end) is None
    assert wait.judge(rows, end + OUTWAIT_MARGIN_SECONDS + 0.001) == Confirmation(1, 2)


def test_rows_that_go_or_come_meanwhile():
    """A row that is removed before it acknowledged counts as waited out; one that registers
    behind is waited for; one that leaves after it acknowledged counts as having."""
    wait = Wait(5, 100.0)
    assert wait.judge([row("gone", 4), row("left", 5)], 100.0) is None
    assert wait.judge([row("new", 4)], 100.1) is None
    assert wait.judge([row("new", 6)], 100.2) == Confirmation(2, 1)


def test_a_renewal_saves_a_row():
    """A row is dead once its renewal has not changed for a lease's length, and no sooner."""
    census = Census()
    assert census.dead([row(renewal=1)], 0.0, 0.1) == []
    assert census.dead([row(renewal=1)], 0.1 + OUTWAIT - 0.01, 9.0) == []
    assert census.dead([row(renewal=2)], 0.1 + OUTWAIT + 0.01, 9.0) == []
    assert census.dead([row(renewal=2)], 9.0 + OUTWAIT - 0.01, 99.0) == []
    assert census.dead([row(renewal=2)], 9.0 + OUTWAIT + 0.01, 99.0) == [row(renewal=2)]


def test_the_time_is_counted_from_after_the_first_look():
    """What a look took is not counted: the renewal may have come just before its end."""
    census = Census()
    census.dead([row()], 0.0, 50.0)
    assert census.dead([row()], 50.0 + OUTWAIT - 0.01, 99.0) == []
    assert census.dead([row()], 50.0 + OUTWAIT + 0.01, 99.0) == [row()]


def test_a_row_that_was_away_is_watched_anew():
    """An id that comes back is not dead for what was seen of it before."""
    census = Census()
    census.dead([row()], 0.0, 0.0)
    census.dead([], 10.0, 10.0)
    assert census.dead([row()], 20.0, 20.0) == []

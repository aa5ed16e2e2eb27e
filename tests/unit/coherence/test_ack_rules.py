"""When a Delete may return and which rows are dead, by the waiter's own clock and never too
soon."""

from hypothesis import given
from hypothesis import strategies as st
from latchkey_coherence.lease import outwait_seconds
from latchkey_service.coherence.ack_rules import (
    OUTWAIT_MARGIN_SECONDS,
    PAUSE_SECONDS_MAX,
    PAUSE_SECONDS_MIN,
    Acknowledgements,
    DeadVerifierDetector,
    PendingDeletion,
    VerifierRow,
    pause_seconds,
)

from tests.helpers.positions import at

LEASE = 3.0
OUTWAIT = outwait_seconds(LEASE) + OUTWAIT_MARGIN_SECONDS


def row(name: str = "a", acknowledged: int = 0, renewal: int = 1, lease: float = LEASE):
    return VerifierRow(name, 1, renewal, acknowledged, lease)


@given(st.floats(0.3, 5.0), st.floats(0.3, 5.0))
def test_the_longest_lease_is_waited_out(short, long):
    """The longest lease of the verifiers that are behind counts, from the commit on."""
    wait = PendingDeletion(at(5), 100.0)
    rows = [row("a", 4, lease=short), row("b", 4, lease=long), row("c", 5, lease=50.0)]
    end = 100.0 + max(short, long) * 1.001
    assert wait.evaluate(rows, end) is None
    assert wait.evaluate(rows, end + OUTWAIT_MARGIN_SECONDS + 0.001) == Acknowledgements(1, 2)


def test_rows_that_disappear_or_appear_during_the_wait():
    """A row that is removed before it acknowledged counts as outwaited. A new row that is behind
    is waited for. A row that is removed after it acknowledged counts as acknowledged."""
    wait = PendingDeletion(at(5), 100.0)
    assert wait.evaluate([row("gone", 4), row("left", 5)], 100.0) is None
    assert wait.evaluate([row("new", 4)], 100.1) is None
    assert wait.evaluate([row("new", 6)], 100.2) == Acknowledgements(2, 1)


def test_a_renewed_row_is_alive():
    """A row is dead once its renewal has not changed for the length of its lease, and no sooner."""
    detector = DeadVerifierDetector()
    assert detector.dead([row(renewal=1)], 0.0, 0.1) == []
    assert detector.dead([row(renewal=1)], 0.1 + OUTWAIT - 0.01, 9.0) == []
    assert detector.dead([row(renewal=2)], 0.1 + OUTWAIT + 0.01, 9.0) == []
    assert detector.dead([row(renewal=2)], 9.0 + OUTWAIT - 0.01, 99.0) == []
    assert detector.dead([row(renewal=2)], 9.0 + OUTWAIT + 0.01, 99.0) == [row(renewal=2)]


def test_time_counts_from_the_end_of_the_first_read():
    """The duration of the first read does not count: the renewal may have come just before its
    end."""
    detector = DeadVerifierDetector()
    detector.dead([row()], 0.0, 50.0)
    assert detector.dead([row()], 50.0 + OUTWAIT - 0.01, 99.0) == []
    assert detector.dead([row()], 50.0 + OUTWAIT + 0.01, 99.0) == [row()]


def test_observation_of_a_reappearing_row_restarts():
    """A row that reappears is not dead because of what was observed before it disappeared."""
    detector = DeadVerifierDetector()
    detector.dead([row()], 0.0, 0.0)
    detector.dead([], 10.0, 10.0)
    assert detector.dead([row()], 20.0, 20.0) == []


def clients(acknowledged: int, confirmed: int, outwaited: int, name: str = "a") -> VerifierRow:
    return VerifierRow(name, 1, 1, acknowledged, LEASE, confirmed, outwaited)


def test_receipt_counts_clients() -> None:
    """The receipt counts clients that confirmed and clients whose leases were outwaited."""
    wait = PendingDeletion(at(5), 100.0)
    assert wait.evaluate([clients(4, 7, 10), clients(5, 2, 30, "b")], 100.0) is None
    assert wait.evaluate([clients(4, 7, 11), clients(6, 9, 31, "b")], 100.1) is None
    assert wait.evaluate([clients(5, 3, 12), clients(7, 9, 35, "b")], 100.2) == Acknowledgements(
        2, 0, clients_acknowledged=3 + 2, clients_outwaited=2
    )


def test_later_client_leases_do_not_count() -> None:
    """Once a verifier has acknowledged the revision, later leases of its clients do not count,
    however long other verifiers take."""
    wait = PendingDeletion(at(5), 100.0)
    wait.evaluate([clients(4, 0, 1), clients(4, 0, 0, "slow")], 100.0)
    wait.evaluate([clients(5, 1, 2), clients(4, 0, 0, "slow")], 100.1)
    wait.evaluate([clients(5, 8, 9), clients(4, 0, 0, "slow")], 100.2)
    assert wait.evaluate([clients(5, 8, 9), clients(5, 1, 0, "slow")], 100.3) == Acknowledgements(
        2, 0, clients_acknowledged=2, clients_outwaited=1
    )


def test_clients_of_a_waited_out_verifier_do_not_count() -> None:
    """Nothing is known about the clients of a verifier that never acknowledged."""
    wait = PendingDeletion(at(5), 100.0)
    wait.evaluate([clients(4, 7, 10)], 100.0)
    assert wait.evaluate([clients(4, 7, 10)], 100.0 + OUTWAIT + 0.01) == Acknowledgements(0, 1)


def test_a_row_counts_all_its_processes() -> None:
    """A receipt counts the processes of a host, and those whose leases it outwaited."""
    wait = PendingDeletion(at(5), 100.0)
    row = VerifierRow("ver_host", 1, 1, 4, LEASE, processes=4)
    assert wait.evaluate([row], 100.0) is None
    row = row._replace(acknowledged_revision=5, processes=3, processes_outwaited=1)
    assert wait.evaluate([row], 100.1) == Acknowledgements(3, 1)


def test_a_dead_host_counts_with_all_its_processes() -> None:
    """If a row never acknowledges, each process that it represents counts as outwaited."""
    wait = PendingDeletion(at(5), 100.0)
    row = VerifierRow("ver_host", 1, 1, 4, LEASE, processes=4)
    assert wait.evaluate([row], 100.0 + LEASE + 1.0) == Acknowledgements(0, 4)


def looked(acknowledged: list[int], verifiers: int = 100) -> PendingDeletion:
    """A Delete that found, each time it read the rows, this many verifiers that had
    acknowledged."""
    wait = PendingDeletion(at(5), 100.0)
    for number in acknowledged:
        wait.evaluate([row(f"{n}", 5 if n < number else 4) for n in range(verifiers)], 100.0)
    return wait


def test_the_next_look_comes_when_the_rest_should_have_acknowledged():
    """A Delete looks at the rows again when the verifiers that are still behind should have
    acknowledged, at the rate of the last pause."""
    assert pause_seconds(0.02, [looked([0, 60])]) == 0.02 * 40 / 60
    assert pause_seconds(0.02, [looked([20, 80])]) == 0.02 * 20 / 60
    # The first of several Deletes counts.
    waits = [looked([20, 80]), looked([0, 0]), looked([0, 60])]
    assert pause_seconds(0.02, waits) == 0.02 * 20 / 60


def test_pauses_grow_while_nobody_acknowledges():
    """Deletes that wait for a dead verifier look ever less often, down to a bound, and so do those
    whose looks prove nothing."""
    assert 0.02 < pause_seconds(0.02, [looked([99, 99])]) < PAUSE_SECONDS_MAX
    assert pause_seconds(0.02, []) == pause_seconds(0.02, [looked([99, 99])])
    assert pause_seconds(PAUSE_SECONDS_MAX, [looked([99, 99])]) == PAUSE_SECONDS_MAX
    # One more has acknowledged: at this rate, the others would take very long.
    assert pause_seconds(PAUSE_SECONDS_MAX, [looked([0, 1])]) == PAUSE_SECONDS_MAX
    # A rate says nothing below this.
    assert pause_seconds(0.02, [looked([0, 99])]) == PAUSE_SECONDS_MIN

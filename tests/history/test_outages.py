"""Times without answers, on histories made by hand."""

from tests.history.outages import Outage, Window, outages
from tests.history.records import Kind, Outcome, Record

S = 1_000_000_000


def answer(kind: Kind, outcome: Outcome, ended: float) -> Record:
    return Record(kind, outcome, 1, int((ended - 0.5) * S), int(ended * S))


def test_longest_time_without_answers() -> None:
    """The longest gap counts, between answers and up to the window's ends, for all processes and
    for one."""
    first = [answer(Kind.NOWAIT, Outcome.VALID, second) for second in (9, 11, 12, 17, 18, 19)]
    second = [answer(Kind.VERIFY, Outcome.REFUSED, second) for second in (11, 15, 19)]
    deleters = [
        answer(Kind.CREATE, Outcome.DONE, 12),
        answer(Kind.DELETE, Outcome.CONFIRMED, 13),
        # Neither counts as an answer.
        answer(Kind.DELETE, Outcome.FAILED, 15),
        answer(Kind.VERIFY, Outcome.FAILED, 15),
    ]
    histories = {"a": lambda: first, "b": lambda: second, "deleters": lambda: deleters}
    windows = [Window("fault", 10 * S, 20 * S), Window("calm", 30 * S, 31 * S)]
    assert outages(histories, windows) == [
        Outage("fault", verifies=3.0, verifies_worst=5.0, changes=7.0),
        Outage("calm", verifies=1.0, verifies_worst=0.0, changes=1.0),
    ]

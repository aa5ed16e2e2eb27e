"""The order in which calls of several callers start, and who makes room in a full queue."""

from latchkey_service.tokens.fair_queue import FairQueue


def queue(*calls: tuple[str, int]) -> FairQueue[int]:
    made: FairQueue[int] = FairQueue(100)
    for caller, number in calls:
        made.add(number, caller, number, 10)
    return made


def test_callers_take_turns() -> None:
    """Each caller's calls start in order of arrival, one of each caller after the other."""
    waiting = queue(("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6))
    assert [waiting.take() for _ in range(len(waiting))] == [1, 4, 5, 2, 6, 3]


def test_a_late_caller_does_not_wait_for_a_flood() -> None:
    """The first call of another caller starts after at most one more call of the flood."""
    waiting = queue(*(("flood", number) for number in range(8)))
    waiting.take()
    waiting.add(100, "late", 100, 10)
    assert 100 in [waiting.take(), waiting.take()]


def test_the_caller_with_the_most_calls_makes_room() -> None:
    """In a full queue, the newest call of the caller with the most makes room, unless the newcomer
    has about as many."""
    waiting = queue(("a", 1), ("a", 2), ("a", 3), ("b", 4))
    assert waiting.displace("a") is None
    assert waiting.displace("b") == 3
    assert waiting.displace("b") is None
    assert waiting.displace("c") == 2
    assert [waiting.take(), waiting.take()] == [1, 4]
    assert waiting.displace("c") is None


def test_bytes_are_counted() -> None:
    """A request fits while the bytes of all that wait stay within the bound."""
    waiting = queue(*(("a", number) for number in range(9)))
    assert waiting.fits(10)
    assert not waiting.fits(11)
    waiting.take()
    assert waiting.fits(20)
    assert waiting.remove(5)
    assert not waiting.remove(5)
    assert waiting.fits(30)
    assert waiting.displace("b") == 8
    assert waiting.fits(40)
    assert waiting.clear() == [1, 2, 3, 4, 6, 7]
    assert waiting.fits(100)
    assert len(waiting) == 0

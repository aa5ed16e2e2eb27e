"""The order in which calls of several callers start, and who makes room in a full queue."""

from latchkey_service.fair_queue import SMALL_BYTES, FairQueue

LARGE = 2 * SMALL_BYTES


def queue(*calls: tuple[str, int]) -> FairQueue[int]:
    made: FairQueue[int] = FairQueue(10 * LARGE)
    for caller, number in calls:
        made.add(number, caller, number, LARGE)
    return made


def test_callers_take_turns() -> None:
    """Each caller's calls start in order of arrival, one of each caller after the other."""
    waiting = queue(("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6))
    assert waiting.take(9) == [1, 4, 5, 2, 6, 3]


def test_a_late_caller_does_not_wait_for_a_flood() -> None:
    """The first call of another caller starts after at most one more call of the flood."""
    waiting = queue(*(("flood", number) for number in range(8)))
    waiting.take(1)
    waiting.add(100, "late", 100)
    assert 100 in waiting.take(2)


def test_the_caller_with_the_most_calls_makes_room() -> None:
    """In a full queue, the newest call of the caller with the most makes room, unless the newcomer
    has about as many."""
    waiting = queue(("a", 1), ("a", 2), ("a", 3), ("b", 4))
    assert waiting.displace("a") is None
    assert waiting.displace("b") == 3
    assert waiting.displace("b") is None
    assert waiting.displace("c") == 2
    assert waiting.take(2) == [1, 4]
    assert waiting.displace("c") is None


def test_bytes_are_counted() -> None:
    """A large request fits while the bytes of those that wait stay within the bound. A small one
    always fits."""
    waiting = queue(*(("a", number) for number in range(9)))
    assert waiting.fits(LARGE)
    assert not waiting.fits(LARGE + 1)
    assert waiting.fits(SMALL_BYTES)
    waiting.take(1)
    assert waiting.fits(2 * LARGE)
    assert waiting.remove(5)
    assert not waiting.remove(5)
    assert waiting.fits(3 * LARGE)
    assert waiting.displace("b") == 8
    assert waiting.fits(4 * LARGE)
    assert waiting.take(100) == [1, 2, 3, 4, 6, 7]
    assert waiting.fits(10 * LARGE)
    assert len(waiting) == 0

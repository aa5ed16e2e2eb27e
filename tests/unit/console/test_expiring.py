"""Bounded memory: nothing outlives its time, and nothing grows past its size."""

from latchkey_console.expiring import Expiring


def test_time_and_number_are_bounded() -> None:
    """A value is there until its time is over; the oldest makes room; pop forgets."""
    now = 0.0
    memory: Expiring[str] = Expiring(10.0, 3, lambda: now)
    memory.put("a", "1")
    now = 4.0
    memory.put("b", "2")
    memory.put("a", "3")  # anew: its time starts again
    now = 9.9
    assert (memory.get("a"), memory.get("b"), memory.get("c")) == ("3", "2", None)
    now = 14.0
    assert (memory.get("a"), memory.get("b"), len(memory)) == (None, None, 0)
    for key in "cdef":
        memory.put(key, key)
    assert [memory.get(key) for key in "cdef"] == [None, "d", "e", "f"]
    assert memory.pop("e") == "e"
    assert memory.pop("e") is None
    assert len(memory) == 2

"""The bounded store: values expire, and their number is limited."""

from latchkey_console.expiring import Expiring


def test_lifetime_and_size_are_bounded() -> None:
    """A value lasts until it expires. A full store evicts the oldest value. pop removes a value."""
    now = 0.0
    memory: Expiring[str] = Expiring(10.0, 3, lambda: now)
    memory.put("a", "1")
    now = 4.0
    memory.put("b", "2")
    memory.put("a", "3")  # stored again, so its lifetime restarts
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

"""What the memory may hold: never more than its bound, never what an invalidation has ended."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from latchkey_coherence import memory as memory_module
from latchkey_coherence.memory import Entry, Memory

TOKENS = [f"tok_{n}" for n in range(6)]
KEYS_OF_TOKEN = 2
tokens = st.sampled_from(TOKENS)


def key(token_id: str, number: int = 0) -> bytes:
    return f"{token_id} {number}".encode()


class AnyReadMayArriveAnyTime(RuleBasedStateMachine):
    """A database whose tokens are read at some revision, and a memory that hears of it late.

    An entry is of a token at the revision that it was read at. It is stale if the token was named
    by a later revision that the memory has applied: nothing would ever remove it again.
    """

    ENTRIES_MAX = 5

    def __init__(self) -> None:
        super().__init__()
        self.memory: Memory[Entry] = Memory(self.ENTRIES_MAX)
        self.log: list[str] = []
        self.read_at: dict[int, int] = {}

    @rule(token=tokens)
    def name(self, token: str) -> None:
        self.log.append(token)

    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        """Of what is new, up to some revision, in one message or again."""
        applied = self.memory.applied
        after = data.draw(st.integers(max(0, applied - 3), applied))
        upto = data.draw(st.integers(after, len(self.log)))
        self.memory.apply(upto, self.log[after:upto])

    @rule()
    def begin_anew(self) -> None:
        self.memory.reset(len(self.log))

    @rule(token=tokens, number=st.integers(0, KEYS_OF_TOKEN - 1), age=st.integers(0, 8))
    def read_arrives(self, token: str, number: int, age: int) -> None:
        revision = max(0, len(self.log) - age)
        entry = Entry(token)
        self.read_at[id(entry)] = revision
        self.keep = [*getattr(self, "keep", ()), entry]  # so that no id comes twice
        admitted = self.memory.admit(key(token, number), entry, revision)
        assert admitted == (self.memory.entries.get(key(token, number)) is entry)
        named_since = token in self.log[revision : self.memory.applied]
        assert not (admitted and named_since)
        if revision >= self.memory.applied:
            assert admitted, "what is up to date is always welcome"

    @rule(token=tokens)
    def use(self, token: str) -> None:
        for number in range(KEYS_OF_TOKEN):
            if entry := self.memory.entries.get(key(token, number)):
                entry.used = True

    @invariant()
    def nothing_in_it_is_stale(self) -> None:
        for entry in self.memory.entries.values():
            revision = self.read_at[id(entry)]
            assert entry.token_id not in self.log[revision : self.memory.applied]

    @invariant()
    def it_is_bounded(self) -> None:
        assert len(self.memory) <= self.ENTRIES_MAX
        assert len(self.memory._order) <= 2 * self.ENTRIES_MAX + 1_001
        assert set(self.memory._of_token) == {e.token_id for e in self.memory.entries.values()}


AnyReadMayArriveAnyTime.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
test_fill_rule = AnyReadMayArriveAnyTime.TestCase


class ShortHistory(AnyReadMayArriveAnyTime):
    """The same with a history of two names: what it no longer knows, it must not admit."""

    def __init__(self) -> None:
        self.before = memory_module.HISTORY_MAX
        memory_module.HISTORY_MAX = 2  # type: ignore[misc]  # Final
        super().__init__()

    def teardown(self) -> None:
        memory_module.HISTORY_MAX = self.before  # type: ignore[misc]  # Final


ShortHistory.TestCase.settings = AnyReadMayArriveAnyTime.TestCase.settings
test_fill_rule_with_a_short_history = ShortHistory.TestCase


def test_what_was_missed_can_be_told() -> None:
    """`named_since` has every token named after a revision, or says that it does not know."""
    memory: Memory[Entry] = Memory(1)
    memory.reset(10)
    memory.apply(11, ["a"])
    memory.apply(13, ["b", "c"])
    memory.apply(14, ["a"])
    assert set(memory.named_since(10) or ()) == {"a", "b", "c"}
    assert set(memory.named_since(13) or ()) == {"a"}
    assert memory.named_since(14) == []
    assert memory.named_since(9) is None


@pytest.mark.parametrize("used", [False, True])
def test_room_is_made_of_what_goes_unused(used: bool) -> None:
    """What was used since it was last looked at outlives what was not."""
    memory: Memory[Entry] = Memory(10)
    for n in range(10):
        memory.admit(key("t", n), Entry("t"), 0)
    memory.entries[key("t", 0)].used = used
    memory.admit(key("t", 10), Entry("t"), 0)
    assert (key("t", 0) in memory.entries) == used
    assert len(memory) == 10


def test_room_is_made_in_bounded_time() -> None:
    """With every entry in use, one goes after a bounded number of looks."""
    memory: Memory[Entry] = Memory(1_000)
    for n in range(1_000):
        memory.admit(key("t", n), Entry("t"), 0)
    for entry in memory.entries.values():
        entry.used = True
    memory.admit(key("t", 1_000), Entry("t"), 0)
    assert len(memory) == 1_000
    assert sum(entry.used for entry in memory.entries.values()) == 1_000 - memory_module.LOOKS_MAX


@given(st.integers(1, 5))
def test_a_memory_of_nothing_holds_nothing(count: int) -> None:
    """Switched off, it still knows what was named, for clients and for reads under way."""
    memory: Memory[Entry] = Memory(0)
    for n in range(count):
        assert not memory.admit(key("t", n), Entry("t"), 0)
    memory.apply(count, ["t"])
    assert len(memory) == 0
    assert memory.named_since(0) == ["t"]

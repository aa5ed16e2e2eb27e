"""What the cache may hold: never more than its bound, never what an invalidation has ended.

These tests are about the cache that server and client share. `tests/conformance` plays what a
client keeps in it.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from latchkey_coherence import verdict_cache
from latchkey_coherence.verdict_cache import NOWHERE, Entry, Position, VerdictCache

from tests.helpers.positions import at

TOKENS = [f"tok_{n}" for n in range(6)]
KEYS_OF_TOKEN = 2
tokens = st.sampled_from(TOKENS)


NEVER = float("inf")


def entry_of(token_id: str) -> Entry:
    return Entry(token_id, NEVER)


def key(token_id: str, number: int = 0) -> bytes:
    return f"{token_id} {number}".encode()


class AnyReadMayArriveAnyTime(RuleBasedStateMachine):
    """A database whose tokens are read at some revision, and a cache that receives changes late.

    Each entry records the revision at which its token was read. It is stale if the cache has
    applied a later revision that named the token, because nothing would ever remove the entry.
    """

    ENTRIES_MAX = 5

    def __init__(self) -> None:
        super().__init__()
        self.cache: VerdictCache[Entry] = VerdictCache(self.ENTRIES_MAX)
        self.history = 1
        self.cache.reset(at(0, self.history))
        self.log: list[str] = []
        self.read_at: dict[int, int] = {}

    @rule(token=tokens)
    def name(self, token: str) -> None:
        self.log.append(token)

    @rule(data=st.data())
    def apply_news(self, data: st.DataObject) -> None:
        """Apply news up to some revision in one message, possibly again."""
        applied = self.cache.position.revision
        after = data.draw(st.integers(max(0, applied - 3), applied))
        upto = data.draw(st.integers(after, len(self.log)))
        self.cache.apply(at(upto, self.history), self.log[after:upto])

    @rule()
    def start_over(self) -> None:
        self.cache.reset(at(len(self.log), self.history))

    @rule(length=st.integers(0, 5))
    def go_on_in_another_history(self, length: int) -> None:
        """Start a new history of any length, which names none of the former history's tokens."""
        self.history += 1
        self.log = self.log[:length]
        self.cache.reset(at(len(self.log), self.history))

    @rule(
        token=tokens,
        number=st.integers(0, KEYS_OF_TOKEN - 1),
        age=st.integers(0, 8),
        elsewhere=st.sampled_from([0, 0, 0, -1, 1]),
    )
    def read_arrives(self, token: str, number: int, age: int, elsewhere: int) -> None:
        revision = max(0, len(self.log) - age)
        position = at(revision, self.history + elsewhere)
        entry = entry_of(token)
        self.read_at[id(entry)] = revision
        self.keep = [*getattr(self, "keep", ()), entry]  # so that no id occurs twice
        admitted = self.cache.store(key(token, number), entry, position)
        assert admitted == (self.cache.entries.get(key(token, number)) is entry)
        named_since = token in self.log[revision : self.cache.position.revision]
        assert not (admitted and named_since)
        assert not (admitted and elsewhere), "it was read in another history"
        assert not (admitted and revision > self.cache.position.revision)
        if position == self.cache.position:
            assert admitted, "an up-to-date read is always admitted"

    @rule(token=tokens)
    def use(self, token: str) -> None:
        for number in range(KEYS_OF_TOKEN):
            if entry := self.cache.entries.get(key(token, number)):
                entry.used = True

    @invariant()
    def nothing_in_it_is_stale(self) -> None:
        for entry in self.cache.entries.values():
            revision = self.read_at[id(entry)]
            assert entry.token_id not in self.log[revision : self.cache.position.revision]

    @invariant()
    def it_is_bounded(self) -> None:
        assert len(self.cache) <= self.ENTRIES_MAX
        assert len(self.cache._order) <= 2 * self.ENTRIES_MAX + 1_001
        assert set(self.cache._of_token) == {e.token_id for e in self.cache.entries.values()}


AnyReadMayArriveAnyTime.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
test_fill_rule = AnyReadMayArriveAnyTime.TestCase


class ShortHistory(AnyReadMayArriveAnyTime):
    """The same with a history of two names. The cache must not admit reads from before those."""

    def __init__(self) -> None:
        self.before = verdict_cache.HISTORY_MAX
        verdict_cache.HISTORY_MAX = 2  # type: ignore[misc]  # Final
        super().__init__()

    def teardown(self) -> None:
        verdict_cache.HISTORY_MAX = self.before  # type: ignore[misc]  # Final


ShortHistory.TestCase.settings = AnyReadMayArriveAnyTime.TestCase.settings
test_fill_rule_with_a_short_history = ShortHistory.TestCase


def test_named_since_needs_a_known_position() -> None:
    """`named_since` returns every token named after a position, or None if it cannot know."""
    cache: VerdictCache[Entry] = VerdictCache(1)
    cache.reset(at(10))
    cache.apply(at(11), ["a"])
    cache.apply(at(13), ["b", "c"])
    cache.apply(at(14), ["a"])
    assert set(cache.named_since(at(10)) or ()) == {"a", "b", "c"}
    assert set(cache.named_since(at(13)) or ()) == {"a"}
    assert cache.named_since(at(14)) == []
    assert cache.named_since(at(9)) is None, "before it began"
    assert cache.named_since(at(12)) is None, "applied together with 13"
    assert cache.named_since(at(15)) is None, "not applied yet"
    assert cache.named_since(at(13, history=2)) is None, "another history"


@pytest.mark.parametrize("position", [NOWHERE, Position(7, 0)])
def test_a_mark_of_zero_is_never_known(position: Position) -> None:
    """A cache at the position NOWHERE admits nothing, whatever position a read claims."""
    cache: VerdictCache[Entry] = VerdictCache(1)
    cache.reset(position)
    assert cache.position == position
    assert not cache.knows(position)
    assert not cache.knows(NOWHERE)
    assert not cache.store(b"k", entry_of("t"), position)
    assert not cache.store(b"k", entry_of("t"), NOWHERE)
    assert cache.named_since(position) is None


def test_marks_are_pruned_with_their_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A position is dropped once some of the tokens named after it are dropped."""
    monkeypatch.setattr(verdict_cache, "HISTORY_MAX", 3)
    cache: VerdictCache[Entry] = VerdictCache(5)
    cache.reset(at(0))
    cache.apply(at(1), ["a"])
    cache.apply(at(2), ["b", "c"])
    cache.apply(at(3), ["d"])  # the name of revision 1 is one too many
    assert not cache.knows(at(0))
    assert set(cache.named_since(at(1)) or ()) == {"b", "c", "d"}
    assert cache.named_since(at(2)) == ["d"]
    cache.apply(at(4), ["e"])  # one of two names of revision 2
    assert not cache.knows(at(1))
    assert set(cache.named_since(at(2)) or ()) == {"d", "e"}


def test_marks_without_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Revisions that repeatedly name the same few tokens do not accumulate."""
    monkeypatch.setattr(verdict_cache, "HISTORY_MAX", 3)
    cache: VerdictCache[Entry] = VerdictCache(5)
    cache.reset(at(0))
    for revision in range(1, 20):
        cache.apply(at(revision), ["a"])
    known = [revision for revision in range(20) if cache.knows(at(revision))]
    assert known == [17, 18, 19]


@pytest.mark.parametrize("used", [False, True])
def test_unused_entries_are_evicted_first(used: bool) -> None:
    """An entry that was used since its last examination outlives one that was not."""
    cache: VerdictCache[Entry] = VerdictCache(10)
    cache.reset(at(0))
    for n in range(10):
        cache.store(key("t", n), entry_of("t"), at(0))
    cache.entries[key("t", 0)].used = used
    cache.store(key("t", 10), entry_of("t"), at(0))
    assert (key("t", 0) in cache.entries) == used
    assert len(cache) == 10


def test_eviction_takes_bounded_time() -> None:
    """If every entry is in use, one is evicted after a bounded number of examinations."""
    cache: VerdictCache[Entry] = VerdictCache(1_000)
    cache.reset(at(0))
    for n in range(1_000):
        cache.store(key("t", n), entry_of("t"), at(0))
    for entry in cache.entries.values():
        entry.used = True
    cache.store(key("t", 1_000), entry_of("t"), at(0))
    assert len(cache) == 1_000
    assert sum(entry.used for entry in cache.entries.values()) == 1_000 - verdict_cache.EXAMINED_MAX


@given(st.integers(1, 5))
def test_a_cache_without_capacity_stays_empty(count: int) -> None:
    """A cache that is switched off still knows which tokens were named, for clients and for
    reads in progress.
    """
    cache: VerdictCache[Entry] = VerdictCache(0)
    cache.reset(at(0))
    for n in range(count):
        assert not cache.store(key("t", n), entry_of("t"), at(0))
    cache.apply(at(count), ["t"])
    assert len(cache) == 0
    assert cache.named_since(at(0)) == ["t"]

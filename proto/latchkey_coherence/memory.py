"""A bounded memory of what was read of tokens, which never holds what an invalidation has ended."""

from collections import deque
from collections.abc import Iterable
from typing import Final, Generic, TypeVar

__all__ = ["HISTORY_MAX", "Entry", "Memory"]

# Names of tokens that were made invalid of late. What is read meanwhile takes milliseconds, and a
# client that was cut off comes back within seconds; deletions come at most a thousand a second.
HISTORY_MAX: Final = 10_000
# Entries looked at to make room for one. Were a million of them all in use, to look at each would
# hold up every verify for a tenth of a second.
LOOKS_MAX: Final = 32


class Entry:
    """What is remembered under a key. Subclasses add to it, with `__slots__` for its size."""

    __slots__ = ("token_id", "used")

    def __init__(self, token_id: str) -> None:
        self.token_id = token_id
        # Set by whoever answers with it: what was used is kept when room is made.
        self.used = False


E = TypeVar("E", bound=Entry)


class Memory(Generic[E]):
    """Entries by key, the revision up to which invalidations were applied to them, and the last
    few invalidations.

    Whoever answers with an entry holds a lease, and reads `entries` after the verify began. Not
    safe to change from several threads; safe to read while another one changes it.
    """

    __slots__ = (
        "_known_since",
        "_named",
        "_of_token",
        "_order",
        "applied",
        "entries",
        "entries_max",
    )

    def __init__(self, entries_max: int) -> None:
        self.entries_max = entries_max
        """How many it holds at most."""
        self.entries: dict[bytes, E] = {}
        self.applied = 0
        """Nothing in `entries` was made invalid by a revision up to this one."""
        # The token ids that revisions in (_known_since, applied] named, each with the last of
        # these, in that order.
        self._named: dict[str, int] = {}
        self._known_since = 0
        self._of_token: dict[str, bytes | tuple[bytes, ...]] = {}
        # Keys in the order in which they are looked at to make room. Keys that are gone, or stand
        # here twice, are passed over.
        self._order: deque[bytes] = deque()

    def __len__(self) -> int:
        return len(self.entries)

    def admit(self, key: bytes, entry: E, revision: int) -> bool:
        """Remember what was read in a snapshot of `revision`, or do not, and tell which.

        The fill rule (coherence rule 4): it may enter if nothing after `revision` that was applied
        here named its token. What was applied here will not be applied again, so that nothing
        would ever remove it.
        """
        if revision < self.applied and (
            # What was named that long ago has been forgotten.
            revision < self._known_since or self._named.get(entry.token_id, 0) > revision
        ):
            return False
        if self.entries_max <= 0:
            return False
        if key in self.entries:
            self._drop(key)
        elif len(self.entries) >= self.entries_max:
            self._make_room()
        self.entries[key] = entry
        keys = self._of_token.get(entry.token_id)
        if keys is None:
            self._of_token[entry.token_id] = key
        else:
            self._of_token[entry.token_id] = (*_all(keys), key)
        self._order.append(key)
        if len(self._order) > 2 * len(self.entries) + 1_000:
            # Entries that come and go by invalidations leave their keys behind.
            self._order = deque(self.entries)
        return True

    def apply(self, revision: int, token_ids: Iterable[str]) -> None:
        """Drop what is remembered of tokens that revisions up to `revision` made invalid.

        They are all that was named after `applied`, and may be more: it may be applied again.
        """
        for token_id in token_ids:
            for key in _all(self._of_token.get(token_id, ())):
                self._drop(key)
            # At the end, so that the order stays that of revisions.
            self._named.pop(token_id, None)
            self._named[token_id] = max(revision, self.applied)
        self.applied = max(self.applied, revision)
        while len(self._named) > HISTORY_MAX:
            oldest = next(iter(self._named))
            self._known_since = max(self._known_since, self._named.pop(oldest))

    def reset(self, revision: int) -> None:
        """Forget everything, and begin at `revision`."""
        self.entries.clear()
        self._of_token.clear()
        self._order.clear()
        self._named.clear()
        self.applied = self._known_since = revision

    def named_since(self, revision: int) -> list[str] | None:
        """Return the tokens named in (`revision`, `applied`]; None if that is no longer known."""
        if revision < self._known_since:
            return None
        found = []
        for token_id in reversed(self._named):
            if self._named[token_id] <= revision:
                break
            found.append(token_id)
        return found

    def _drop(self, key: bytes) -> None:
        entry = self.entries.pop(key)
        keys = tuple(k for k in _all(self._of_token[entry.token_id]) if k != key)
        if keys:
            self._of_token[entry.token_id] = keys[0] if len(keys) == 1 else keys
        else:
            del self._of_token[entry.token_id]

    def _make_room(self) -> None:
        """Drop the entry that has gone unused for longest, roughly.

        CLOCK, or second chance (Corbató 1968): each use saves an entry from one look. Unlike a
        list in order of use it costs an answer nothing but a flag, and eight bytes an entry.
        """
        looks = 0
        while self._order:
            key = self._order.popleft()
            entry = self.entries.get(key)
            if entry is None:
                continue
            looks += 1
            if not entry.used or looks == LOOKS_MAX:
                self._drop(key)
                return
            entry.used = False
            self._order.append(key)


def _all(keys: bytes | tuple[bytes, ...]) -> tuple[bytes, ...]:
    return (keys,) if isinstance(keys, bytes) else keys

"""A bounded cache of reads about tokens, without those that an invalidation has ended.

Owns the entries, the applied position and the recent invalidations. Leases and messages belong to
the users of a VerdictCache: `VerifierState` in the service, `Subscription` in the client library.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeVar

__all__ = ["HISTORY_MAX", "NOWHERE", "Entry", "Position", "VerdictCache"]

# Known revisions, and token ids of recent invalidations. A read takes milliseconds, and a client
# that was cut off reconnects within seconds; deletions come at a thousand a second at most.
HISTORY_MAX: Final = 10_000
# Entries to examine for one eviction. If all of a million entries were in use, examining each of
# them would block every verify for a tenth of a second.
EXAMINED_MAX: Final = 32


class Position(NamedTuple):
    """A place in one history of the database (rule 12).

    Two histories can give the same revision to different changes, for example after a failover. The
    mark distinguishes them: a random number, never 0, written by the transaction that took the
    revision. Two holders of the same position share everything up to it.
    """

    revision: int
    mark: int
    """0 to 2**64 - 1. 0: the sender does not know its history."""


NOWHERE: Final = Position(0, 0)
"""The position of a cache that does not know a history yet."""


@dataclass(slots=True, eq=False, repr=False)
class Entry:
    """A cached value. Subclasses add fields, with slots to keep entries small."""

    token_id: str
    keep_until: float
    """Seconds on the process's clock. From then on readers ignore the entry. This bounds the damage
    of every fault that the protocol does not cover (rule 12)."""
    used: bool = field(default=False, init=False)
    """Set by readers that answer with the entry. Eviction prefers entries that were not used."""


E = TypeVar("E", bound=Entry)


class VerdictCache(Generic[E]):
    """Entries by key, the position up to which invalidations were applied, and recent
    invalidations.

    A reader of `entries` must hold a lease, and read them after its verify began. Only one thread
    may change the cache. Other threads may read it at the same time.
    """

    __slots__ = (
        "_marks",
        "_named",
        "_of_token",
        "_order",
        "entries",
        "entries_max",
        "evictions",
        "position",
    )

    def __init__(self, entries_max: int) -> None:
        self.entries_max = entries_max
        """The maximum number of entries."""
        self.entries: dict[bytes, E] = {}
        self.evictions = 0
        """The entries that made room for others. Only increases."""
        self.position = NOWHERE
        """Nothing in `entries` was invalidated by a revision up to this one."""
        # The known revisions, oldest first, with their marks. The last one is `position`.
        self._marks: dict[int, int] = {}
        # The token ids named after the oldest known revision, each with the last revision that
        # named it, in the order of those revisions.
        self._named: dict[str, int] = {}
        self._of_token: dict[str, bytes | tuple[bytes, ...]] = {}
        # Keys in the order in which eviction examines them. Keys that are gone or occur twice are
        # skipped.
        self._order: deque[bytes] = deque()

    def __len__(self) -> int:
        return len(self.entries)

    def knows(self, position: Position) -> bool:
        """Return whether `position` is certain to be on the history of this cache.

        False also means "not known": the revision is too old, or was skipped because several were
        applied as one, or the sender does not know marks.
        """
        return position.mark != 0 and self._marks.get(position.revision) == position.mark

    def agrees(self, position: Position) -> bool:
        """Return whether `position` may be on the history of this cache.

        False means that the revision is known with another mark, which proves that the histories
        differ.
        """
        return self._marks.get(position.revision, position.mark) == position.mark

    def store(self, key: bytes, entry: E, position: Position) -> bool:
        """Store an entry that was read in a snapshot at `position`, if that is safe. Return whether
        it was.

        The fill rule (rules 4 and 12): the position must be known, and no later revision may have
        named the token. An applied invalidation is not applied again, so it would never remove such
        an entry.
        """
        if not self.knows(position) or self._named.get(entry.token_id, 0) > position.revision:
            return False
        if self.entries_max <= 0:
            return False
        if key in self.entries:
            self._remove(key)
        elif len(self.entries) >= self.entries_max:
            self._evict_one()
        self.entries[key] = entry
        keys = self._of_token.get(entry.token_id)
        if keys is None:
            self._of_token[entry.token_id] = key
        else:
            self._of_token[entry.token_id] = (*_all(keys), key)
        self._order.append(key)
        if len(self._order) > 2 * len(self.entries) + 1_000:
            # Keys of entries that were invalidated stay in the queue.
            self._order = deque(self.entries)
        return True

    def apply(self, position: Position, token_ids: Iterable[str]) -> None:
        """Drop the entries of tokens that revisions up to `position` invalidated.

        `token_ids` contains all tokens named since the last position, and may contain more:
        applying an invalidation twice does no harm. The caller ensures that `position` is on the
        same history as `self.position`.
        """
        revision = max(position.revision, self.position.revision)
        for token_id in token_ids:
            for key in _all(self._of_token.get(token_id, ())):
                self._remove(key)
            # Moved to the end, so that the order stays that of revisions.
            self._named.pop(token_id, None)
            self._named[token_id] = revision
        if position.revision > self.position.revision:
            if position.mark:
                # As in `reset`: a position without a mark must never count as known.
                self._marks[position.revision] = position.mark
            self.position = position
        while len(self._named) > HISTORY_MAX:
            self._drop_known_before(self._named.pop(next(iter(self._named))))
        while len(self._marks) > HISTORY_MAX:
            del self._marks[next(iter(self._marks))]

    def reset(self, position: Position) -> None:
        """Drop everything and begin at `position`."""
        self.entries.clear()
        self._of_token.clear()
        self._order.clear()
        self._named.clear()
        # A mark of 0 stands for no history, so it must never match.
        self._marks = {position.revision: position.mark} if position.mark else {}
        self.position = position

    def named_since(self, position: Position) -> list[str] | None:
        """Return the tokens named after `position`, or None if the position is not known."""
        if not self.knows(position):
            return None
        found = []
        for token_id in reversed(self._named):
            if self._named[token_id] <= position.revision:
                break
            found.append(token_id)
        return found

    def _drop_known_before(self, revision: int) -> None:
        """Drop the revisions before `revision`, because the names of later ones may be
        incomplete.
        """
        for known in tuple(self._marks):
            if known >= revision:
                break
            del self._marks[known]

    def _remove(self, key: bytes) -> None:
        entry = self.entries.pop(key)
        keys = tuple(k for k in _all(self._of_token[entry.token_id]) if k != key)
        if keys:
            self._of_token[entry.token_id] = keys[0] if len(keys) == 1 else keys
        else:
            del self._of_token[entry.token_id]

    def _evict_one(self) -> None:
        """Evict the entry that has been unused for longest, approximately.

        CLOCK, or second chance (Corbató 1968): each use saves an entry from one examination.
        Compared with a list in order of use, an answer costs only a flag, and an entry eight bytes.
        """
        examined = 0
        while self._order:
            key = self._order.popleft()
            entry = self.entries.get(key)
            if entry is None:
                continue
            examined += 1
            if not entry.used or examined == EXAMINED_MAX:
                self._remove(key)
                self.evictions += 1
                return
            entry.used = False
            self._order.append(key)


def _all(keys: bytes | tuple[bytes, ...]) -> tuple[bytes, ...]:
    return (keys,) if isinstance(keys, bytes) else keys

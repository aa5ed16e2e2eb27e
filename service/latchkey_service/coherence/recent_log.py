"""The log that a process has applied lately, for the other processes of its host. Pure.

Owns the changes and the positions between them. The cache cannot replace it, because it drops all
earlier positions when a change names every token.
"""

from collections import deque

from latchkey_coherence.verdict_cache import HISTORY_MAX, Position

from latchkey_service.coherence.log import Change

__all__ = ["RecentLog"]


class RecentLog:
    """The changes after the oldest known position, oldest first."""

    __slots__ = ("_base", "_changes", "_known", "_size")

    def __init__(self, base: Position) -> None:
        self.restart(base)

    def restart(self, base: Position) -> None:
        """Forget everything, and begin at `base`. The mark 0 is never known (rule 12)."""
        self._base = base
        self._changes: deque[Change] = deque()
        self._known = {base} if base.mark else set()
        self._size = 0

    def append(self, change: Change) -> None:
        """Add the change that follows."""
        self._changes.append(change)
        self._known.add(change.position)
        self._size += 1 + len(change.token_ids)
        while self._size > HISTORY_MAX and len(self._changes) > 1:
            oldest = self._changes.popleft()
            self._size -= 1 + len(oldest.token_ids)
            self._known.discard(self._base)
            # Everything after this position is still there.
            self._base = oldest.position

    def after(self, position: Position) -> tuple[Change, ...] | None:
        """Return the changes after `position`, or None if the position is not known (rule 12)."""
        if position not in self._known:
            return None
        found = []
        for change in reversed(self._changes):
            if change.position.revision <= position.revision:
                break
            found.append(change)
        return tuple(reversed(found))

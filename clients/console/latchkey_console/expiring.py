"""A store that bounds the lifetime and the number of its values. Pure: it takes a clock.

A full `cachetools.TTLCache` evicts the least recently read value, which may be newer than others.
This store evicts the oldest value, whether or not it was read.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Expiring"]

T = TypeVar("T")


class Expiring(Generic[T]):
    """Keeps at most `size_max` values by key, each for `lifetime_seconds` after `put`.

    All values have the same lifetime, so they expire in insertion order. When the store is full,
    a new value evicts the oldest.
    """

    def __init__(
        self, lifetime_seconds: float, size_max: int, monotonic: Callable[[], float]
    ) -> None:
        self._lifetime_seconds = lifetime_seconds
        self._size_max = size_max
        self._monotonic = monotonic
        self._items: dict[str, tuple[float, T]] = {}

    def put(self, key: str, value: T) -> None:
        """Store `value` under `key`, replacing any earlier value."""
        self._prune()
        self._items.pop(key, None)
        if len(self._items) >= self._size_max:
            del self._items[next(iter(self._items))]
        self._items[key] = (self._monotonic() + self._lifetime_seconds, value)

    def get(self, key: str) -> T | None:
        """Return the value for `key`, or None."""
        self._prune()
        item = self._items.get(key)
        return None if item is None else item[1]

    def pop(self, key: str) -> T | None:
        """Remove and return the value for `key`, or return None."""
        self._prune()
        item = self._items.pop(key, None)
        return None if item is None else item[1]

    def __len__(self) -> int:
        self._prune()
        return len(self._items)

    def _prune(self) -> None:
        now = self._monotonic()
        while self._items:
            key = next(iter(self._items))
            if self._items[key][0] > now:
                return
            del self._items[key]

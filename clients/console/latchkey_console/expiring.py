"""Memory with two bounds, time and number. Pure: the clock is passed in."""

from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Expiring"]

T = TypeVar("T")


class Expiring(Generic[T]):
    """Values by key, each for `lifetime_seconds` from when it was put, at most `size_max`.

    All live equally long, so the order of insertion is that of running out, and the oldest makes
    room for a new one.
    """

    def __init__(
        self, lifetime_seconds: float, size_max: int, monotonic: Callable[[], float]
    ) -> None:
        self._lifetime_seconds = lifetime_seconds
        self._size_max = size_max
        self._monotonic = monotonic
        self._items: dict[str, tuple[float, T]] = {}

    def put(self, key: str, value: T) -> None:
        """Keep `value`, in place of what the key had."""
        self._prune()
        self._items.pop(key, None)
        if len(self._items) >= self._size_max:
            del self._items[next(iter(self._items))]
        self._items[key] = (self._monotonic() + self._lifetime_seconds, value)

    def get(self, key: str) -> T | None:
        """Return what the key has, or None."""
        self._prune()
        item = self._items.get(key)
        return None if item is None else item[1]

    def pop(self, key: str) -> T | None:
        """Return what the key has, or None, and forget it."""
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

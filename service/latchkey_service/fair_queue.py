"""A queue of calls that gives each caller an equal share. Event loop only.

Owns the order of waiting calls, and which of them makes room for another. It does not own when they
start (`native.py`, `admission.py`), or how long the queue may be (`queue_limit.py`).
"""

from collections import OrderedDict
from typing import Final, Generic, TypeVar

__all__ = ["SMALL_BYTES", "FairQueue"]

Call = TypeVar("Call")

# Requests of at most so many bytes do not count: 5,000 of them take 5 MB.
SMALL_BYTES: Final = 1_024


class FairQueue(Generic[Call]):
    """Calls by id. They leave in rounds: one of each caller, each caller's in order of arrival.

    Counts the bytes of large requests too, because a few large ones fill the memory as well as many
    small ones. Small ones are bounded by their number. Every verify under load passes through here.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max: Final = bytes_max
        self._bytes = 0
        self._large: dict[int, int] = {}
        self.size = 0
        """How many calls wait. The same as `len`, which takes longer."""
        # In the order of their next turns.
        self._callers: OrderedDict[str, OrderedDict[int, Call]] = OrderedDict()

    def __len__(self) -> int:
        return self.size

    def ahead_of(self, caller: str) -> int:
        """Return how many calls start before the next one of `caller`, at most."""
        its = len(self._callers.get(caller, ()))
        return sum(min(len(calls), its + 1) for calls in self._callers.values())

    def fits(self, size_bytes: int) -> bool:
        """Return whether there is room for the bytes of another request."""
        return size_bytes <= SMALL_BYTES or self._bytes + size_bytes <= self._bytes_max

    def add(self, call_id: int, caller: str, call: Call, size_bytes: int = 0) -> None:
        """Append a call."""
        its = self._callers.get(caller)
        if its is None:
            its = self._callers[caller] = OrderedDict()
        its[call_id] = call
        self.size += 1
        if size_bytes > SMALL_BYTES:
            self._large[call_id] = size_bytes
            self._bytes += size_bytes

    def take(self, count: int) -> list[Call]:
        """Remove and return the next `count` calls, or fewer."""
        count = min(count, self.size)
        self.size -= count
        taken = []
        for _ in range(count):
            for caller, its in self._callers.items():  # noqa: B007 - only the first
                break
            call_id, call = its.popitem(last=False)
            taken.append(call)
            if self._large:
                self._bytes -= self._large.pop(call_id, 0)
            if not its:
                del self._callers[caller]
            elif len(self._callers) > 1:
                self._callers.move_to_end(caller)
        return taken

    def remove(self, call_id: int) -> bool:
        """Remove a call. Return whether it was here."""
        for caller, its in self._callers.items():
            if call_id in its:
                del its[call_id]
                self._removed(caller, call_id)
                return True
        return False

    def yields_to(self, caller: str) -> bool:
        """Return whether `displace` would make room for a call of `caller`."""
        return self._largest_for(caller) is not None

    def displace(self, caller: str) -> Call | None:
        """Make room for a call of `caller` in a full queue, if it has less than its share.

        Removes and returns the newest call of the caller with the most. Returns None if `caller`
        has about as many.
        """
        largest = self._largest_for(caller)
        if largest is None:
            return None
        call_id, call = self._callers[largest].popitem()
        self._removed(largest, call_id)
        return call

    def _largest_for(self, caller: str) -> str | None:
        """Return the caller with the most calls, if it has at least two more than `caller`."""
        if not self._callers:
            return None
        largest, its = max(self._callers.items(), key=lambda item: len(item[1]))
        return largest if len(its) > len(self._callers.get(caller, ())) + 1 else None

    def _removed(self, caller: str, call_id: int) -> None:
        self.size -= 1
        self._bytes -= self._large.pop(call_id, 0)
        if not self._callers[caller]:
            del self._callers[caller]

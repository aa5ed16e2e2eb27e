"""A queue of calls that gives each caller an equal share. Event loop only.

Owns the order of waiting calls, and which of them makes room for another. It does not own when they
start (`native.py`, `admission.py`), or how long the queue may be (`queue_limit.py`).
"""

from collections import OrderedDict
from typing import Final, Generic, TypeVar

__all__ = ["FairQueue"]

Call = TypeVar("Call")


class FairQueue(Generic[Call]):
    """Calls by id. They leave in rounds: one of each caller, each caller's in order of arrival.

    Counts the bytes of their requests too, because a few large ones fill the memory as well as many
    small ones.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max: Final = bytes_max
        self._bytes = 0
        self.caller_of: dict[int, str] = {}
        """The caller of each call, by id. Usually empty, which costs less to see than `len`."""
        # In the order of their next turns.
        self._callers: OrderedDict[str, OrderedDict[int, tuple[Call, int]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.caller_of)

    def __contains__(self, call_id: int) -> bool:
        return call_id in self.caller_of

    def ahead_of(self, caller: str) -> int:
        """Return how many calls start before the next one of `caller`, at most."""
        its = len(self._callers.get(caller, ()))
        return sum(min(len(calls), its + 1) for calls in self._callers.values())

    def fits(self, size_bytes: int) -> bool:
        """Return whether there is room for the bytes of another request."""
        return self._bytes + size_bytes <= self._bytes_max

    def add(self, call_id: int, caller: str, call: Call, size_bytes: int) -> None:
        """Append a call."""
        self.caller_of[call_id] = caller
        self._bytes += size_bytes
        its = self._callers.get(caller)
        if its is None:
            its = self._callers[caller] = OrderedDict()
        its[call_id] = call, size_bytes

    def take(self) -> Call:
        """Remove and return the next call. The queue must not be empty."""
        caller, its = next(iter(self._callers.items()))
        call_id, (call, size_bytes) = its.popitem(last=False)
        self._removed(call_id, size_bytes)
        if not its:
            del self._callers[caller]
        elif len(self._callers) > 1:
            self._callers.move_to_end(caller)
        return call

    def remove(self, call_id: int) -> bool:
        """Remove a call. Return whether it was here."""
        caller = self.caller_of.get(call_id)
        if caller is None:
            return False
        _, size_bytes = self._callers[caller].pop(call_id)
        self._removed(call_id, size_bytes)
        if not self._callers[caller]:
            del self._callers[caller]
        return True

    def displace(self, caller: str) -> Call | None:
        """Make room for a call of `caller` in a full queue, if it has less than its share.

        Removes and returns the newest call of the caller with the most. Returns None if `caller`
        has about as many.
        """
        if not self._callers:
            return None
        largest, its = max(self._callers.items(), key=lambda item: len(item[1]))
        if len(its) <= len(self._callers.get(caller, ())) + 1:
            return None
        call_id, (call, size_bytes) = its.popitem()
        self._removed(call_id, size_bytes)
        if not its:
            del self._callers[largest]
        return call

    def clear(self) -> list[Call]:
        """Remove and return all calls."""
        return [self.take() for _ in range(len(self))]

    def _removed(self, call_id: int, size_bytes: int) -> None:
        del self.caller_of[call_id]
        self._bytes -= size_bytes

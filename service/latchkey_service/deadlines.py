"""How long a call may take: the caller's deadline, less what it takes to answer in time."""

from typing import Protocol

__all__ = ["CALL_SECONDS_MAX", "HasDeadline", "budget_seconds", "confirmation_seconds"]

# However patient the caller: longer than any healthy call, shorter than people wait.
CALL_SECONDS_MAX = 10.0
# Kept back from the caller's deadline, so that it gets our reason and not its own time-out. When
# Postgres freezes, hundreds reach theirs at once, and to tell them all takes tens of milliseconds.
ANSWER_SECONDS = 0.1


class HasDeadline(Protocol):
    """The part of a servicer's context that tells the caller's deadline."""

    def time_remaining(self) -> float | None:
        """Return how many seconds the caller will wait; None or a huge number: no deadline."""
        ...


def budget_seconds(context: HasDeadline) -> float:
    """Return how many seconds there are to find the answer in."""
    remaining = context.time_remaining()
    if remaining is None:
        return CALL_SECONDS_MAX
    # A tenth at most, or short deadlines would leave no time for the work.
    return min(CALL_SECONDS_MAX, remaining - min(ANSWER_SECONDS, remaining / 10))


def confirmation_seconds(context: HasDeadline) -> float:
    """Return how long a Delete may wait to be confirmed.

    Less than the call has, so that its caller is told that the deletion stands, and not only that
    the time was too short.
    """
    return budget_seconds(context) * 0.9

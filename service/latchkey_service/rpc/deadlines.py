"""The time budget of a call: its deadline, less a reserve for sending the answer."""

from typing import Protocol

__all__ = ["CALL_SECONDS_MAX", "HasDeadline", "budget_seconds", "confirmation_seconds"]

# Limit for callers with a longer deadline, or none: longer than any healthy call takes.
CALL_SECONDS_MAX = 10.0
# Reserve before the caller's deadline, so that it receives our reason and not its own timeout. When
# Postgres hangs, hundreds of calls reach theirs at once; answering takes tens of milliseconds.
ANSWER_SECONDS = 0.1


class HasDeadline(Protocol):
    """The part of a servicer's context that knows the caller's deadline."""

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None or a huge number means no deadline."""
        ...


def budget_seconds(context: HasDeadline) -> float:
    """Return the seconds available for computing the answer."""
    remaining = context.time_remaining()
    if remaining is None:
        return CALL_SECONDS_MAX
    # Reserve at most a tenth, or short deadlines would leave no time for the work.
    return min(CALL_SECONDS_MAX, remaining - min(ANSWER_SECONDS, remaining / 10))


def confirmation_seconds(context: HasDeadline) -> float:
    """Return how long a Delete may wait for confirmations.

    This is less than the call's budget, so that the caller learns that the deletion stands, rather
    than only that time ran out.
    """
    return budget_seconds(context) * 0.9

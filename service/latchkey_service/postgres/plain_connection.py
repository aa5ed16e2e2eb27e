"""The connection class of the whole service: asyncpg's, with fewer round trips.

Does not own pools, time-outs or the translation of errors (`connections.py`).
"""

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import asyncpg
from latchkey_coherence.lease import boottime

__all__ = ["PlainConnection"]

# Postgres assigns lower OIDs by hand, in its sources, and never changes them (`transam.h`).
_ASSIGNED_BY_HAND: Final = range(1, 10_000)


class _Known(NamedTuple):
    """Stands for the query about types that was not sent."""

    # asyncpg prepares a statement again if the query about types was unnamed.
    name: str = "known"


_types: Final[dict[frozenset[int], Any]] = {}


class PlainConnection(asyncpg.Connection):
    """A connection that returns to the pool without a round trip: our statements leave no state.

    Postgres' built-in types are the same in every database, so one connection of the process asks
    about them. The query takes 8 ms of Postgres' processor time; asyncpg would repeat it on each
    connection that sends a `bigint[]`, for example.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Time of its last use, on a clock that also runs while the machine is suspended.
        self.used_at = boottime()
        # The generation of the pool when the attempt to connect began.
        self.generation = 0

    def get_reset_query(self) -> str:
        """Return no statement."""
        return ""

    def touch(self) -> None:
        """Record that the connection was just used."""
        self.used_at = boottime()

    # asyncpg has no public way to describe types. If it renames this method, every connection asks.
    async def _introspect_types(self, typeoids: Iterable[int], *more: Any) -> Any:
        """Return the descriptions of types, and the statement that asked for them."""
        wanted = frozenset(typeoids)
        if wanted in _types:
            return _types[wanted], _Known()
        found = await super()._introspect_types(wanted, *more)  # type: ignore[misc]  # private
        if all(oid in _ASSIGNED_BY_HAND for oid in wanted):
            _types[wanted] = found[0]
        return found

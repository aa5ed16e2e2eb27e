"""A connection that knows the built-in types that Postgres has described to another one.

Does not own what else differs from asyncpg's connection (`connections.py`).
"""

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import asyncpg

__all__ = ["KnownTypesConnection"]

# Postgres assigns these OIDs by hand, in its sources (`transam.h`). The scalar and array types
# among them are the same in each release.
_ASSIGNED_BY_HAND: Final = range(1, 10_000)


class _Known(NamedTuple):
    """Stands for the query about types that was not sent."""

    # asyncpg prepares a statement again if the query about types was unnamed.
    name: str = "known"


# One entry for each set of types that a statement of the service needs.
_types: Final[dict[frozenset[int], Any]] = {}


class KnownTypesConnection(asyncpg.Connection):
    """Keeps, for the process, what Postgres says about each set of built-in types.

    The query takes 8 ms of Postgres' processor time; asyncpg would repeat it on each connection
    that sends a `bigint[]`, for example.
    """

    # asyncpg has no public way to describe types. If a release renames this method, every
    # connection asks. If one changes what it returns, statements fail, and the tests of this class.
    async def _introspect_types(self, typeoids: Iterable[int], *more: Any) -> Any:
        """Return the descriptions of types, and the statement that asked for them."""
        wanted = frozenset(typeoids)
        if wanted in _types:
            return _types[wanted], _Known()
        found = await super()._introspect_types(wanted, *more)  # type: ignore[misc]  # private
        if all(oid in _ASSIGNED_BY_HAND for oid in wanted):
            _types[wanted] = found[0]
        return found

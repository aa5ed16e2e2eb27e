"""A connection that records its statements as spans. Used only if traces are on."""

import contextlib
import functools
import re
from typing import Any, Final, NamedTuple

from latchkey_service import tracing
from latchkey_service.postgres.connections import PlainConnection

__all__ = ["TracedConnection", "summary_of"]

_CHANGE: Final = re.compile(r"\b(INSERT|UPDATE|DELETE)\s+(?:INTO\s+|FROM\s+)?(?!SET\b)([a-z_]\w*)")
_READ: Final = re.compile(r"\b(?:FROM|JOIN)\s+([a-z_]\w*)(?![\w(])")
_FIRST: Final = re.compile(r"\s*(\w+)")
_COMMENT: Final = re.compile(r"--[^\n]*")
# A statement about tokens changes other tables too, such as `audit`.
_SUBJECTS: Final = ("token", "secret")
# The limit that the semantic conventions recommend.
_SUMMARY_LENGTH_MAX: Final = 255
# More than there are statements. Those of lists vary with their filters.
_SUMMARIES_MAX: Final = 512


class TracedConnection(PlainConnection):
    """A connection whose statements are spans of the call that makes them."""

    async def execute(self, query: str, *args: Any, **options: Any) -> Any:
        """Record the statement and execute it."""
        with _span(query):
            return await super().execute(query, *args, **options)

    async def executemany(self, command: str, args: Any, **options: Any) -> Any:
        """Record the statements as one and execute them."""
        with _span(command):
            return await super().executemany(command, args, **options)

    async def fetch(self, query: str, *args: Any, **options: Any) -> Any:
        """Record the query and return its rows."""
        with _span(query):
            return await super().fetch(query, *args, **options)

    async def fetchrow(self, query: str, *args: Any, **options: Any) -> Any:
        """Record the query and return its first row."""
        with _span(query):
            return await super().fetchrow(query, *args, **options)

    async def fetchval(self, query: str, *args: Any, **options: Any) -> Any:
        """Record the query and return a value of its first row."""
        with _span(query):
            return await super().fetchval(query, *args, **options)


class Summary(NamedTuple):
    """What a statement does, for its span: only words of our own statements, no parameters."""

    operation: str
    table: str
    changes: str
    """All operations, such as `UPDATE head INSERT audit`."""

    @property
    def name(self) -> str:
        """The name of the span, such as `INSERT token`."""
        return f"{self.operation} {self.table}".rstrip()


@functools.lru_cache(maxsize=_SUMMARIES_MAX)
def summary_of(query: str) -> Summary:
    """Return the operation on tokens or secrets, or else the first operation of a statement."""
    query = _COMMENT.sub(" ", query)
    if changes := _CHANGE.findall(query):
        operation, table = min(changes, key=lambda change: _rank(change[1]))
        every = " ".join(f"{verb} {name}" for verb, name in changes)
        return Summary(operation, table, every[:_SUMMARY_LENGTH_MAX])
    first = _FIRST.match(query)
    word = first[1].upper() if first else ""
    if word not in ("SELECT", "WITH"):
        return Summary(word, "", word)
    table = min(_READ.findall(query), key=_rank, default="")
    return Summary("SELECT", table, f"SELECT {table}".rstrip())


def _rank(table: str) -> int:
    return _SUBJECTS.index(table) if table in _SUBJECTS else len(_SUBJECTS)


def _span(query: str) -> contextlib.AbstractContextManager[Any]:
    if tracing.current() is None:
        return contextlib.nullcontext()
    return _recorded(query)


def _recorded(query: str) -> contextlib.AbstractContextManager[Any]:
    summary = summary_of(query)
    attributes = {
        "db.system.name": "postgresql",
        "db.operation.name": summary.operation,
        "db.query.summary": summary.changes,
    }
    if summary.table:
        attributes["db.collection.name"] = summary.table
    return tracing.span(summary.name, attributes)

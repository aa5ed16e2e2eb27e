"""The log of invalidations, as a process reads it. Values only."""

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

from latchkey_coherence.verdict_cache import Position

__all__ = ["EVERY_TOKEN", "Change", "Log", "Registration", "Server"]

# Stands in the log for a change that names every token.
EVERY_TOKEN: Final = ""


class Server(NamedTuple):
    """The Postgres server that a statement reached, as far as the engine reports it."""

    identifier: str | None
    """`system_identifier` of the cluster. Copies and standbys share it."""
    timeline: str | None
    """Eight hexadecimal digits, which change with each promotion."""


class Change(NamedTuple):
    """The tokens that one revision invalidated."""

    position: Position
    token_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Log:
    """The log after a position, from one snapshot on one server."""

    known: bool
    """Whether the server's history holds that position. If not, `changes` is empty."""
    server: Server
    head: Position
    changes: tuple[Change, ...]
    """Oldest first."""
    complete: bool = True
    """False if more tokens were named than a reader accepts."""
    read_began: float = math.inf
    """When the lead of this host began to read it, on the clock of the host. Infinite if this
    process has read it itself."""


class Registration(NamedTuple):
    """The result of committing a process's row."""

    position: Position
    """The newest position, where the empty cache begins."""
    acknowledged: int
    """The revision that the row acknowledges."""
    server: Server

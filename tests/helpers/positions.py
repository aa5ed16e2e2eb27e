"""Positions in invented histories."""

from latchkey_coherence.verdict_cache import Position

__all__ = ["at"]


def at(revision: int, history: int = 1) -> Position:
    """Return the position of `revision` in a history. Histories share nothing, 0 included."""
    return Position(revision, history << 32 | revision + 1)

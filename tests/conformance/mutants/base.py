"""The form of a fault, and the list of all faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from latchkey._subscription import Event, Grant, Stream
from latchkey_coherence.verdict_cache import Position, VerdictCache

__all__ = ["MUTANTS", "Mutant", "Patch", "mutant", "on_grant", "on_receive", "on_store"]

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutant:
    """A fault, the rule that it breaks, and a case that must find it."""

    rule: int
    case: str
    apply: Callable[[Patch], None]

    @property
    def name(self) -> str:
        return self.apply.__name__


MUTANTS: list[Mutant] = []


def mutant(rule: int, case: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Register a fault in `MUTANTS`."""

    def enter(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS.append(Mutant(rule, case, apply))
        return apply

    return enter


def on_receive(patch: Patch, before: Callable[[Stream, Event | None, float], bool]) -> None:
    """Call `before` first. If it returns False, the stream does not receive the event."""
    receive = Stream.receive

    def mutated(self: Stream, event: Event | None, now: float) -> None:
        if before(self, event, now):
            receive(self, event, now)

    patch.setattr(Stream, "receive", mutated)


def on_grant(patch: Patch, change: Callable[[Stream, Grant, float], Grant]) -> None:
    """Let a stream receive the grant that `change` returns."""
    receive_grant = Stream._receive_grant

    def mutated(self: Stream, grant: Grant, now: float) -> None:
        receive_grant(self, change(self, grant, now), now)

    patch.setattr(Stream, "_receive_grant", mutated)


def on_store(patch: Patch, change: Callable[[VerdictCache[Any], Any, Position], Position]) -> None:
    """Let a cache store a verdict as if it was read at the position that `change` returns."""
    store = VerdictCache.store

    def mutated(self: VerdictCache[Any], key: bytes, entry: Any, position: Position) -> bool:
        return store(self, key, entry, change(self, entry, position))

    patch.setattr(VerdictCache, "store", mutated)

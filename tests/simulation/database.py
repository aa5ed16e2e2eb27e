"""A database whose history can fork, modelled on Postgres. Each statement is one step.

A commit is durable once the standby has it. While replication is stalled, no commit is answered,
but a commit may become visible when its wait is cancelled, or through crash recovery. The
replication of a deposed database stays stalled, but it continues to answer reads.
"""

from collections.abc import Callable
from random import Random
from typing import TypeVar

from latchkey_coherence.rate import Draw, RateLimit, draw
from latchkey_coherence.verdict_cache import Position
from latchkey_service.coherence.ack_rules import VerifierRow
from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.coherence.verifier_state import Change, Log, Server

__all__ = ["LEASE_SECONDS", "Database"]

LEASE_SECONDS = 3.0

T = TypeVar("T")


class Database:
    """The tables of one server, as far as the protocol uses them."""

    def __init__(self, random: Random, timeline: str | None) -> None:
        self.random = random
        self.server = Server("7000", timeline)
        self.head = self.pruned = Position(0, self._mark())
        self.log: list[tuple[Position, str]] = []
        self.deleted: set[str] = set()
        self.rows: dict[str, VerifierRow] = {}
        # When the buckets of tokens with a rate limit will be full, in microseconds.
        self.full_at: dict[str, int] = {}
        self.replicated: Database | None = None
        """The standby's content while replication is stalled. None if the standby has the same
        content.
        """
        self.deposed = False

    def copy(self, timeline: str | None) -> "Database":
        """Return the standby's content as a separate database on another timeline."""
        source = self.replicated or self
        new = Database(self.random, timeline)
        new.head, new.pruned = source.head, source.pruned
        new.log, new.deleted, new.rows = list(source.log), set(source.deleted), dict(source.rows)
        # Draws do not wait for the standby, which may lack all of them.
        if source.full_at and self.random.random() < 0.5:
            new.full_at = dict(source.full_at)
        return new

    def stall(self) -> None:
        if self.replicated is None:
            self.replicated = self.copy(self.server.timeline)

    def catch_up(self) -> None:
        if not self.deposed:
            self.replicated = None

    def depose(self) -> None:
        self.stall()
        self.deposed = True

    def commit(self, change: Callable[[], T]) -> T | None:
        """Make a change that must be durable. Return None if the commit is not answered."""
        if self.replicated is None:
            return change()
        if self.random.random() < 0.5:
            change()
        return None

    # Statements.

    def snapshot(self) -> Snapshot:
        return Snapshot(self.head, self.server.timeline)

    def knows(self, position: Position) -> bool:
        return position in (self.head, self.pruned) or any(p == position for p, _ in self.log)

    def delete(self, token_id: str) -> Position | None:
        def change() -> Position:
            self.head = Position(self.head.revision + 1, self._mark())
            self.log.append((self.head, token_id))
            self.deleted.add(token_id)
            return self.head

        return self.commit(change)

    def register(
        self, name: str, incarnation: int, *, acknowledge: bool
    ) -> tuple[Position, int, Server] | None:
        def change() -> tuple[Position, int, Server]:
            renewal = self.rows[name].renewal + 1 if name in self.rows else 0
            acknowledged = self.head.revision if acknowledge else 0
            self.rows[name] = VerifierRow(name, incarnation, renewal, acknowledged, LEASE_SECONDS)
            return self.head, acknowledged, self.server

        row = self.rows.get(name)
        if row is not None and row.incarnation >= incarnation:
            return None
        return self.commit(change)

    def read_log(self, applied: Position) -> Log:
        if applied == self.head:
            return Log(True, self.server, self.head, ())
        known = self.knows(applied)
        changes = tuple(
            Change(position, (token,))
            for position, token in self.log
            if known and position.revision > applied.revision
        )
        return Log(known, self.server, self.head, changes)

    def renew(
        self, name: str, incarnation: int, applied: Position, acknowledged: int
    ) -> tuple[bool, Log] | None:
        def change() -> tuple[bool, Log]:
            row = self.rows.get(name)
            renewed = row is not None and row.incarnation == incarnation and self.knows(applied)
            if renewed and row is not None:
                self.rows[name] = VerifierRow(
                    name, incarnation, row.renewal + 1, acknowledged, LEASE_SECONDS
                )
            return renewed, self.read_log(applied)

        return self.commit(change)

    def draw(self, token_id: str, limit: RateLimit, needed: int, ahead: int, now: float) -> Draw:
        microseconds = int(now * 1_000_000)
        drawn = draw(limit, self.full_at.get(token_id, 0), microseconds, needed, ahead)
        self.full_at[token_id] = drawn.full_at
        return drawn

    def remove_dead(self, dead: VerifierRow) -> None:
        def change() -> None:
            row = self.rows.get(dead.id)
            if row is not None and row[1:3] == dead[1:3]:
                del self.rows[dead.id]

        self.commit(change)

    def remove(self, name: str) -> None:
        self.commit(lambda: self.rows.pop(name, None))

    def prune(self) -> None:
        """Remove the log entries that every verifier has acknowledged, on the standby too."""
        bound = min((r.acknowledged_revision for r in self.rows.values()), default=2**62)
        old = [position for position, _ in self.log if position.revision <= bound]
        if old and self.replicated is None:
            self.pruned = old[-1]
            self.log = [(p, t) for p, t in self.log if p.revision > self.pruned.revision]

    def _mark(self) -> int:
        return self.random.getrandbits(64) or 1

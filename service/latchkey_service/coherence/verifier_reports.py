"""What the rows of verifiers say about processes and clients, for people. Values only."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from latchkey_coherence.verdict_cache import Position

__all__ = ["Report", "SiblingReport", "Status", "VerifierStatus", "processes_of"]


class VerifierStatus(NamedTuple):
    """A verifier's row, for people. Times are on the database's clock."""

    id: str
    host: str
    process_id: int
    version: str
    start_time: datetime
    acknowledged_revision: int
    lease_seconds: float
    lease_remaining_seconds: float
    clients: int
    notifications: int
    waiting_for: list[str]
    pepper_ids: list[str]
    database_host: str
    server_identifier: str | None
    server_timeline: str | None
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Status:
    """The newest position and all verifiers, oldest first, from one snapshot."""

    head: Position
    verifiers: list[VerifierStatus]
    schema: int
    """Number of the newest migration."""


class SiblingReport(NamedTuple):
    """Another process of the host that the row represents, for people."""

    id: str
    process_id: int
    start_time: float
    """In seconds of Unix time."""
    clients: int
    clients_confirmed: int
    clients_outwaited: int
    waiting_for: list[str]
    acknowledged_revision: int
    behind_seconds: float
    """How much earlier its lease ends than that of the row's own process."""


class Report(NamedTuple):
    """The facts about its clients and itself that a process writes into its row at each renewal."""

    clients: int
    """The number of streams."""
    clients_confirmed: int
    """Number of clients with a lease that have confirmed the revision that the row acknowledges."""
    clients_outwaited: int
    """Leases of clients that ended while a revision waited for them. Only rises."""
    waiting_for: list[str]
    """Callers and addresses of the clients that a revision is waiting for."""
    notifications: int
    """Numbered as in the contract's Notifications."""
    database_host: str = ""
    """The host in the list to which the renewal is sent."""
    warnings: list[str] = []  # noqa: RUF012 - never changed
    """Faults that an operator should repair."""
    processes: int = 1
    """How many processes of the host have a lease that this row represents, this one included."""
    processes_outwaited: int = 0
    """Leases of those that ended while a revision waited for them. Only rises."""
    siblings: list[SiblingReport] | None = None
    """The other processes, or None if the row keeps the list that it has."""


def processes_of(columns: Sequence[Any]) -> Iterator[VerifierStatus]:
    """Return all processes that a row represents."""
    *own, siblings = columns
    lead = VerifierStatus(*own)
    yield lead
    for sibling in (SiblingReport(**each) for each in json.loads(siblings)):
        yield lead._replace(
            id=sibling.id,
            process_id=sibling.process_id,
            start_time=datetime.fromtimestamp(sibling.start_time, UTC),
            # The row acknowledges only what each of its processes has confirmed, and at each
            # renewal, while the list is older.
            acknowledged_revision=max(sibling.acknowledged_revision, lead.acknowledged_revision),
            lease_remaining_seconds=max(0.0, lead.lease_remaining_seconds - sibling.behind_seconds),
            clients=sibling.clients,
            waiting_for=sibling.waiting_for,
            warnings=[],
        )

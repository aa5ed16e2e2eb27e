"""The SQL of the audit table, except the entries of changes, which `token_store.py` writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from latchkey_service.coherence.snapshot import SNAPSHOT, Snapshot, snapshot_of
from latchkey_service.postgres.connections import Pool, retry_on_conflict

__all__ = [
    "DENIED_CODES",
    "DETAIL_COLUMNS",
    "DETAIL_VALUES",
    "ENTRY_COLUMNS",
    "NO_DETAILS",
    "POLICY_IN_FORCE",
    "AuditTable",
    "Cursor",
    "Details",
    "Entry",
    "Filter",
    "NewEntry",
]

# PERMISSION_DENIED and UNAUTHENTICATED.
DENIED_CODES: Final = (7, 16)
_OUTCOMES: Final = {
    1: "a.code = 0",
    2: "a.code IN (7, 16)",
    3: "a.code NOT IN (0, 7, 16)",
}
# Stands in an entry for a method: a worker has put a policy in force.
POLICY_IN_FORCE: Final = "/latchkey.v1.Policy/InForce"
# The columns of an entry, in the order of the fields of `Entry`.
ENTRY_COLUMNS: Final = (
    "a.id, a.time, a.caller, a.method, a.account_id, a.token_id, a.peer, a.request_id, a.code,"
    " a.reason, a.calls, a.person, a.client_address, a.call_id, a.trace_id"
)


class Details(NamedTuple):
    """The columns of an entry that most entries leave empty."""

    person: str = ""
    """The person that the caller acts for."""
    client_address: str = ""
    """The client's address, as the trusted proxy reports it."""
    call_id: str = ""
    """The service's own id of the call."""
    trace_id: str = ""
    """The id of the call's trace, if it has one."""


NO_DETAILS: Final = Details()
# For the statements of changes, which write their entries themselves.
DETAIL_COLUMNS: Final = ", ".join(Details._fields)
# Their values, by the number of the parameter that is a list of them.
DETAIL_VALUES: Final = {
    number: ", ".join(
        f"(${number}::text[])[{place}]" for place in range(1, len(Details._fields) + 1)
    )
    for number in range(1, 50)
}


class NewEntry(NamedTuple):
    """An entry to insert."""

    time: datetime
    caller: str
    method: str
    account_id: str
    token_id: str
    peer: str
    request_id: str
    code: int
    reason: str
    calls: int
    person: str = ""
    client_address: str = ""
    call_id: str = ""
    trace_id: str = ""


class Entry(NamedTuple):
    """A stored entry."""

    id: int
    time: datetime
    caller: str
    method: str
    account_id: str
    token_id: str
    peer: str
    request_id: str
    code: int
    reason: str
    calls: int
    person: str
    client_address: str
    call_id: str
    trace_id: str


@dataclass(frozen=True, slots=True)
class Filter:
    """The filters of a query; empty ones match everything. `outcome` as in the contract."""

    account_id: str = ""
    token_id: str = ""
    caller: str = ""
    method: str = ""
    outcome: int = 0
    start_time: datetime | None = None
    end_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Cursor:
    """A position in the list: after the entry with this time and id."""

    time: datetime
    id: int


class AuditTable:
    """The table. All methods raise StoreUnavailable if Postgres does not answer in time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @retry_on_conflict
    async def insert(self, entries: Sequence[NewEntry]) -> None:
        """Insert all entries, or none."""
        async with self._pool.session() as session:
            await session.execute(
                """
                INSERT INTO audit (time, caller, method, account_id, token_id, peer, request_id,
                                   code, reason, calls, person, client_address, call_id, trace_id)
                SELECT * FROM unnest($1::timestamptz[], $2::text[], $3::text[], $4::text[],
                                     $5::text[], $6::text[], $7::text[], $8::smallint[],
                                     $9::text[], $10::bigint[], $11::text[], $12::text[],
                                     $13::text[], $14::text[])
                """,
                *(list(column) for column in zip(*entries, strict=True)),
            )

    @retry_on_conflict
    async def list(
        self, wanted: Filter, after: Cursor | None, limit: int
    ) -> tuple[list[Entry], Snapshot]:
        """Return up to `limit` entries after a position, newest first, and the read's snapshot."""
        conditions, arguments = _conditions(wanted, after)
        async with self._pool.session() as session:
            rows = await session.fetch(
                f"""
                SELECT h.revision, h.mark, h.timeline, page.*
                  FROM {SNAPSHOT}
                  LEFT JOIN (
                       SELECT {ENTRY_COLUMNS}
                         FROM audit a
                        WHERE {" AND ".join(conditions) or "true"}
                        ORDER BY a.time DESC, a.id DESC
                        LIMIT ${len(arguments) + 1}) page ON true
                 ORDER BY page.time DESC, page.id DESC
                """,  # noqa: S608 - constants and numbers only
                *arguments,
                limit,
            )
        return [Entry(*row[3:]) for row in rows if row[3] is not None], snapshot_of(rows[0])


def _conditions(wanted: Filter, after: Cursor | None) -> tuple[list[str], list[Any]]:
    """Return the filters as SQL conditions with their arguments."""
    conditions: list[str] = []
    arguments: list[Any] = []

    def where(condition: str, *values: Any) -> None:
        numbers = range(len(arguments) + 1, len(arguments) + 1 + len(values))
        conditions.append(condition.format(*(f"${number}" for number in numbers)))
        arguments.extend(values)

    if wanted.account_id:
        where("a.account_id = {}", wanted.account_id)
    if wanted.token_id:
        where("a.token_id = {}", wanted.token_id)
    if wanted.caller:
        where("a.caller = {}", wanted.caller)
    if wanted.method:
        where("a.method = {}", wanted.method)
    if wanted.outcome:
        where(_OUTCOMES[wanted.outcome])
    if wanted.start_time is not None:
        where("a.time >= {}", wanted.start_time)
    if wanted.end_time is not None:
        where("a.time < {}", wanted.end_time)
    if after is not None:
        where("(a.time, a.id) < ({}, {})", after.time, after.id)
    return conditions, arguments

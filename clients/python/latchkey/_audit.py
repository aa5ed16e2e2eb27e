"""Audit log values returned by `Client.audit_page`, and their conversion from and to protobuf."""

import enum
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from latchkey_proto.v1 import audit_service_pb2 as pb

from latchkey._convert import time_in, time_out

__all__ = ["AuditEntry", "AuditFilter", "AuditPage", "Outcome", "page_in", "request_out"]


class Outcome(enum.Enum):
    """The result of a call."""

    UNSPECIFIED = "unspecified"
    """An outcome that this version of the library does not know."""
    OK = "ok"
    DENIED = "denied"
    """The caller was not allowed to make the call."""
    FAILED = "failed"
    """The call was allowed but failed."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A management call, or several similar denied or failed calls. Never contains a secret."""

    id: str
    time: datetime
    caller: str
    """The caller's name in the policy. Empty if unknown."""
    method: str
    """Full name, such as /latchkey.v1.TokenService/Create."""
    account_id: str
    token_id: str
    peer: str
    request_id: str
    outcome: Outcome
    code: int
    """A google.rpc.Code."""
    reason: str
    calls: int
    """How many calls this entry stands for."""
    person: str = ""
    """The person for whom the caller made the call, as it reported."""
    client_address: str = ""
    """The client's address, as a trusted proxy reported it."""
    call_id: str = ""
    """The service's own identifier of the call. `request_id` may be the caller's."""
    trace_id: str = ""
    """Identifies the trace of the call, if it has one: 32 hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class AuditPage:
    """Entries, newest first, and the token of the next page. The last page has an empty token."""

    entries: tuple[AuditEntry, ...]
    next_page_token: str


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which entries to return. A field that is not set does not restrict the result."""

    account_id: str = ""
    token_id: str = ""
    caller: str = ""
    method: str = ""
    outcome: Outcome | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None


_OUTCOMES: Final = {
    pb.OUTCOME_OK: Outcome.OK,
    pb.OUTCOME_DENIED: Outcome.DENIED,
    pb.OUTCOME_FAILED: Outcome.FAILED,
}
_OUTCOMES_OUT: Final = {outcome: number for number, outcome in _OUTCOMES.items()}


def request_out(wanted: AuditFilter, page_size: int, page_token: str) -> pb.AuditServiceListRequest:
    """Convert a filter to protobuf. Raises InvalidArgument for a time without a time zone."""
    request = pb.AuditServiceListRequest(
        account_id=wanted.account_id,
        token_id=wanted.token_id,
        caller=wanted.caller,
        method=wanted.method,
        page_size=page_size,
        page_token=page_token,
    )
    if wanted.outcome is not None:
        request.outcome = _OUTCOMES_OUT[wanted.outcome]
    if wanted.start_time is not None:
        request.start_time.CopyFrom(time_out(wanted.start_time, "start_time"))
    if wanted.end_time is not None:
        request.end_time.CopyFrom(time_out(wanted.end_time, "end_time"))
    return request


def page_in(message: pb.AuditServiceListResponse) -> AuditPage:
    """Convert a page from protobuf."""
    return AuditPage(
        tuple(
            AuditEntry(
                id=entry.id,
                time=time_in(entry.time).astimezone(UTC),
                caller=entry.caller,
                method=entry.method,
                account_id=entry.account_id,
                token_id=entry.token_id,
                peer=entry.peer,
                request_id=entry.request_id,
                outcome=_OUTCOMES.get(entry.outcome, Outcome.UNSPECIFIED),
                code=entry.code,
                reason=entry.reason,
                calls=entry.calls,
                person=entry.person,
                client_address=entry.client_address,
                call_id=entry.call_id,
                trace_id=entry.trace_id,
            )
            for entry in message.entries
        ),
        message.next_page_token,
    )

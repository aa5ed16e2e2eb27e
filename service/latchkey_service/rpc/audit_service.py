"""AuditService: protobuf → table → protobuf."""

import re
from typing import TYPE_CHECKING, Final

import grpc
from latchkey_proto.v1 import audit_service_pb2 as pb
from latchkey_proto.v1 import audit_service_pb2_grpc as pb_grpc

from latchkey_service.access.methods import METHODS
from latchkey_service.audit.audit_table import (
    DENIED_CODES,
    POLICY_IN_FORCE,
    AuditTable,
    Cursor,
    Entry,
    Filter,
)
from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.errors import FieldViolation, InvalidArgument
from latchkey_service.rpc.managed_calls import current_call
from latchkey_service.rpc.token_service import to_datetime
from latchkey_service.tokens import page_tokens

__all__ = ["AuditService"]

PAGE_SIZE_DEFAULT: Final = 50
PAGE_SIZE_MAX: Final = 500
FILTER_LENGTH_MAX: Final = 128
# Positive, and within Postgres' bigint.
_ID: Final = re.compile(r"[1-9][0-9]{0,17}")

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


class AuditService(pb_grpc.AuditServiceServicer):
    """latchkey.v1.AuditService. The .proto file documents its behaviour."""

    def __init__(self, table: AuditTable, reads: LeasedReads) -> None:
        self._table = table
        self._reads = reads

    async def List(
        self, request: pb.AuditServiceListRequest, context: "Context"
    ) -> pb.AuditServiceListResponse:
        wanted = _filter(request)
        after = None
        if request.page_token:
            time, entry_id = page_tokens.decode(repr(wanted), request.page_token, _ID)
            after = Cursor(time, int(entry_id))
        size = min(request.page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        # One more entry than requested shows whether there is a next page.
        deadline = current_call.get().deadline
        began = await self._reads.begin(deadline)
        entries, snapshot = await self._table.list(wanted, after, size + 1)
        # A deposed primary lacks the newest entries.
        await self._reads.accept(snapshot, began, deadline)
        response = pb.AuditServiceListResponse()
        for entry in entries[:size]:
            _put_entry(entry, response.entries.add())
        if len(entries) > size:
            last = entries[size - 1]
            response.next_page_token = page_tokens.encode(repr(wanted), last.time, str(last.id))
        return response


def _filter(request: pb.AuditServiceListRequest) -> Filter:
    """Return the request's filters. Raises InvalidArgument."""
    violations = [
        FieldViolation(name, f"must have at most {FILTER_LENGTH_MAX} characters and no NUL")
        for name in ("account_id", "token_id", "caller", "method")
        if len(value := getattr(request, name)) > FILTER_LENGTH_MAX or "\0" in value
    ]
    method = request.method
    if method and "/" not in method:
        # The short name of a method of the service whose calls have entries.
        method = f"/latchkey.v1.TokenService/{method}"
    audited = method in METHODS and METHODS[method].audited
    if method and not audited and method != POLICY_IN_FORCE:
        violations.append(FieldViolation("method", "must be a method whose calls have entries"))
    if request.outcome not in pb.Outcome.values():
        violations.append(FieldViolation("outcome", "is not a known outcome"))
    if request.page_size < 0:
        violations.append(FieldViolation("page_size", "must not be negative"))
    if violations:
        raise InvalidArgument(*violations)
    start = end = None
    if request.HasField("start_time"):
        start = to_datetime("start_time", request.start_time)
    if request.HasField("end_time"):
        end = to_datetime("end_time", request.end_time)
    return Filter(
        request.account_id,
        request.token_id,
        request.caller,
        method,
        request.outcome,
        start,
        end,
    )


def _put_entry(entry: Entry, message: pb.AuditEntry) -> None:
    message.id = str(entry.id)
    message.time.FromDatetime(entry.time)
    message.caller = entry.caller
    message.method = entry.method
    message.account_id = entry.account_id
    message.token_id = entry.token_id
    message.peer = entry.peer
    message.request_id = entry.request_id
    message.code = entry.code
    message.reason = entry.reason
    message.calls = entry.calls
    message.person = entry.person
    message.client_address = entry.client_address
    message.call_id = entry.call_id
    message.trace_id = entry.trace_id
    if entry.code == 0:
        message.outcome = pb.OUTCOME_OK
    elif entry.code in DENIED_CODES:
        message.outcome = pb.OUTCOME_DENIED
    else:
        message.outcome = pb.OUTCOME_FAILED

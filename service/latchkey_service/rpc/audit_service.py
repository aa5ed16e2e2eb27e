"""AuditService: protobuf → table → protobuf."""

import base64
import binascii
import hashlib
import re
import struct
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import grpc
from latchkey_proto.v1 import audit_service_pb2 as pb
from latchkey_proto.v1 import audit_service_pb2_grpc as pb_grpc

from latchkey_service.access.methods import METHODS
from latchkey_service.audit.audit_table import DENIED_CODES, AuditTable, Cursor, Entry, Filter
from latchkey_service.errors import FieldViolation, InvalidArgument
from latchkey_service.rpc.token_service import to_datetime

__all__ = ["AuditService"]

PAGE_SIZE_DEFAULT: Final = 50
PAGE_SIZE_MAX: Final = 500
FILTER_LENGTH_MAX: Final = 128
_PAGE_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{32}")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_SEAL_BYTES: Final = 8

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


class AuditService(pb_grpc.AuditServiceServicer):
    """latchkey.v1.AuditService. The .proto file documents its behaviour."""

    def __init__(self, table: AuditTable) -> None:
        self._table = table

    async def List(
        self, request: pb.AuditServiceListRequest, context: "Context"
    ) -> pb.AuditServiceListResponse:
        wanted = _filter(request)
        after = _cursor(wanted, request.page_token) if request.page_token else None
        size = min(request.page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        # One more entry than requested shows whether there is a next page.
        entries = await self._table.list(wanted, after, size + 1)
        response = pb.AuditServiceListResponse()
        for entry in entries[:size]:
            _put_entry(entry, response.entries.add())
        if len(entries) > size:
            last = entries[size - 1]
            response.next_page_token = _page_token(wanted, Cursor(last.time, last.id))
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
    if method and not (method in METHODS and METHODS[method].audited):
        violations.append(FieldViolation("method", "must be Create, Get, List or Delete"))
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


def _page_token(wanted: Filter, cursor: Cursor) -> str:
    """Return an opaque page token for a position in the results of these filters."""
    payload = struct.pack(">qq", (cursor.time - _EPOCH) // _MICROSECOND, cursor.id)
    return base64.urlsafe_b64encode(_seal(wanted, payload) + payload).decode()


def _cursor(wanted: Filter, page_token: str) -> Cursor:
    """Return the position that a page token encodes.

    Raises InvalidArgument if it is damaged or belongs to other filters. A page token grants no
    access: every query applies the filters.
    """
    damaged = FieldViolation(
        "page_token", "is damaged or belongs to other filters: start from the first page"
    )
    if not _PAGE_TOKEN.fullmatch(page_token):
        raise InvalidArgument(damaged)
    try:
        raw = base64.urlsafe_b64decode(page_token)
        seal, payload = raw[:_SEAL_BYTES], raw[_SEAL_BYTES:]
        if seal != _seal(wanted, payload):
            raise InvalidArgument(damaged)
        microseconds, entry_id = struct.unpack(">qq", payload)
        return Cursor(_EPOCH + microseconds * _MICROSECOND, entry_id)
    except (binascii.Error, struct.error, OverflowError):
        raise InvalidArgument(damaged) from None


def _seal(wanted: Filter, payload: bytes) -> bytes:
    """Bind a page token to its filters and detect damage. It need not be a signature."""
    bound = repr(wanted).encode() + b"\0" + payload
    return hashlib.blake2s(bound, digest_size=_SEAL_BYTES, person=b"lk.audit").digest()


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
    if entry.code == 0:
        message.outcome = pb.OUTCOME_OK
    elif entry.code in DENIED_CODES:
        message.outcome = pb.OUTCOME_DENIED
    else:
        message.outcome = pb.OUTCOME_FAILED

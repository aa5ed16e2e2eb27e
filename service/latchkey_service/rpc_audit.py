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
from latchkey_service.audit_table import DENIED_CODES, AuditTable, Entry, Filter, Place
from latchkey_service.errors import FieldViolation, InvalidArgument
from latchkey_service.rpc import to_datetime

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
    """latchkey.v1.AuditService. What it tells is said in the .proto."""

    def __init__(self, table: AuditTable) -> None:
        self._table = table

    async def List(
        self, request: pb.AuditServiceListRequest, context: "Context"
    ) -> pb.AuditServiceListResponse:
        wanted = _filter(request)
        after = _place(wanted, request.page_token) if request.page_token else None
        size = min(request.page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        # One more than asked for tells whether there is a next page.
        entries = await self._table.list(wanted, after, size + 1)
        response = pb.AuditServiceListResponse()
        for entry in entries[:size]:
            _put_entry(entry, response.entries.add())
        if len(entries) > size:
            last = entries[size - 1]
            response.next_page_token = _page_token(wanted, Place(last.time, last.id))
        return response


def _filter(request: pb.AuditServiceListRequest) -> Filter:
    """Return what is asked for. Raises InvalidArgument."""
    violations = [
        FieldViolation(name, f"must have at most {FILTER_LENGTH_MAX} characters, and no NUL")
        for name in ("account_id", "token_id", "caller", "method")
        if len(value := getattr(request, name)) > FILTER_LENGTH_MAX or "\0" in value
    ]
    method = request.method
    if method and "/" not in method:
        # By the name alone, of the one service whose calls have entries.
        method = f"/latchkey.v1.TokenService/{method}"
    if method and not (method in METHODS and METHODS[method].audited):
        violations.append(FieldViolation("method", "must be Create, Get, List or Delete"))
    if request.outcome not in pb.Outcome.values():
        violations.append(FieldViolation("outcome", "is no outcome"))
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


def _page_token(wanted: Filter, place: Place) -> str:
    """Return an opaque page token for a place in what is asked for."""
    payload = struct.pack(">qq", (place.time - _EPOCH) // _MICROSECOND, place.id)
    return base64.urlsafe_b64encode(_seal(wanted, payload) + payload).decode()


def _place(wanted: Filter, page_token: str) -> Place:
    """Return the place that a page token stands for.

    Raises InvalidArgument for one that is damaged or of other filters. It carries no authority: the
    filters are in every query.
    """
    damaged = FieldViolation("page_token", "is damaged, or of other filters: start anew")
    if not _PAGE_TOKEN.fullmatch(page_token):
        raise InvalidArgument(damaged)
    try:
        raw = base64.urlsafe_b64decode(page_token)
        seal, payload = raw[:_SEAL_BYTES], raw[_SEAL_BYTES:]
        if seal != _seal(wanted, payload):
            raise InvalidArgument(damaged)
        microseconds, entry_id = struct.unpack(">qq", payload)
        return Place(_EPOCH + microseconds * _MICROSECOND, entry_id)
    except (binascii.Error, struct.error, OverflowError):
        raise InvalidArgument(damaged) from None


def _seal(wanted: Filter, payload: bytes) -> bytes:
    """Bind a page token to its filters and detect damage. Not a signature, and no need of one."""
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

"""The servicer of TokenService: converts protobuf to arguments, makes one call, converts back.

Owns the encoding of answers. It does not own the rules of the contract (`tokens/`), or limits,
logging and error statuses (`interceptor.py`).

The path of a Verify: the transport (`transport/`) passes the message to `interceptor.py`, which
limits, counts and logs the call and translates its errors. `Verify` below calls
`tokens/verifier.py`, which answers from the cache or asks `tokens/batched_lookup.py`, and
`verdict.decide` gives the verdict.
"""

import re
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import grpc
from google.protobuf import duration_pb2, timestamp_pb2
from latchkey_coherence.memory import NOWHERE, Position
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from latchkey_service.access.policy import Caller, current_caller
from latchkey_service.audit.audit_log import call_audit_context
from latchkey_service.coherence.use_reports import USES_IN_REPORT_MAX
from latchkey_service.coherence.watch_events import (
    Event,
    Grant,
    Invalidation,
    ReportedUse,
    ReportReceived,
    Request,
    Reset,
)
from latchkey_service.coherence.watch_sessions import WatchSessions
from latchkey_service.errors import FieldViolation, InvalidArgument
from latchkey_service.rpc.admission import release_slot
from latchkey_service.rpc.counters import Counts
from latchkey_service.rpc.deadlines import budget_seconds, confirmation_seconds
from latchkey_service.rpc.lenient_parsing import BATCH_MAX
from latchkey_service.tokens.management import NewToken, Tokens
from latchkey_service.tokens.token_store import Deletion
from latchkey_service.tokens.usage_writer import UsageWriter
from latchkey_service.tokens.verdict import TokenRecord, Verdict
from latchkey_service.tokens.verifier import Answer, Verifier

__all__ = ["TokenService", "encode_token", "put_receipt", "to_datetime"]

# Metadata in which a client library names its host and process. No decision depends on it.
CLIENT_METADATA = "latchkey-client"
_CLIENT = re.compile(r"[ -~]{1,100}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Range of google/protobuf/timestamp.proto: years 1 to 9999.
_TIMESTAMP_SECONDS = range(-62135596800, 253402300800)
# Range of google/protobuf/duration.proto: about 10,000 years.
_DURATION_SECONDS_MAX = 315_576_000_000

# Encoded fields: number and wire type, then the value.
_VERDICT_FIELDS = {verdict: bytes((0x08, verdict)) for verdict in Verdict}
# In Python 3.11, each access to a member of an Enum runs Python code.
_VALID = Verdict.VALID
_REVISION_TAG, _MARK_TAG, _RESPONSES_TAG = b"\x18", b"\x21", b"\x0a"

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


class TokenService(pb_grpc.TokenServiceServicer):
    """Serves latchkey.v1.TokenService. The .proto documents the methods."""

    def __init__(
        self,
        tokens: Tokens,
        verifier: Verifier,
        watch_sessions: WatchSessions,
        counts: Counts,
        usage: UsageWriter,
        clock: Callable[[], float],
        unix_time: Callable[[], float],
    ) -> None:
        self._tokens = tokens
        self._verifier = verifier
        self._watch_sessions = watch_sessions
        self._counts = counts
        self._clock = clock
        self._count_first = usage.pending.count
        self._usage_table = usage.table
        self._unix_time = unix_time
        self._position = NOWHERE
        self._position_fields = b""

    async def Verify(self, request: pb.VerifyRequest, context: "Context") -> bytes:  # type: ignore[override]  # encoded, see Calls
        # Read once, because each reading makes a new string.
        secret = request.secret
        caller = current_caller.get()
        answer = self._verifier.verify_cached(secret, request.required_scope)
        if answer is None:
            deadline = self._clock() + budget_seconds(context)
            answer = await self._verifier.verify(secret, request.required_scope, deadline)
        verdict = answer.verdict
        self._counts.verdicts[verdict] += 1
        if verdict is _VALID:
            self._count_use(answer, secret, caller)
        return self._encoded(answer)

    async def BatchVerify(self, request: pb.BatchVerifyRequest, context: "Context") -> bytes:  # type: ignore[override]  # encoded, see Calls
        if not 1 <= len(request.requests) <= BATCH_MAX:
            raise InvalidArgument(
                FieldViolation(
                    "requests", f"must have 1-{BATCH_MAX} entries, not {len(request.requests)}"
                )
            )
        caller = current_caller.get()
        questions = [(r.secret, r.required_scope) for r in request.requests]
        deadline = self._clock() + budget_seconds(context)
        answers = await self._verifier.verify_batch(questions, deadline)
        encoded: list[bytes] = []
        for question, answer in zip(questions, answers, strict=True):
            self._counts.verdicts[answer.verdict] += 1
            if answer.verdict is _VALID:
                self._count_use(answer, question[0], caller)
            response = self._encoded(answer)
            encoded += (_RESPONSES_TAG, _varint(len(response)), response)
        return b"".join(encoded)

    async def Watch(  # type: ignore[override]  # writes to the context, which lets us end the stream
        self, request_iterator: AsyncIterator[pb.WatchRequest], context: "Context"
    ) -> None:
        async def requests() -> AsyncIterator[Request]:
            async for request in request_iterator:
                # Revisions are never negative. A negative one would count as acknowledged by this
                # process, which other code does not expect.
                applied = Position(max(0, request.applied_revision), request.mark)
                # Without a report, its number is 0.
                report = request.use_report
                uses = _reported_uses(report) if report.number else ()
                yield Request(applied, request.number, request.released, report.number, uses)

        async def send(event: Event) -> None:
            await context.write(_watch_response(event))

        caller = call_audit_context.get().caller
        await self._watch_sessions.serve(requests(), send, _client_of(context), caller)

    async def Create(self, request: pb.CreateRequest, context: "Context") -> pb.CreateResponse:
        expiry = request.WhichOneof("expiry")
        new = NewToken(
            request.account_id,
            request.name,
            request.scope,
            to_datetime("expire_time", request.expire_time) if expiry == "expire_time" else None,
            _timedelta("ttl", request.ttl) if expiry == "ttl" else None,
            dict(request.labels),
        )
        created = await self._tokens.create(new, call_audit_context.get(), self._deadline(context))
        response = pb.CreateResponse(secret=created.secret.reveal())
        _put_token(created.record, response.token)
        return response

    async def Get(self, request: pb.GetRequest, context: "Context") -> pb.GetResponse:
        record = await self._tokens.get(request.account_id, request.id, self._deadline(context))
        response = pb.GetResponse()
        _put_token(record, response.token)
        return response

    async def GetUsage(
        self, request: pb.GetUsageRequest, context: "Context"
    ) -> pb.GetUsageResponse:
        token = await self._tokens.get(request.account_id, request.id, self._deadline(context))
        today = datetime.fromtimestamp(self._unix_time(), UTC).date()
        response = pb.GetUsageResponse()
        for usage in await self._usage_table.by_caller(token.id, today):
            message = response.callers.add(caller=usage.caller)
            _put_time(usage.first_time, message.first_used_time)
            _put_time(usage.last_time, message.last_used_time)
            for day, count in usage.days:
                start = message.days.add(count=count).start_time
                start.seconds = (day.toordinal() - _EPOCH.toordinal()) * 86_400
        return response

    async def List(self, request: pb.ListRequest, context: "Context") -> pb.ListResponse:
        page = await self._tokens.list(
            request.account_id, request.page_size, request.page_token, self._deadline(context)
        )
        response = pb.ListResponse(next_page_token=page.next_page_token)
        for record in page.records:
            _put_token(record, response.tokens.add())
        return response

    async def Delete(self, request: pb.DeleteRequest, context: "Context") -> pb.DeleteResponse:
        wait_until = self._clock() + confirmation_seconds(context)
        deletion = await self._tokens.delete(
            request.account_id,
            request.id,
            None if request.no_wait else wait_until,
            call_audit_context.get(),
            self._deadline(context),
            # Waiting for verifiers uses nothing that other calls need.
            on_wait=release_slot,
        )
        response = pb.DeleteResponse()
        put_receipt(deletion, response.receipt)
        return response

    def _count_use(self, answer: Answer, presented: str, caller: Caller) -> None:
        """Count a verify that was answered VALID as a use of the token by `caller`."""
        if caller.accounts is not None:
            # The pipeline turns the answer about another account's token into UNKNOWN.
            token = pb.VerifyResponse.FromString(answer.token).token
            if not caller.accounts.allow(token.account_id):
                return
        if (record := answer.record) is None:
            return
        now = self._unix_time()
        pending = record.use
        # Here and not in PendingUses, so that a warm verify makes no further call.
        if pending is not None and pending.caller == caller.name:
            pending.count += 1
            pending.last = now
        else:
            self._count_first(record, presented, caller.name, now)

    def _encoded(self, answer: Answer) -> bytes:
        """Return a VerifyResponse built from encoded parts, which takes a tenth of the time.

        The position stays the same from call to call until a token is deleted.
        """
        position = answer.position
        if position != self._position:
            self._position = position
            self._position_fields = _position_fields(position)
        return _VERDICT_FIELDS[answer.verdict] + answer.token + self._position_fields

    def _deadline(self, context: "Context") -> float:
        return self._clock() + budget_seconds(context)


def encode_token(record: TokenRecord) -> bytes:
    """Return the encoded token field of a VerifyResponse, with tag and length."""
    response = pb.VerifyResponse()
    _put_token(record, response.token)
    return response.SerializeToString()


def _client_of(context: "Context") -> str:
    """Return a name for the client of a stream, for people: caller, address, and its own label.

    The label (`latchkey-client`: host and process) helps if the address is that of a proxy, or if
    the transport does not know the address, as with streams of `native`.
    """
    call = call_audit_context.get()
    name = f"{call.caller} at {call.peer}" if call.caller else call.peer
    for key, value in context.invocation_metadata() or ():
        if key == CLIENT_METADATA and isinstance(value, str) and _CLIENT.fullmatch(value):
            return f"{name} ({value})"
    return name


def _position_fields(position: Position) -> bytes:
    """Return the encoded fields `revision` and `mark` of a VerifyResponse. Omits zeros."""
    revision = _REVISION_TAG + _varint(position.revision) if position.revision else b""
    mark = _MARK_TAG + position.mark.to_bytes(8, "little") if position.mark else b""
    return revision + mark


def _varint(number: int) -> bytes:
    """Return the varint encoding of a number that is not negative, seven bits at a time."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _reported_uses(report: pb.UseReport) -> list[ReportedUse]:
    return [
        ReportedUse(
            use.token_id,
            use.hint,
            use.count,
            _seconds(use.first_use_age),
            _seconds(use.last_use_age),
        )
        for use in report.uses[:USES_IN_REPORT_MAX]
    ]


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _watch_response(event: Event) -> pb.WatchResponse:
    response = pb.WatchResponse()
    if isinstance(event, Invalidation):
        response.invalidation.revision, response.invalidation.mark = event.position
        response.invalidation.token_ids.extend(event.token_ids)
    elif isinstance(event, Grant):
        response.grant.revision, response.grant.mark = event.position
        response.grant.number = event.number
        # Truncated to nanoseconds, never rounded up.
        seconds, rest = divmod(event.lease_seconds, 1)
        response.grant.lease_duration.seconds = int(seconds)
        response.grant.lease_duration.nanos = int(rest * 1e9)
    elif isinstance(event, Reset):
        response.reset.revision, response.reset.mark = event.position
    elif isinstance(event, ReportReceived):
        response.use_report_received.number = event.report
    else:
        response.closing.SetInParent()
    return response


def _put_token(record: TokenRecord, token: pb.Token) -> None:
    """Fill `token` in place. Building a message and copying it takes three times as long."""
    token.id = record.id
    token.account_id = record.account_id
    token.name = record.name
    token.scope = pb.Scope.ValueType(record.scope)
    token.hint = record.hint
    _put_time(record.create_time, token.create_time)
    if record.expire_time is not None:
        _put_time(record.expire_time, token.expire_time)
    if record.last_used_time is not None:
        _put_time(record.last_used_time, token.last_used_time)
        token.last_used_by = record.last_used_by
    if record.labels:
        token.labels.update(record.labels)


def put_receipt(deletion: Deletion, receipt: pb.Receipt) -> None:
    """Fill `receipt`."""
    _put_time(deletion.commit_time, receipt.commit_time)
    if deletion.effective_time is not None:
        _put_time(deletion.effective_time, receipt.effective_time)
    receipt.revision, receipt.mark = deletion.position
    receipt.verifiers_acknowledged = deletion.verifiers_acknowledged
    receipt.verifiers_outwaited = deletion.verifiers_outwaited
    receipt.clients_acknowledged = deletion.clients_acknowledged
    receipt.clients_outwaited = deletion.clients_outwaited


def _put_time(moment: datetime, timestamp: timestamp_pb2.Timestamp) -> None:
    # Not FromDatetime, which takes four times as long: Verify does this for each timestamp.
    since = moment - _EPOCH
    timestamp.seconds = since.days * 86_400 + since.seconds
    timestamp.nanos = since.microseconds * 1_000


def to_datetime(field: str, timestamp: timestamp_pb2.Timestamp) -> datetime:
    """Return the time, truncated to microseconds. Raises InvalidArgument if out of range."""
    if timestamp.seconds not in _TIMESTAMP_SECONDS or not 0 <= timestamp.nanos < 1_000_000_000:
        raise InvalidArgument(FieldViolation(field, "must be a time in the years 1 to 9999"))
    return _EPOCH + timedelta(seconds=timestamp.seconds, microseconds=timestamp.nanos // 1_000)


def _timedelta(field: str, duration: duration_pb2.Duration) -> timedelta:
    """Return the duration, truncated to microseconds. Raises InvalidArgument if invalid."""
    if (
        abs(duration.seconds) > _DURATION_SECONDS_MAX
        or abs(duration.nanos) >= 1_000_000_000
        or duration.seconds * duration.nanos < 0
    ):
        raise InvalidArgument(FieldViolation(field, "is not a valid duration"))
    return timedelta(seconds=duration.seconds, microseconds=duration.nanos // 1_000)

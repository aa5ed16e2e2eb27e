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
from typing import TYPE_CHECKING

import grpc
from latchkey_coherence.memory import NOWHERE, Position
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from latchkey_service.audit.audit_log import call_audit_context
from latchkey_service.coherence.watch_sessions import (
    Event,
    Grant,
    Invalidation,
    Request,
    Reset,
    WatchSessions,
)
from latchkey_service.errors import FieldViolation, InvalidArgument
from latchkey_service.rpc.admission import release_slot
from latchkey_service.rpc.counters import Counts
from latchkey_service.rpc.deadlines import budget_seconds, confirmation_seconds
from latchkey_service.rpc.lenient_parsing import BATCH_MAX, REQUIRED_MAX
from latchkey_service.rpc.lifecycle_service import LifecycleMethods, call_of
from latchkey_service.rpc.messages import put_receipt, put_token, to_datetime, to_timedelta
from latchkey_service.tokens.assembly import Management
from latchkey_service.tokens.management import NewToken
from latchkey_service.tokens.verdict import TokenRecord, Verdict
from latchkey_service.tokens.verifier import Answer, Question, Verifier

__all__ = ["TokenService", "encode_token", "put_receipt", "to_datetime"]

# Metadata in which a client library names its host and process. No decision depends on it.
CLIENT_METADATA = "latchkey-client"
_CLIENT = re.compile(r"[ -~]{1,100}")

# Encoded fields: number and wire type, then the value.
_VERDICT_FIELDS = {verdict: bytes((0x08, verdict)) for verdict in Verdict}
_REVISION_TAG, _MARK_TAG, _RESPONSES_TAG = b"\x18", b"\x21", b"\x0a"

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


class TokenService(LifecycleMethods, pb_grpc.TokenServiceServicer):
    """Serves latchkey.v1.TokenService. The .proto documents the methods."""

    def __init__(
        self,
        management: Management,
        verifier: Verifier,
        watch_sessions: WatchSessions,
        counts: Counts,
        clock: Callable[[], float],
    ) -> None:
        self._tokens = management.tokens
        self._lifecycle = management.lifecycle
        self._bulk = management.bulk
        self._verifier = verifier
        self._watch_sessions = watch_sessions
        self._counts = counts
        self._clock = clock
        self._position = NOWHERE
        self._position_fields = b""

    async def Verify(self, request: pb.VerifyRequest, context: "Context") -> bytes:  # type: ignore[override]  # encoded, see Calls
        required = request.required_permissions
        if len(required) > REQUIRED_MAX:
            raise _too_many_required("required_permissions")
        answer = self._verifier.verify_cached(
            request.secret, request.required_scope, request.client_address, required
        )
        if answer is None:
            question = Question(
                request.secret, request.required_scope, request.client_address, required
            )
            deadline = self._clock() + budget_seconds(context)
            answer = await self._verifier.verify(question, deadline)
        self._counts.verdicts[answer.verdict] += 1
        return self._encoded(answer)

    async def BatchVerify(self, request: pb.BatchVerifyRequest, context: "Context") -> bytes:  # type: ignore[override]  # encoded, see Calls
        if not 1 <= len(request.requests) <= BATCH_MAX:
            raise InvalidArgument(
                FieldViolation(
                    "requests", f"must have 1-{BATCH_MAX} entries, not {len(request.requests)}"
                )
            )
        for number, one in enumerate(request.requests):
            if len(one.required_permissions) > REQUIRED_MAX:
                raise _too_many_required(f"requests[{number}].required_permissions")
        questions = [
            Question(r.secret, r.required_scope, r.client_address, r.required_permissions)
            for r in request.requests
        ]
        deadline = self._clock() + budget_seconds(context)
        answers = await self._verifier.verify_batch(questions, deadline)
        encoded: list[bytes] = []
        for answer in answers:
            self._counts.verdicts[answer.verdict] += 1
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
                yield Request(applied, request.number, request.released)

        async def send(event: Event) -> None:
            await context.write(_watch_response(event))

        await self._watch_sessions.serve(requests(), send, _client_of(context))

    async def Create(self, request: pb.CreateRequest, context: "Context") -> pb.CreateResponse:
        expiry = request.WhichOneof("expiry")
        new = NewToken(
            request.account_id,
            request.name,
            request.scope,
            to_datetime("expire_time", request.expire_time) if expiry == "expire_time" else None,
            to_timedelta("ttl", request.ttl) if expiry == "ttl" else None,
            dict(request.labels),
            request.description,
            request.allowed_networks,
            request.permissions,
            request.request_id,
        )
        created = await self._lifecycle.create(new, call_of(self._clock(), context))
        response = pb.CreateResponse(secret=created.secret.reveal())
        put_token(created.record, response.token)
        if created.receipt is not None:
            put_receipt(created.receipt, response.receipt)
        return response

    async def Get(self, request: pb.GetRequest, context: "Context") -> pb.GetResponse:
        record = await self._tokens.get(request.account_id, request.id, self._deadline(context))
        response = pb.GetResponse()
        put_token(record, response.token)
        return response

    async def List(self, request: pb.ListRequest, context: "Context") -> pb.ListResponse:
        page = await self._tokens.list(
            request.account_id, request.page_size, request.page_token, self._deadline(context)
        )
        response = pb.ListResponse(next_page_token=page.next_page_token)
        for record in page.records:
            put_token(record, response.tokens.add())
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
    put_token(record, response.token)
    return response.SerializeToString()


def _too_many_required(field: str) -> InvalidArgument:
    return InvalidArgument(FieldViolation(field, f"must have at most {REQUIRED_MAX} permissions"))


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
    else:
        response.closing.SetInParent()
    return response

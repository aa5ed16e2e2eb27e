"""The servicer: protobuf → domain, one call, domain → protobuf.

One Verify, from socket to answer: the transport (`server.py`) hands the message to `calls.py`,
which bounds, counts and logs it and translates its errors; from there to `Verify` below, to
`verifier.py`, on a well-formed secret to `lookup.py`, to `verdict.decide`, and back.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import grpc
from google.protobuf import duration_pb2, timestamp_pb2
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from latchkey_service.deadlines import budget_seconds
from latchkey_service.errors import FieldViolation, InvalidArgument
from latchkey_service.log import Counts
from latchkey_service.store import Deletion
from latchkey_service.tokens import NewToken, Tokens
from latchkey_service.verdict import TokenRecord
from latchkey_service.verifier import Answer, Verifier

__all__ = ["TokenService"]

BATCH_MAX = 1_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Of google/protobuf/timestamp.proto: years 1 to 9999.
_TIMESTAMP_SECONDS = range(-62135596800, 253402300800)
# Of google/protobuf/duration.proto: some 10,000 years.
_DURATION_SECONDS_MAX = 315_576_000_000

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


class TokenService(pb_grpc.TokenServiceServicer):
    """latchkey.v1.TokenService. What each method does is said in the .proto."""

    def __init__(
        self,
        tokens: Tokens,
        verifier: Verifier,
        counts: Counts,
        monotonic: Callable[[], float],
    ) -> None:
        self._tokens = tokens
        self._verifier = verifier
        self._counts = counts
        self._monotonic = monotonic

    async def Verify(self, request: pb.VerifyRequest, context: "Context") -> pb.VerifyResponse:
        deadline = self._monotonic() + budget_seconds(context)
        answer = await self._verifier.verify(request.secret, request.required_scope, deadline)
        self._counts.verdicts[answer.verdict] += 1
        response = pb.VerifyResponse()
        _put_answer(answer, response)
        return response

    async def BatchVerify(
        self, request: pb.BatchVerifyRequest, context: "Context"
    ) -> pb.BatchVerifyResponse:
        if not 1 <= len(request.requests) <= BATCH_MAX:
            raise InvalidArgument(
                FieldViolation("requests", f"must be 1-{BATCH_MAX}, are {len(request.requests)}")
            )
        questions = [(r.secret, r.required_scope) for r in request.requests]
        deadline = self._monotonic() + budget_seconds(context)
        answers = await self._verifier.verify_batch(questions, deadline)
        response = pb.BatchVerifyResponse()
        for answer in answers:
            self._counts.verdicts[answer.verdict] += 1
            _put_answer(answer, response.responses.add())
        return response

    async def Create(self, request: pb.CreateRequest, context: "Context") -> pb.CreateResponse:
        expiry = request.WhichOneof("expiry")
        new = NewToken(
            request.account_id,
            request.name,
            request.scope,
            _datetime("expire_time", request.expire_time) if expiry == "expire_time" else None,
            _timedelta("ttl", request.ttl) if expiry == "ttl" else None,
            dict(request.labels),
        )
        created = await self._tokens.create(new)
        response = pb.CreateResponse(secret=created.secret.reveal())
        _put_token(created.record, response.token)
        return response

    async def Get(self, request: pb.GetRequest, context: "Context") -> pb.GetResponse:
        record = await self._tokens.get(request.account_id, request.id)
        response = pb.GetResponse()
        _put_token(record, response.token)
        return response

    async def List(self, request: pb.ListRequest, context: "Context") -> pb.ListResponse:
        page = await self._tokens.list(request.account_id, request.page_size, request.page_token)
        response = pb.ListResponse(next_page_token=page.next_page_token)
        for record in page.records:
            _put_token(record, response.tokens.add())
        return response

    async def Delete(self, request: pb.DeleteRequest, context: "Context") -> pb.DeleteResponse:
        deletion = await self._tokens.delete(request.account_id, request.id)
        response = pb.DeleteResponse()
        _put_receipt(deletion, response.receipt)
        return response


def _put_answer(answer: Answer, response: pb.VerifyResponse) -> None:
    response.verdict = pb.Verdict.ValueType(answer.verdict)
    response.revision = answer.revision
    if answer.record is not None:
        _put_token(answer.record, response.token)


def _put_token(record: TokenRecord, token: pb.Token) -> None:
    """Fill `token`, in place: built apart and copied in, each would take three times as long."""
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
    if record.labels:
        token.labels.update(record.labels)


def _put_receipt(deletion: Deletion, receipt: pb.Receipt) -> None:
    _put_time(deletion.commit_time, receipt.commit_time)
    if deletion.effective_time is not None:
        _put_time(deletion.effective_time, receipt.effective_time)
    receipt.revision = deletion.revision
    receipt.verifiers_acknowledged = deletion.verifiers_acknowledged
    receipt.verifiers_outwaited = deletion.verifiers_outwaited


def _put_time(moment: datetime, timestamp: timestamp_pb2.Timestamp) -> None:
    # Not FromDatetime: it takes four times as long, and Verify does this for each time it sends.
    since = moment - _EPOCH
    timestamp.seconds = since.days * 86_400 + since.seconds
    timestamp.nanos = since.microseconds * 1_000


def _datetime(field: str, timestamp: timestamp_pb2.Timestamp) -> datetime:
    """Return the moment, cut to microseconds. Raises InvalidArgument where there is none."""
    if timestamp.seconds not in _TIMESTAMP_SECONDS or not 0 <= timestamp.nanos < 1_000_000_000:
        raise InvalidArgument(FieldViolation(field, "is not a moment of the years 1 to 9999"))
    return _EPOCH + timedelta(seconds=timestamp.seconds, microseconds=timestamp.nanos // 1_000)


def _timedelta(field: str, duration: duration_pb2.Duration) -> timedelta:
    """Return the duration, cut to microseconds. Raises InvalidArgument where there is none."""
    if (
        abs(duration.seconds) > _DURATION_SECONDS_MAX
        or abs(duration.nanos) >= 1_000_000_000
        or duration.seconds * duration.nanos < 0
    ):
        raise InvalidArgument(FieldViolation(field, "is not a duration"))
    return timedelta(seconds=duration.seconds, microseconds=duration.nanos // 1_000)

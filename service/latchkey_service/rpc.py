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
        return _verify_response(answer)

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
        for answer in answers:
            self._counts.verdicts[answer.verdict] += 1
        return pb.BatchVerifyResponse(responses=map(_verify_response, answers))

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
        return pb.CreateResponse(token=_token(created.record), secret=created.secret.reveal())

    async def Get(self, request: pb.GetRequest, context: "Context") -> pb.GetResponse:
        return pb.GetResponse(token=_token(await self._tokens.get(request.account_id, request.id)))

    async def List(self, request: pb.ListRequest, context: "Context") -> pb.ListResponse:
        page = await self._tokens.list(request.account_id, request.page_size, request.page_token)
        return pb.ListResponse(
            tokens=map(_token, page.records), next_page_token=page.next_page_token
        )

    async def Delete(self, request: pb.DeleteRequest, context: "Context") -> pb.DeleteResponse:
        deletion = await self._tokens.delete(request.account_id, request.id)
        return pb.DeleteResponse(receipt=_receipt(deletion))


def _verify_response(answer: Answer) -> pb.VerifyResponse:
    verdict = pb.Verdict.ValueType(answer.verdict)
    if answer.record is None:
        return pb.VerifyResponse(verdict=verdict, revision=answer.revision)
    return pb.VerifyResponse(verdict=verdict, token=_token(answer.record), revision=answer.revision)


def _token(record: TokenRecord) -> pb.Token:
    token = pb.Token(
        id=record.id,
        account_id=record.account_id,
        name=record.name,
        scope=pb.Scope.ValueType(record.scope),
        create_time=_timestamp(record.create_time),
        hint=record.hint,
    )
    # Set only where they are there: each field passed costs a Verify, None and {} as well.
    if record.expire_time is not None:
        token.expire_time.CopyFrom(_timestamp(record.expire_time))
    if record.last_used_time is not None:
        token.last_used_time.CopyFrom(_timestamp(record.last_used_time))
    if record.labels:
        token.labels.update(record.labels)
    return token


def _receipt(deletion: Deletion) -> pb.Receipt:
    return pb.Receipt(
        commit_time=_timestamp(deletion.commit_time),
        effective_time=(
            None if deletion.effective_time is None else _timestamp(deletion.effective_time)
        ),
        revision=deletion.revision,
        verifiers_acknowledged=deletion.verifiers_acknowledged,
        verifiers_outwaited=deletion.verifiers_outwaited,
    )


def _timestamp(moment: datetime) -> timestamp_pb2.Timestamp:
    # Not FromDatetime: it takes four times as long, and Verify does this for each time it sends.
    since = moment - _EPOCH
    return timestamp_pb2.Timestamp(
        seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1_000
    )


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

"""The short path: Verify and BatchVerify, from the encoded request to the encoded answer.

`VerifyCalls.handler` returns what a listener registers. It authorizes the caller, checks the size
of the request, parses it, asks `tokens/verifier.py` and encodes the answer. Every Verify runs it,
so each step must be worth its microseconds: there is no slot, no timer and no context variable, and
most bytes of an answer come from the cache unchanged. All other unary methods take the path in
`managed_calls.py`.

Owns the encoding of tokens in answers, and which answers count as uses. It does not own the verdict
or the counts of uses (`tokens/`).
"""

import asyncio
import math
import random
from bisect import bisect_left
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf import timestamp_pb2
from latchkey_coherence.rate import RateLimit
from latchkey_coherence.verdict_cache import NOWHERE, Position
from latchkey_proto.v1 import token_service_pb2 as pb

from latchkey_service import tracing
from latchkey_service.access.authenticator import Authenticator
from latchkey_service.access.methods import BATCH_VERIFY, METHODS, VERIFIER, VERIFY
from latchkey_service.access.policy import ANONYMOUS, Caller
from latchkey_service.errors import (
    REQUEST_ID_METADATA,
    FieldViolation,
    InvalidArgument,
    RequestNotParsed,
    RequestTooLarge,
)
from latchkey_service.rpc.batch_answer import encode_batch, varint, verdict_counts
from latchkey_service.rpc.call_context import CallContext
from latchkey_service.rpc.call_report import NEW_IDS, CallReporter, Metadata, checked_id, end_with
from latchkey_service.rpc.counters import Counts
from latchkey_service.rpc.non_utf8_parsing import BATCH_MAX, REQUIRED_MAX, parse_non_utf8
from latchkey_service.tokens.usage import PendingUses
from latchkey_service.tokens.verdict import CachedToken, TokenRecord, Verdict
from latchkey_service.tokens.verifier import MALFORMED, UNKNOWN, Answer, Question, Verifier

__all__ = ["VerifyCalls", "encode_token", "put_rate_limit", "put_token"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# Days that exist in each time zone.
_EARLIEST: Final = datetime(1, 1, 3, tzinfo=UTC)
_LATEST: Final = datetime(9999, 12, 29, tzinfo=UTC)
_VERIFY_BYTES_MAX: Final = METHODS[VERIFY].bytes_max
_BATCH_VERIFY_BYTES_MAX: Final = METHODS[BATCH_VERIFY].bytes_max
# In Python 3.11, each access to a member of an Enum runs Python code.
_VALID: Final = Verdict.VALID
_RATE_LIMITED: Final = Verdict.RATE_LIMITED

# Encoded fields: number and wire type, then the value.
_VERDICT_FIELDS: Final = {verdict: bytes((0x08, verdict)) for verdict in Verdict}
_REVISION_TAG, _MARK_TAG = b"\x18", b"\x21"

Handler = Callable[[bytes, CallContext], Awaitable[bytes]]
# Computes the encoded answer to an encoded request.
_Behaviour = Callable[[bytes, CallContext, Caller], Awaitable[bytes]]


class VerifyCalls:
    """Serves verifies. One instance per worker process. Event loop only."""

    def __init__(
        self,
        verifier: Verifier,
        reporter: CallReporter,
        counts: Counts,
        uses: PendingUses,
        on_first_use: Callable[[CachedToken], None],
        log_share: float,
        monotonic: Callable[[], float],
        unix_time: Callable[[], float],
    ) -> None:
        self._verifier = verifier
        self._reporter = reporter
        self._counts = counts
        self._count_first = uses.count
        # Called with a record whose first use ends older secrets.
        self._on_first_use = on_first_use
        self._log_share = log_share
        self._monotonic = monotonic
        self._unix_time = unix_time
        self._position = NOWHERE
        self._position_fields = b""

    def handler(
        self,
        path: str,
        authenticator: Authenticator | None,
        metadata_of: Callable[[Any], Metadata],
    ) -> Handler:
        """Return the handler of Verify or BatchVerify for a listener.

        `authenticator` authorizes the calls of the listener; None if there is no policy.
        `metadata_of` returns the metadata of a call's context.
        """
        behaviour: _Behaviour = self._verify if path == VERIFY else self._batch_verify
        counts = self._counts.method(path)
        seconds = counts.seconds
        buckets, bounds, first = seconds.counts, seconds.bounds, seconds.bounds[0]
        monotonic, share = self._monotonic, self._log_share
        authorize = None if authenticator is None else authenticator.authorize

        async def call(data: bytes, context: CallContext) -> bytes:
            start = monotonic()
            counts.started += 1
            caller = ANONYMOUS
            try:
                if authorize is not None:
                    caller = authorize(path, context)
                answer = await behaviour(data, context, caller)
            except asyncio.CancelledError:
                # The caller left, its deadline passed, or the server's grace period ended.
                self._reporter.cancelled(path, context, start, caller)
                raise
            except Exception as error:  # noqa: BLE001 - the last place before the transport
                status, delay_seconds = self._reporter.failed(path, context, start, error, caller)
            else:
                counts.ok += 1
                # As `Histogram.observe` and `request_id_of`, but a call of each would take longer.
                took = monotonic() - start
                # Every warm Verify is in the first bucket.
                buckets[0 if took <= first else bisect_left(bounds, took)] += 1
                seconds.total += took
                request_id = ""
                for key, value in metadata_of(context) or ():
                    if key == REQUEST_ID_METADATA:
                        request_id = checked_id(value)
                request_id = request_id or next(NEW_IDS)
                if share and random.random() < share:  # noqa: S311 - a sample
                    self._reporter.log(path, context, start, "OK", None, request_id)
                context.set_trailing_metadata(((REQUEST_ID_METADATA, request_id),))
                return answer
            if delay_seconds:
                await self._reporter.delay(context, status, delay_seconds)
            return end_with(context, status)

        return call

    async def _verify(self, data: bytes, context: CallContext, caller: Caller) -> bytes:
        if caller.rates is not None:
            self._spend(caller, 1)
        if len(data) > _VERIFY_BYTES_MAX:
            # The contract promises a verdict for every secret, however long. No secret, address and
            # permissions within their limits need as many bytes.
            secret, answer, request = "", MALFORMED, None
            self._counts.oversized += 1
        else:
            try:
                request = pb.VerifyRequest.FromString(data)
            except Exception:  # noqa: BLE001 - the bytes may raise anything in the parser
                request = _parsed_non_utf8(VERIFY, data)
            secret, required = request.secret, request.required_permissions
            if len(required) > REQUIRED_MAX:
                raise _too_many_required("required_permissions")
            scope, address = request.required_scope, request.client_address
            cached = self._verifier.verify_cached(secret, scope, address, required)
            if cached is None:
                question = Question(secret, scope, address, required)
                left = context.time_remaining()
                answer = await self._verifier.verify(question, left, caller.name)
            else:
                answer = cached
        return self._completed(answer, secret, caller, request)

    async def _batch_verify(self, data: bytes, context: CallContext, caller: Caller) -> bytes:
        try:
            batch = _parsed_batch(data)
        except InvalidArgument:
            self._spend(caller, 1)
            raise
        requests = batch.requests
        # Charge at most the largest batch that is answered. A larger one is rejected, and must not
        # use up the rate of others. An empty batch costs time too.
        self._spend(caller, max(1, min(len(requests), BATCH_MAX)))
        if not 1 <= len(requests) <= BATCH_MAX:
            raise InvalidArgument(
                FieldViolation("requests", f"must have 1-{BATCH_MAX} entries, not {len(requests)}")
            )
        for number, one in enumerate(requests):
            if len(one.required_permissions) > REQUIRED_MAX:
                raise _too_many_required(f"requests[{number}].required_permissions")
        questions = [
            Question(r.secret, r.required_scope, r.client_address, r.required_permissions)
            for r in requests
        ]
        left = context.time_remaining()
        answers = await self._verifier.verify_batch(questions, left, caller.name)
        responses = [
            self._completed(answer, question.presented, caller, request)
            for request, question, answer in zip(requests, questions, answers, strict=True)
        ]
        if (span := tracing.current()) is not None:
            # As the caller gets them.
            span.set(verdict_counts(responses))
        return encode_batch(responses, omit_details=batch.omit_details)

    def _spend(self, caller: Caller, count: int) -> None:
        """Charge questions to the caller's rate limit, if any. Raises RateLimited."""
        if caller.rates is not None:
            caller.rates.spend(VERIFIER, count, self._monotonic())

    def _completed(
        self,
        answer: Answer,
        presented: str,
        caller: Caller,
        request: pb.VerifyRequest | None = None,
    ) -> bytes:
        """Count the answer, and return the encoded VerifyResponse that `caller` gets.

        Building it from encoded parts takes a tenth of the time. The position stays the same from
        call to call until a token is deleted.
        """
        self._counts.verdicts[answer.verdict] += 1
        if caller.accounts is not None:
            answer = _restricted(answer, caller)
        verdict, record = answer.verdict, answer.record
        if verdict is _VALID and record is not None:
            now = answer.decided_at or self._unix_time()
            use = record.use
            # Here and not in PendingUses, so that a warm Verify makes no further call.
            if use is not None and use.caller == caller.name:
                use.count += 1
                use.last = now
            else:
                self._count_first(record, presented, caller.name, now)
                if record.retires_older is not None:
                    self._on_first_use(record)
        position = _position_of(answer, caller, request)
        if position != self._position:
            self._position = position
            self._position_fields = _position_fields(position)
        fields: bytes = _VERDICT_FIELDS[verdict] + answer.token + self._position_fields
        if verdict is _RATE_LIMITED:
            fields += _retry_field(answer.retry_seconds)
        return fields


def _parsed_batch(data: bytes) -> pb.BatchVerifyRequest:
    """Return the request of a BatchVerify. Raises RequestTooLarge and RequestNotParsed."""
    if len(data) > _BATCH_VERIFY_BYTES_MAX:
        raise RequestTooLarge(_BATCH_VERIFY_BYTES_MAX)
    try:
        return pb.BatchVerifyRequest.FromString(data)
    except Exception:  # noqa: BLE001 - the bytes may raise anything in the parser
        parsed: pb.BatchVerifyRequest = _parsed_non_utf8(BATCH_VERIFY, data)
        return parsed


def _too_many_required(field: str) -> InvalidArgument:
    return InvalidArgument(FieldViolation(field, f"must have at most {REQUIRED_MAX} permissions"))


def _parsed_non_utf8(path: str, data: bytes) -> Any:
    """Return a request that may contain secrets that are not text. Raises RequestNotParsed."""
    request = parse_non_utf8(path, data)
    if request is None:
        raise RequestNotParsed
    return request


def _restricted(answer: Answer, caller: Caller) -> Answer:
    """Return the answer for a caller that the policy limits to certain accounts.

    A token of another account becomes UNKNOWN, like a secret that was never issued.
    """
    if not answer.token or caller.accounts is None or caller.accounts.allow(answer.account_id):
        return answer
    return UNKNOWN


def _position_of(answer: Answer, caller: Caller, request: pb.VerifyRequest | None) -> Position:
    """Return the position up to which the caller may keep an answer, or NOWHERE if it may not."""
    if caller.accounts is not None and not answer.token:
        # Most secrets that were never issued need no read and have no position. So a position would
        # reveal another account's token, even after it was purged.
        return NOWHERE
    record = answer.record
    if record is not None:
        if record.retires_older is not None and answer.verdict is not _VALID:
            # A client that kept this answer could decide the next question by itself, and this
            # server would not see the first use.
            return NOWHERE
        if record.share is not None and not (request is not None and request.spends_shares):
            # A client that does not know rate limits would cache the answer, and accept the token
            # without limit.
            return NOWHERE
    return answer.position


def encode_token(record: TokenRecord) -> bytes:
    """Return the encoded token field of a VerifyResponse, with tag and length."""
    response = pb.VerifyResponse()
    put_token(record, response.token)
    return response.SerializeToString()


def put_token(record: TokenRecord, token: pb.Token) -> None:
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
    if record.disable_time is not None:
        _put_time(record.disable_time, token.disable_time)
    if record.allowed_networks:
        token.allowed_networks.extend(record.allowed_networks)
    if record.permissions:
        token.permissions.extend(record.permissions)
    if record.description:
        token.description = record.description
    if record.rate_limit is not None:
        put_rate_limit(record.rate_limit, token.rate_limit)
    for secret in record.secrets:
        shown = token.secrets.add(hint=secret.hint, retire_on_first_use=secret.retire_on_first_use)
        _put_time(secret.create_time, shown.create_time)
        if secret.expire_time is not None:
            _put_time(secret.expire_time, shown.expire_time)
        if secret.last_used_time is not None:
            _put_time(secret.last_used_time, shown.last_used_time)
        if secret.leak_report_time is not None:
            _put_time(secret.leak_report_time, shown.leak_report_time)


def put_rate_limit(limit: RateLimit, message: pb.RateLimit) -> None:
    """Fill `message`."""
    message.count, message.period.seconds, message.burst = limit


def _put_time(moment: datetime, timestamp: timestamp_pb2.Timestamp) -> None:
    """Fill `timestamp`. FromDatetime takes four times as long."""
    if moment.tzinfo is None:
        # The driver's form of infinity. No release writes it, but one row that somebody changed
        # must not keep its account from listing tokens, or operators from finding it.
        moment = _LATEST if moment.year > 1 else _EARLIEST
    since = moment - _EPOCH
    timestamp.seconds = since.days * 86_400 + since.seconds
    timestamp.nanos = since.microseconds * 1_000


def _position_fields(position: Position) -> bytes:
    """Return the encoded fields `revision` and `mark` of a VerifyResponse. Omits zeros."""
    revision = _REVISION_TAG + varint(position.revision) if position.revision else b""
    mark = _MARK_TAG + position.mark.to_bytes(8, "little") if position.mark else b""
    return revision + mark


def _retry_field(seconds: float) -> bytes:
    """Return the encoded field `retry_after` of a VerifyResponse."""
    message = pb.VerifyResponse()
    # Rounded up: a client that is early is refused again.
    microseconds = math.ceil(seconds * 1e6)
    message.retry_after.seconds, rest = divmod(microseconds, 1_000_000)
    message.retry_after.nanos = rest * 1_000
    return message.SerializeToString()

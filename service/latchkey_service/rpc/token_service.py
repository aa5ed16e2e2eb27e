"""The servicer of TokenService: converts protobuf to arguments, makes one call, converts back.

Owns neither the rules of the contract (`tokens/`), nor limits, logging and error statuses
(`managed_calls.py`, `streams.py`). The changes of existing tokens are in `lifecycle_service.py`.
Verify and BatchVerify are not here: `verify_calls.py` contains all of their code.
"""

import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Literal

import grpc
from google.protobuf import duration_pb2, timestamp_pb2
from google.protobuf.unknown_fields import UnknownFieldSet
from latchkey_coherence.verdict_cache import Position
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from latchkey_service.coherence.share_questions import WANTED_MAX
from latchkey_service.coherence.use_reports import USES_IN_REPORT_MAX
from latchkey_service.coherence.watch_events import (
    Event,
    Grant,
    Invalidation,
    ReportedUse,
    ReportReceived,
    Request,
    Reset,
    Shares,
    WantedCalls,
)
from latchkey_service.coherence.watch_sessions import WatchSessions
from latchkey_service.errors import FieldViolation, InvalidArgument
from latchkey_service.rpc.managed_calls import ManagedCall, current_call
from latchkey_service.rpc.streams import current_caller
from latchkey_service.rpc.verify_calls import put_rate_limit, put_token
from latchkey_service.tokens.assembly import Management
from latchkey_service.tokens.confirmation import Call
from latchkey_service.tokens.filters import Filter
from latchkey_service.tokens.finding import Query as FindQuery
from latchkey_service.tokens.listing import Query
from latchkey_service.tokens.management import NewToken
from latchkey_service.tokens.receipt_table import Deletion
from latchkey_service.tokens.usage_table import CallerUsage, UsageTable

__all__ = [
    "TokenService",
    "call_of",
    "put_receipt",
    "rate_limit_of",
    "to_datetime",
    "to_filter",
    "to_timedelta",
]

# Metadata in which a client library names its host and process. No decision depends on it.
CLIENT_METADATA = "latchkey-client"
_CLIENT = re.compile(r"[ -~]{1,100}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Range of google/protobuf/timestamp.proto: years 1 to 9999.
_TIMESTAMP_SECONDS = range(-62135596800, 253402300800)
# Range of google/protobuf/duration.proto: about 10,000 years.
_DURATION_SECONDS_MAX = 315_576_000_000

# The fields of a filter that can be absent.
_TimeField = Literal["expires_before", "unused_since", "secret_created_before"]
_ChoiceField = Literal["can_write", "never_used", "never_expires", "leaked"]

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]


class TokenService(pb_grpc.TokenServiceServicer):
    """Serves a part of latchkey.v1.TokenService. The .proto documents the methods."""

    def __init__(
        self,
        management: Management,
        watch_sessions: WatchSessions,
        usage_table: UsageTable,
        unix_time: Callable[[], float],
        imported_prefixes: Sequence[str] = (),
    ) -> None:
        self._imported_prefixes = imported_prefixes
        self._tokens = management.tokens
        self._lifecycle = management.lifecycle
        self._bulk = management.bulk
        self._listing = management.listing
        self._finding = management.finding
        self._importer = management.importer
        self._watch_sessions = watch_sessions
        self._usage_table = usage_table
        self._unix_time = unix_time

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
                shares = request.rate_shares_request
                yield Request(
                    applied,
                    request.number,
                    request.released,
                    report.number,
                    min(len(report.uses), USES_IN_REPORT_MAX) if report.number else 0,
                    _reported_uses(report),
                    shares.number,
                    _wanted(shares) if shares.number else (),
                )

        async def send(event: Event) -> None:
            response = _watch_response(event)
            if isinstance(event, Grant):
                response.grant.imported_prefixes.extend(self._imported_prefixes)
            await context.write(response)

        caller = current_caller.get().name
        await self._watch_sessions.serve(requests(), send, _client_of(context), caller)

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
            rate_limit_of(request),
        )
        created = await self._lifecycle.create(new, call_of(current_call.get()))
        response = pb.CreateResponse(secret=created.secret.reveal())
        put_token(created.record, response.token)
        if created.receipt is not None:
            put_receipt(created.receipt, response.receipt)
        return response

    async def Get(self, request: pb.GetRequest, context: "Context") -> pb.GetResponse:
        deadline = current_call.get().deadline
        record = await self._tokens.get(request.account_id, request.id, deadline)
        response = pb.GetResponse()
        put_token(record, response.token)
        return response

    async def GetUsage(
        self, request: pb.GetUsageRequest, context: "Context"
    ) -> pb.GetUsageResponse:
        deadline = current_call.get().deadline
        response = pb.GetUsageResponse()
        put_usage(
            await self._tokens.usage(
                self._usage_table, request.account_id, request.id, self._today(), deadline
            ),
            response,
        )
        return response

    async def Find(self, request: pb.FindRequest, context: "Context") -> pb.FindResponse:
        deadline = current_call.get().deadline
        query = FindQuery(request.id, request.hint, request.page_size, request.page_token)
        page = await self._finding.find(query, deadline)
        response = pb.FindResponse(next_page_token=page.next_page_token)
        for record in page.records:
            found = response.tokens.add()
            put_token(record, found.token)
            if record.delete_time is not None:
                found.delete_time.FromDatetime(record.delete_time)
        if request.id and page.records:
            put_usage(
                await self._finding.usage(self._usage_table, request.id, self._today(), deadline),
                response,
            )
        return response

    async def GetLimits(
        self, request: pb.GetLimitsRequest, context: "Context"
    ) -> pb.GetLimitsResponse:
        call = call_of(current_call.get(), wait=False)
        lifetime = self._lifecycle.lifetime(request.account_id, call)
        response = pb.GetLimitsResponse(require_expiry=lifetime.requires_expiry)
        if lifetime.max_ttl is not None:
            response.max_ttl.FromTimedelta(lifetime.max_ttl)
        return response

    async def List(self, request: pb.ListRequest, context: "Context") -> pb.ListResponse:
        deadline = current_call.get().deadline
        query = Query(
            request.account_id,
            request.page_size,
            request.page_token,
            to_filter(request.filter),
            request.order,
            request.reverse,
            request.include_total_size,
        )
        page = await self._listing.list(query, deadline)
        response = pb.ListResponse(
            next_page_token=page.next_page_token,
            total_size=page.total_size,
            total_size_capped=page.total_size_capped,
            filter_applied=True,
        )
        for record in page.records:
            put_token(record, response.tokens.add())
        return response

    async def Delete(self, request: pb.DeleteRequest, context: "Context") -> pb.DeleteResponse:
        call = current_call.get()
        deletion = await self._tokens.delete(
            request.account_id,
            request.id,
            None if request.no_wait else call.confirm_by,
            call.audit_context,
            call.deadline,
            on_commit=call.committed,
            # Waiting for verifiers uses nothing that other calls need.
            on_wait=call.release_slot,
        )
        response = pb.DeleteResponse()
        put_receipt(deletion, response.receipt)
        return response

    def _today(self) -> date:
        return datetime.fromtimestamp(self._unix_time(), UTC).date()


def put_usage(
    callers: Sequence[CallerUsage], response: pb.GetUsageResponse | pb.FindResponse
) -> None:
    """Add the callers of a token to an answer."""
    for usage in callers:
        message = response.callers.add(caller=usage.caller)
        message.first_used_time.FromDatetime(usage.first_time)
        message.last_used_time.FromDatetime(usage.last_time)
        for day, count in usage.days:
            start = message.days.add(count=count).start_time
            start.seconds = (day.toordinal() - _EPOCH.toordinal()) * 86_400


def call_of(call: ManagedCall, *, wait: bool = True) -> Call:
    """Return a managed call as the domain knows it. `wait`: whether to wait for verifiers."""
    return Call(
        call.audit_context,
        call.deadline,
        call.confirm_by if wait else None,
        call.committed,
        # Waiting for verifiers uses nothing that other calls need.
        call.release_slot,
        call.caller.lifetimes.limit(call.audit_context.account_id),
    )


def _client_of(context: "Context") -> str:
    """Return a name for the client of a stream, for people: caller, address, and its own label.

    The label (`latchkey-client`: host and process) helps if the address is that of a proxy, or if
    the transport does not know the address, as with streams of `native`.
    """
    caller, peer = current_caller.get(), context.peer()
    name = f"{caller.name} at {peer}" if caller.name else peer
    for key, value in context.invocation_metadata() or ():
        if key == CLIENT_METADATA and isinstance(value, str) and _CLIENT.fullmatch(value):
            return f"{name} ({value})"
    return name


def _reported_uses(report: pb.UseReport) -> Iterator[ReportedUse]:
    # Converted when they are read, so that a report that is ignored costs almost nothing.
    return (
        ReportedUse(
            use.token_id,
            use.hint,
            use.count,
            _seconds(use.first_use_age),
            _seconds(use.last_use_age),
        )
        for use in islice(report.uses, USES_IN_REPORT_MAX)
    )


def _wanted(request: pb.RateSharesRequest) -> list[WantedCalls]:
    return [WantedCalls(one.token_id, one.calls) for one in request.wanted[:WANTED_MAX]]


def rate_limit_of(
    message: pb.CreateRequest | pb.ImportedToken | pb.Token,
) -> tuple[int, timedelta, int] | None:
    """Return count, period and burst of the rate limit, or None. Raises InvalidArgument."""
    if not message.HasField("rate_limit"):
        return None
    limit = message.rate_limit
    return limit.count, to_timedelta("rate_limit.period", limit.period), limit.burst


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
    elif isinstance(event, Shares):
        response.rate_shares.number = event.number
        response.rate_shares.share_duration.nanos = min(int(event.seconds * 1e9), 999_999_999)
        for token_id, calls, limit in event.calls:
            share = response.rate_shares.shares.add(token_id=token_id, calls=calls)
            put_rate_limit(limit, share.rate_limit)
    else:
        response.closing.SetInParent()
    return response


def put_receipt(deletion: Deletion, receipt: pb.Receipt) -> None:
    """Fill `receipt`."""
    receipt.commit_time.FromDatetime(deletion.commit_time)
    if deletion.effective_time is not None:
        receipt.effective_time.FromDatetime(deletion.effective_time)
    receipt.revision, receipt.mark = deletion.position
    receipt.verifiers_acknowledged = deletion.verifiers_acknowledged
    receipt.verifiers_outwaited = deletion.verifiers_outwaited
    receipt.clients_acknowledged = deletion.clients_acknowledged
    receipt.clients_outwaited = deletion.clients_outwaited


def to_datetime(field: str, timestamp: timestamp_pb2.Timestamp) -> datetime:
    """Return the time, truncated to microseconds. Raises InvalidArgument if out of range."""
    if timestamp.seconds not in _TIMESTAMP_SECONDS or not 0 <= timestamp.nanos < 1_000_000_000:
        raise InvalidArgument(FieldViolation(field, "must be a time in the years 1 to 9999"))
    return _EPOCH + timedelta(seconds=timestamp.seconds, microseconds=timestamp.nanos // 1_000)


def to_timedelta(field: str, duration: duration_pb2.Duration) -> timedelta:
    """Return the duration, truncated to microseconds. Raises InvalidArgument if invalid."""
    if (
        abs(duration.seconds) > _DURATION_SECONDS_MAX
        or abs(duration.nanos) >= 1_000_000_000
        or duration.seconds * duration.nanos < 0
    ):
        raise InvalidArgument(FieldViolation(field, "is not a valid duration"))
    return timedelta(seconds=duration.seconds, microseconds=duration.nanos // 1_000)


def to_filter(message: pb.TokenFilter) -> Filter:
    """Return the filter. Raises InvalidArgument for a condition that this server does not know.

    A newer client may send one. Without it, more tokens would match.
    """
    if len(UnknownFieldSet(message)):
        raise InvalidArgument(
            FieldViolation("filter", "contains a condition that this server does not know")
        )

    def time(field: _TimeField) -> datetime | None:
        if not message.HasField(field):
            return None
        return to_datetime(f"filter.{field}", getattr(message, field))

    def choice(field: _ChoiceField) -> bool | None:
        return bool(getattr(message, field)) if message.HasField(field) else None

    return Filter(
        message.scope,
        message.name_contains,
        message.label,
        message.state,
        time("expires_before"),
        time("unused_since"),
        choice("can_write"),
        tuple(message.ids),
        message.search,
        choice("never_used"),
        choice("never_expires"),
        time("secret_created_before"),
        choice("leaked"),
    )

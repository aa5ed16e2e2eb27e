"""Converts between protobuf messages and the library's values. No other module reads messages.

Messages from the server are not trusted. A message that breaks the contract raises InternalError.
An enum value that this version does not know becomes UNSPECIFIED, which allows nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final, TypeAlias, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from latchkey_coherence.verdict_cache import Position
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb

from latchkey._imported import ImportedToken, ImportOutcome, ImportResult
from latchkey._rate_messages import (
    duration_in,
    rate_limit_in,
    rate_limit_out,
    shares_in,
    shares_out,
)
from latchkey._subscription import (
    Closing,
    Event,
    Grant,
    Invalidation,
    Request,
    Reset,
    UsesReceived,
)
from latchkey._uses import UseReport
from latchkey.errors import FieldViolation, InternalError, InvalidArgument, invalid
from latchkey.models import (
    CallerUsage,
    FoundPage,
    FoundToken,
    Limits,
    Notifications,
    Page,
    Receipt,
    Scope,
    Status,
    Token,
    TokenSecret,
    Verdict,
    Verification,
    VerifierStatus,
)
from latchkey.secret import Secret

M = TypeVar("M", bound=Message)
T = TypeVar("T")

_WithReceipt: TypeAlias = (
    pb.CreateResponse
    | pb.DeleteAllResponse
    | pb.DisableResponse
    | pb.EnableResponse
    | pb.RetireSecretsResponse
    | pb.RevokeSecretResponse
    | pb.RotateResponse
    | pb.UpdateResponse
)

_SCOPES: Final[Mapping[int, Scope]] = {pb.SCOPE_READ: Scope.READ, pb.SCOPE_WRITE: Scope.WRITE}
_SCOPES_OUT: Final[Mapping[Scope, pb.Scope.ValueType]] = {
    Scope.READ: pb.SCOPE_READ,
    Scope.WRITE: pb.SCOPE_WRITE,
}
_VERDICTS: Final[Mapping[int, Verdict]] = {
    pb.VERDICT_VALID: Verdict.VALID,
    pb.VERDICT_MALFORMED: Verdict.MALFORMED,
    pb.VERDICT_UNKNOWN: Verdict.UNKNOWN,
    pb.VERDICT_DELETED: Verdict.DELETED,
    pb.VERDICT_EXPIRED: Verdict.EXPIRED,
    pb.VERDICT_INSUFFICIENT_SCOPE: Verdict.INSUFFICIENT_SCOPE,
    pb.VERDICT_DISABLED: Verdict.DISABLED,
    pb.VERDICT_ADDRESS_NOT_ALLOWED: Verdict.ADDRESS_NOT_ALLOWED,
    pb.VERDICT_INSUFFICIENT_PERMISSIONS: Verdict.INSUFFICIENT_PERMISSIONS,
    pb.VERDICT_RATE_LIMITED: Verdict.RATE_LIMITED,
}

_IMPORT_OUTCOMES: Final[Mapping[int, ImportOutcome]] = {
    pb.IMPORT_OUTCOME_IMPORTED: ImportOutcome.IMPORTED,
    pb.IMPORT_OUTCOME_EXISTS: ImportOutcome.EXISTS,
    pb.IMPORT_OUTCOME_OTHER_ACCOUNT: ImportOutcome.OTHER_ACCOUNT,
    pb.IMPORT_OUTCOME_NAME_TAKEN: ImportOutcome.NAME_TAKEN,
    pb.IMPORT_OUTCOME_INVALID: ImportOutcome.INVALID,
}
_NOTIFICATIONS: Final[Mapping[int, Notifications]] = {
    status_pb.NOTIFICATIONS_ARRIVE: Notifications.ARRIVE,
    status_pb.NOTIFICATIONS_SILENT: Notifications.SILENT,
    status_pb.NOTIFICATIONS_OFF: Notifications.OFF,
}


def build(make: Callable[[], M]) -> M:
    """Return the request that `make` builds. Raises InvalidArgument for values that do not fit.

    The error hides its cause, because a UnicodeEncodeError carries the whole text.
    """
    try:
        return make()
    except InvalidArgument:
        raise
    except (ValueError, OverflowError):
        failure = InvalidArgument(
            "A value cannot be sent: invalid Unicode text, or a number or time out of range."
        )
    raise failure


def secret_out(secret: str | Secret) -> str:
    """Return the secret's text. Raises TypeError for anything but text.

    Text that UTF-8 cannot encode is not a secret. It is replaced by "", which is MALFORMED.
    Otherwise protobuf would raise an exception that contains the text.
    """
    text = secret.reveal() if isinstance(secret, Secret) else secret
    if not isinstance(text, str):
        raise TypeError(f"a secret must be a str or a Secret, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return ""
    return text


def scope_out(scope: Scope | None, field: str) -> pb.Scope.ValueType:
    """Return the scope for the request. Raises InvalidArgument unless it is READ, WRITE or None.

    None requires no scope. UNSPECIFIED would mean the same to the server, so it is rejected: a
    caller that requires no scope must pass None.
    """
    if scope is None:
        return pb.SCOPE_UNSPECIFIED
    if not isinstance(scope, Scope):
        raise TypeError(f"{field} must be a Scope, not {type(scope).__name__}")
    if scope not in _SCOPES_OUT:
        raise invalid(field, "must be Scope.READ or Scope.WRITE")
    return _SCOPES_OUT[scope]


def several(values: Iterable[T], field: str) -> Iterable[T]:
    """Return `values`. Raises InvalidArgument for one text, which is an iterable of texts too."""
    if isinstance(values, str):
        raise invalid(field, "must be a collection of texts, not one text")
    return values


def time_out(time: datetime, field: str) -> Timestamp:
    """Convert a time to protobuf. Raises InvalidArgument if it has no time zone."""
    if time.tzinfo is None:
        raise invalid(field, "has no time zone; use for example datetime.now(UTC)")
    message = Timestamp()
    message.FromDatetime(time)
    return message


def duration_out(duration: timedelta) -> Duration:
    """Convert a duration to protobuf."""
    message = Duration()
    message.FromTimedelta(duration)
    return message


def token_in(message: pb.Token) -> Token:
    """Convert a token from protobuf."""
    return Token(
        id=message.id,
        account_id=message.account_id,
        name=message.name,
        scope=_SCOPES.get(message.scope, Scope.UNSPECIFIED),
        create_time=time_in(message.create_time),
        expire_time=time_in(message.expire_time) if message.HasField("expire_time") else None,
        last_used_time=(
            time_in(message.last_used_time) if message.HasField("last_used_time") else None
        ),
        last_used_by=message.last_used_by,
        hint=message.hint,
        labels=dict(message.labels),
        disable_time=time_in(message.disable_time) if message.HasField("disable_time") else None,
        allowed_networks=tuple(message.allowed_networks),
        permissions=tuple(message.permissions),
        description=message.description,
        secrets=tuple(_token_secret_in(secret) for secret in message.secrets),
        rate_limit=rate_limit_in(message.rate_limit) if message.HasField("rate_limit") else None,
    )


def _token_secret_in(message: pb.TokenSecret) -> TokenSecret:
    return TokenSecret(
        hint=message.hint,
        create_time=time_in(message.create_time),
        expire_time=time_in(message.expire_time) if message.HasField("expire_time") else None,
        last_used_time=(
            time_in(message.last_used_time) if message.HasField("last_used_time") else None
        ),
        retire_on_first_use=message.retire_on_first_use,
        leak_report_time=(
            time_in(message.leak_report_time) if message.HasField("leak_report_time") else None
        ),
    )


def usage_in(message: pb.GetUsageResponse | pb.FindResponse) -> tuple[CallerUsage, ...]:
    """Convert the uses of a token from protobuf."""
    return tuple(
        CallerUsage(
            caller=usage.caller,
            first_used_time=time_in(usage.first_used_time),
            last_used_time=time_in(usage.last_used_time),
            days={time_in(day.start_time).date(): day.count for day in usage.days},
        )
        for usage in message.callers
    )


def found_in(message: pb.FindResponse) -> FoundPage:
    """Convert found tokens from protobuf."""
    return FoundPage(
        tokens=tuple(
            FoundToken(
                token=token_in(found.token),
                delete_time=time_in(found.delete_time) if found.HasField("delete_time") else None,
            )
            for found in message.tokens
        ),
        callers=usage_in(message),
        next_page_token=message.next_page_token,
    )


def limits_in(message: pb.GetLimitsResponse) -> Limits:
    """Convert limits from protobuf."""
    return Limits(
        max_ttl=duration_in(message.max_ttl) if message.HasField("max_ttl") else None,
        require_expiry=message.require_expiry,
    )


def imported_out(token: ImportedToken) -> pb.ImportedToken:
    """Return a token to import as a message. Raises InvalidArgument for values that do not fit."""
    return build(
        lambda: pb.ImportedToken(
            account_id=token.account_id,
            name=token.name,
            scope=scope_out(token.scope, "scope"),
            expire_time=(
                None if token.expire_time is None else time_out(token.expire_time, "expire_time")
            ),
            labels=token.labels,
            description=token.description,
            allowed_networks=several(token.allowed_networks, "allowed_networks"),
            permissions=several(token.permissions, "permissions"),
            secret_sha256=token.secret_sha256,
            hint=token.hint,
            create_time=(
                None if token.create_time is None else time_out(token.create_time, "create_time")
            ),
            disabled=token.disabled,
            rate_limit=None if token.rate_limit is None else rate_limit_out(token.rate_limit),
        )
    )


def import_result_in(message: pb.ImportResult) -> ImportResult:
    """Convert what Import did with a row from protobuf."""
    return ImportResult(
        outcome=_IMPORT_OUTCOMES.get(message.outcome, ImportOutcome.UNSPECIFIED),
        token_id=message.id,
        field_violations=tuple(
            FieldViolation(violation.field, violation.description)
            for violation in message.field_violations
        ),
    )


def page_in(message: pb.ListResponse, *, counted: bool) -> Page:
    """Convert a page from protobuf. `counted`: whether the request asked for the total size."""
    return Page(
        tokens=tuple(token_in(token) for token in message.tokens),
        next_page_token=message.next_page_token,
        total_size=message.total_size if counted else None,
        total_size_capped=message.total_size_capped,
    )


def receipt_in(message: pb.Receipt) -> Receipt:
    """Convert a receipt from protobuf."""
    return Receipt(
        commit_time=time_in(message.commit_time),
        effective_time=(
            time_in(message.effective_time) if message.HasField("effective_time") else None
        ),
        revision=message.revision,
        verifiers_acknowledged=message.verifiers_acknowledged,
        verifiers_outwaited=message.verifiers_outwaited,
        mark=message.mark,
        clients_acknowledged=message.clients_acknowledged,
        clients_outwaited=message.clients_outwaited,
    )


def receipt_of(answer: _WithReceipt) -> Receipt | None:
    """Return the receipt of an answer that need not have one."""
    return receipt_in(answer.receipt) if answer.HasField("receipt") else None


def verification_in(message: pb.VerifyResponse) -> Verification:
    """Convert an answer from protobuf. Raises InternalError for VALID without a token."""
    verdict = _VERDICTS.get(message.verdict, Verdict.UNSPECIFIED)
    token = token_in(message.token) if message.HasField("token") else None
    if verdict is Verdict.VALID and token is None:
        # The contract sets the token for every known secret. A VALID answer without one would let a
        # caller in anonymously.
        raise InternalError("The service answered VALID without a token.")
    return Verification(
        verdict=verdict,
        token=token,
        revision=message.revision,
        mark=message.mark,
        details_omitted=message.details_omitted,
        retry_after=(duration_in(message.retry_after) if message.HasField("retry_after") else None),
    )


def watch_request_out(request: Request) -> pb.WatchRequest:
    """Convert a client's Watch request to protobuf."""
    return pb.WatchRequest(
        applied_revision=request.applied.revision,
        mark=request.applied.mark,
        number=request.number,
        released=request.released,
        use_report=None if request.report is None else _use_report_out(request.report),
        rate_shares_request=None if request.shares is None else shares_out(request.shares),
    )


def _use_report_out(report: UseReport) -> pb.UseReport:
    return pb.UseReport(
        number=report.number,
        uses=[
            pb.TokenUse(
                token_id=use.token_id,
                hint=use.hint,
                count=use.count,
                first_use_age=_seconds_out(use.first_age),
                last_use_age=_seconds_out(use.last_age),
            )
            for use in report.uses
        ],
    )


def _seconds_out(seconds: float) -> Duration:
    whole, rest = divmod(seconds, 1)
    return Duration(seconds=int(whole), nanos=int(rest * 1e9))


def watch_event_in(message: object) -> Event | None:
    """Convert a server's Watch message. Return None for a message that this version does not know.

    Raises InternalError for a message that grpc could not parse, for which grpc returns None.
    """
    if not isinstance(message, pb.WatchResponse):
        raise InternalError("Watch failed: a message from the service could not be parsed.")
    match message.WhichOneof("event"):
        case "invalidation":
            invalidation = message.invalidation
            return Invalidation(_position_in(invalidation), tuple(invalidation.token_ids))
        case "grant":
            grant = message.grant
            seconds = grant.lease_duration.seconds + grant.lease_duration.nanos / 1e9
            prefixes = tuple(grant.imported_prefixes)
            return Grant(_position_in(grant), grant.number, seconds, prefixes)
        case "reset":
            return Reset(_position_in(message.reset))
        case "closing":
            return Closing()
        case "use_report_received":
            return UsesReceived(message.use_report_received.number)
        case "rate_shares":
            return shares_in(message.rate_shares)
        case _:
            return None


def _position_in(message: pb.Invalidation | pb.Grant | pb.Reset) -> Position:
    return Position(message.revision, message.mark)


def status_in(message: status_pb.GetStatusResponse) -> Status:
    """Convert the state of the service from protobuf."""
    return Status(
        head_revision=message.head_revision,
        head_mark=message.head_mark,
        schema_version=message.schema_version,
        verifiers=tuple(_verifier_in(verifier) for verifier in message.verifiers),
        warnings=tuple(message.warnings),
    )


def _verifier_in(message: status_pb.VerifierStatus) -> VerifierStatus:
    return VerifierStatus(
        id=message.id,
        host=message.host,
        process_id=message.process_id,
        version=message.version,
        start_time=time_in(message.start_time),
        acknowledged_revision=message.acknowledged_revision,
        lag=message.lag,
        lease_duration=duration_in(message.lease_duration),
        lease_remaining=duration_in(message.lease_remaining),
        clients=message.clients,
        notifications=_NOTIFICATIONS.get(message.notifications, Notifications.UNSPECIFIED),
        answering=message.answering,
        waiting_for=tuple(message.waiting_for),
        pepper_ids=tuple(message.pepper_ids),
        database_host=message.database_host,
        system_identifier=message.system_identifier,
        timeline=message.timeline,
    )


def time_in(message: Timestamp) -> datetime:
    """Convert a time from protobuf. Raises InternalError if it is out of range."""
    try:
        return message.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InternalError("The service sent an invalid time.") from error

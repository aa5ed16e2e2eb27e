"""Between protobuf messages and the library's values: the only module that reads and builds them.

What the server sends is not trusted to make sense: an answer that breaks the contract is an
InternalError, and an enum value of a newer server is UNSPECIFIED, which allows nothing.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from latchkey_coherence.memory import Position
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb

from latchkey._subscription import Closing, Event, Grant, Invalidation, Request, Reset
from latchkey.errors import InternalError, InvalidArgument, invalid
from latchkey.models import (
    Notifications,
    Page,
    Receipt,
    Scope,
    Status,
    Token,
    Verdict,
    Verification,
    VerifierStatus,
)
from latchkey.secret import Secret

M = TypeVar("M", bound=Message)
T = TypeVar("T")

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
}

_NOTIFICATIONS: Final[Mapping[int, Notifications]] = {
    status_pb.NOTIFICATIONS_ARRIVE: Notifications.ARRIVE,
    status_pb.NOTIFICATIONS_SILENT: Notifications.SILENT,
    status_pb.NOTIFICATIONS_OFF: Notifications.OFF,
}


def build(make: Callable[[], M]) -> M:
    """Return the request that `make` makes. Raises InvalidArgument for values that do not fit.

    The cause is left out: a UnicodeEncodeError carries the whole text that it stumbled over.
    """
    try:
        return make()
    except InvalidArgument:
        raise
    except (ValueError, OverflowError):
        failure = InvalidArgument(
            "A value cannot be sent: a text is not Unicode, or a number or time is out of range."
        )
    raise failure


def secret_out(secret: str | Secret) -> str:
    """Return the text to ask about. Raises TypeError for anything but text.

    A text that UTF-8 cannot carry is nobody's secret: asked about as "", it is MALFORMED like any
    other garbage, where protobuf would raise an exception that contains it.
    """
    text = secret.reveal() if isinstance(secret, Secret) else secret
    if not isinstance(text, str):
        raise TypeError(f"a secret is a str or a Secret, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return ""
    return text


def scope_out(scope: Scope | None, field: str) -> pb.Scope.ValueType:
    """Return the level to ask for; None asks for none. Raises InvalidArgument for no real level.

    UNSPECIFIED would reach the server as "no scope is required": it has to be said as None.
    """
    if scope is None:
        return pb.SCOPE_UNSPECIFIED
    if not isinstance(scope, Scope):
        raise TypeError(f"{field} is a Scope, not {type(scope).__name__}")
    if scope not in _SCOPES_OUT:
        raise invalid(field, "has to be Scope.READ or Scope.WRITE")
    return _SCOPES_OUT[scope]


def time_out(time: datetime, field: str) -> Timestamp:
    """Return a moment. Raises InvalidArgument when it does not say which one."""
    if time.tzinfo is None:
        raise invalid(field, "has no time zone; use datetime.now(UTC) and its like")
    message = Timestamp()
    message.FromDatetime(time)
    return message


def duration_out(duration: timedelta) -> Duration:
    """Return a duration."""
    message = Duration()
    message.FromTimedelta(duration)
    return message


def token_in(message: pb.Token) -> Token:
    """Return a token as received."""
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
        hint=message.hint,
        labels=dict(message.labels),
    )


def page_in(message: pb.ListResponse) -> Page:
    """Return a page as received."""
    return Page(
        tokens=tuple(token_in(token) for token in message.tokens),
        next_page_token=message.next_page_token,
    )


def receipt_in(message: pb.Receipt) -> Receipt:
    """Return a receipt as received."""
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


def verification_in(message: pb.VerifyResponse) -> Verification:
    """Return an answer as received. Raises InternalError for VALID without a token."""
    verdict = _VERDICTS.get(message.verdict, Verdict.UNSPECIFIED)
    token = token_in(message.token) if message.HasField("token") else None
    if verdict is Verdict.VALID and token is None:
        # The contract sets the token whenever there is one: nobody is allowed in without a name.
        raise InternalError("The service called a secret valid without saying whose it is.")
    return Verification(verdict=verdict, token=token, revision=message.revision, mark=message.mark)


def watch_request_out(request: Request) -> pb.WatchRequest:
    """Return what a client says on its Watch stream."""
    return pb.WatchRequest(
        applied_revision=request.applied.revision,
        mark=request.applied.mark,
        number=request.number,
        released=request.released,
    )


def watch_event_in(message: object) -> Event | None:
    """Return what the server says on a Watch stream. None: nothing that this version knows.

    Raises InternalError for what grpc could not parse, in whose place it gives None.
    """
    if not isinstance(message, pb.WatchResponse):
        raise InternalError("Watch failed: a message of the service could not be read.")
    match message.WhichOneof("event"):
        case "invalidation":
            invalidation = message.invalidation
            return Invalidation(_position_in(invalidation), tuple(invalidation.token_ids))
        case "grant":
            grant = message.grant
            seconds = grant.lease_duration.seconds + grant.lease_duration.nanos / 1e9
            return Grant(_position_in(grant), grant.number, seconds)
        case "reset":
            return Reset(_position_in(message.reset))
        case "closing":
            return Closing()
        case _:
            return None


def _position_in(message: pb.Invalidation | pb.Grant | pb.Reset) -> Position:
    return Position(message.revision, message.mark)


def status_in(message: status_pb.GetStatusResponse) -> Status:
    """Return the state of the service as received."""
    return Status(
        head_revision=message.head_revision,
        head_mark=message.head_mark,
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
        lease_duration=_duration_in(message.lease_duration),
        lease_remaining=_duration_in(message.lease_remaining),
        clients=message.clients,
        notifications=_NOTIFICATIONS.get(message.notifications, Notifications.UNSPECIFIED),
        answering=message.answering,
        waiting_for=tuple(message.waiting_for),
        pepper_ids=tuple(message.pepper_ids),
        database_host=message.database_host,
        system_identifier=message.system_identifier,
        timeline=message.timeline,
    )


def _duration_in(message: Duration) -> timedelta:
    try:
        return message.ToTimedelta()
    except (ValueError, OverflowError) as error:
        raise InternalError("The service sent a duration that does not exist.") from error


def time_in(message: Timestamp) -> datetime:
    """Return a moment as received. Raises InternalError."""
    try:
        return message.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InternalError("The service sent a time that does not exist.") from error

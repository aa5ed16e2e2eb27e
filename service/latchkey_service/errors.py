"""The exceptions of the service, each with its gRPC code, and their conversion to a gRPC status.

    LatchkeyError
    ├── InvalidArgument       the request is invalid; lists the fields and reasons
    │   ├── RequestNotParsed  it is not a message of the method's type
    │   ├── RequestTooLarge   it has more bytes than the method accepts
    │   └── TimeoutMalformed  its deadline is not in gRPC's format
    ├── NotFound              the account has no such token
    ├── AlreadyExists         the name is taken, or the request's id was used for another request
    ├── FailedPrecondition    the state of the token or of the service forbids the change
    ├── Denied                the caller may not make this call
    │   ├── Unauthenticated   the caller is unknown
    │   └── PermissionDenied  the caller is known but lacks the right
    ├── Overloaded            a limit was reached; retryable
    │   └── RateLimited       the caller's own rate limit
    ├── WatchRefused          this server grants no leases
    ├── WatchTimedOut         the client of a Watch sent nothing for too long
    └── Unavailable           a dependency is unreachable or too slow; retryable
        ├── NotConfirmed      a deletion stands, but verifiers have yet to confirm it
        │   └── ChangeNotConfirmed  the same for another change of a token
        └── StoreUnavailable  Postgres
            ├── CacheStartedOver a read was under way meanwhile
            ├── NotReplicated a failover may undo the committed change
            ├── StoreConflict the transaction kept conflicting with others
            └── StoreUnsupported  the database engine lacks a feature

The expected outcomes of a verify are values (`verdict.py`), never exceptions. Callers see the
messages, so a message never contains a secret, a digest, SQL or an address.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Final, Literal

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

__all__ = [
    "PUSHBACK_METADATA",
    "REQUEST_ID_METADATA",
    "AlreadyExists",
    "ChangeNotConfirmed",
    "Denied",
    "FailedPrecondition",
    "FieldViolation",
    "InvalidArgument",
    "LatchkeyError",
    "NotConfirmed",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "RateLimited",
    "RequestNotParsed",
    "RequestTooLarge",
    "StatusParts",
    "StoreConflict",
    "StoreUnavailable",
    "StoreUnsupported",
    "TimeoutMalformed",
    "Unauthenticated",
    "Unavailable",
    "ViolationReason",
    "WatchRefused",
    "WatchTimedOut",
    "code_of",
    "reason_of",
    "status_of",
]

DOMAIN = "latchkey"
# Metadata with the id under which the service logs the call. Callers may send their own.
REQUEST_ID_METADATA = "x-request-id"
PUSHBACK_METADATA = "grpc-retry-pushback-ms"
INTERNAL_MESSAGE = "Internal error. The server log has the cause under this request id."
# Long enough not to prolong an outage, and short enough that calls resume soon after Postgres.
RETRY_DELAY_SECONDS = 0.25
TOO_LATE = "The answer would arrive after the deadline; try again shortly."
NO_ANSWER = "The database does not respond; try again shortly."
BUSY = "This server is too busy to read the database's answers in time; try again shortly."
CHANGING_OVER = "The database is failing over; try again shortly."


# A status is sent in headers, twice: as text and encoded. gRPC clients accept 8 KiB of headers in
# an answer, and report another error for more.
VIOLATIONS_BYTES_MAX: Final = 1_200

ViolationReason = Literal["EXPIRY_REQUIRED", "EXPIRY_TOO_LATE"]


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request (as a path, such as `labels["team"]`) and its problem."""

    field: str
    description: str
    reason: ViolationReason | None = None
    """The reason of the error, if a program needs to distinguish this problem from others."""
    metadata: tuple[tuple[str, str], ...] = ()
    """Keys and values of the description, for programs."""


class LatchkeyError(Exception):
    """Base of all our exceptions. `reason` is a stable, machine-readable name."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"
    retry_seconds = RETRY_DELAY_SECONDS
    """Delay before a retry, for retryable errors."""
    metadata: Mapping[str, str] = MappingProxyType({})
    """What `reason` leaves open, for programs."""


class InvalidArgument(LatchkeyError):
    """The request is invalid in any state of the service; a retry cannot help."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"

    def __init__(self, *violations: FieldViolation, reason: str | None = None) -> None:
        for violation in violations:
            if violation.reason is not None:
                self.reason, self.metadata = violation.reason, dict(violation.metadata)
        if reason is not None:
            self.reason = reason
        self.violations = _first_of(violations)
        # A violation without a field concerns the whole request.
        super().__init__(
            "; ".join(
                f"{v.field}: {v.description}" if v.field else v.description for v in self.violations
            )
        )


def _first_of(violations: Sequence[FieldViolation]) -> tuple[FieldViolation, ...]:
    """Return the first violations, as many as fit into a status, and how many others there are."""
    left = VIOLATIONS_BYTES_MAX
    for count, violation in enumerate(violations):
        left -= len(f"{violation.field}: {violation.description}; ".encode())
        if left < 0 and count:
            more = f"{len(violations) - count} further problems"
            return (*violations[:count], FieldViolation("", more))
    return tuple(violations)


class RequestNotParsed(InvalidArgument):
    """The request is not a message of the method's type."""

    reason = "REQUEST_NOT_PARSED"

    def __init__(self) -> None:
        super().__init__(FieldViolation("", "the request is not a message of this method's type"))


class RequestTooLarge(InvalidArgument):
    """The request has more bytes than its method accepts. It was not parsed."""

    reason = "REQUEST_TOO_LARGE"

    def __init__(self, bytes_max: int) -> None:
        super().__init__(FieldViolation("", f"the request has more than {bytes_max:,} bytes"))


class TooManyFields(InvalidArgument):
    """The request has more entries than its method accepts. It was not parsed."""

    reason = "REQUEST_TOO_LARGE"

    def __init__(self, fields_max: int) -> None:
        super().__init__(FieldViolation("", f"the request has more than {fields_max:,} fields"))


class TimeoutMalformed(InvalidArgument):
    """The call's deadline is not in gRPC's format."""

    reason = "TIMEOUT_MALFORMED"

    def __init__(self) -> None:
        super().__init__(FieldViolation("", "the header grpc-timeout is malformed"))


class NotFound(LatchkeyError):
    """The account has no such token. Another account's token gives the same error, on purpose."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "TOKEN_NOT_FOUND"

    def __init__(self, message: str, reason: str | None = None) -> None:
        if reason is not None:
            self.reason = reason
        super().__init__(message)


class AlreadyExists(LatchkeyError):
    """The account already has a live token with this name, or has used the request's id."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "TOKEN_NAME_TAKEN"

    def __init__(self, message: str, reason: str | None = None) -> None:
        if reason is not None:
            self.reason = reason
        super().__init__(message)


class FailedPrecondition(LatchkeyError):
    """The state of the token or of the service forbids the change. Nothing was done."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "FLEET_UPGRADING"

    def __init__(self, message: str, reason: str | None = None) -> None:
        if reason is not None:
            self.reason = reason
        super().__init__(message)


class Denied(LatchkeyError):
    """The caller may not make this call. `caller` is its name, if known, for the log."""

    def __init__(self, message: str, reason: str, caller: str = "") -> None:
        self.reason = reason
        self.caller = caller
        super().__init__(message)


class Unauthenticated(Denied):
    """The call presents no identity, or one that the policy does not know."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(Denied):
    """The policy does not grant the caller this right."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Overloaded(LatchkeyError):
    """A limit on calls in progress was reached. Nothing was done."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"

    def __init__(self, message: str, reason: str | None = None) -> None:
        if reason is not None:
            self.reason = reason
        super().__init__(message)


class RateLimited(Overloaded):
    """The caller used up its rate limit. `retry_seconds`: until it may call again."""

    reason = "RATE_LIMITED"

    def __init__(self, message: str, retry_seconds: float) -> None:
        self.retry_seconds = retry_seconds
        super().__init__(message)


class WatchRefused(LatchkeyError):
    """This server grants no leases, because it is configured not to cache."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "WATCH_REFUSED"


class WatchTimedOut(LatchkeyError):
    """The client of a Watch sent neither a request nor a confirmation for too long."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "WATCHER_SILENT"


class Unavailable(LatchkeyError):
    """No safe answer is possible now. Fail closed: the client must deny access."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class NotConfirmed(Unavailable):
    """The deletion stands, but the deadline came before the last verifier's confirmation."""

    reason = "DELETION_NOT_CONFIRMED"


class ChangeNotConfirmed(NotConfirmed):
    """The change stands, but the deadline came before the last verifier's confirmation."""

    reason = "CHANGE_NOT_CONFIRMED"


class StoreUnavailable(Unavailable):
    """Postgres is unreachable, restarting, or too slow."""

    reason = "DATABASE_UNAVAILABLE"


class CacheStartedOver(StoreUnavailable):
    """The cache started over during a read, so the read cannot be accepted. Read again."""


class NotReplicated(StoreUnavailable):
    """Postgres committed the change, but a failover may undo it."""


class StoreUnsupported(StoreUnavailable):
    """The database engine does not support the operation."""


class StoreConflict(StoreUnavailable):
    """The transaction kept conflicting with others. It was rolled back."""


_RETRYABLE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})


@dataclass(frozen=True, slots=True)
class StatusParts:
    """The arguments of `ServicerContext.abort`, and the `reason` for the log."""

    code: grpc.StatusCode
    message: str
    reason: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...] = field(repr=False)


def code_of(error: BaseException) -> grpc.StatusCode:
    """Return the gRPC status code of `error`."""
    return error.code if isinstance(error, LatchkeyError) else LatchkeyError.code


def reason_of(error: BaseException) -> str:
    """Return the reason of `error` that callers see."""
    return error.reason if isinstance(error, LatchkeyError) else LatchkeyError.reason


def status_of(error: BaseException, request_id: str, randomness: float = 0.0) -> StatusParts:
    """Build the gRPC status of `error`.

    Every other exception becomes INTERNAL with a fixed text, because its own
    text may contain anything. The details follow AIP-193: ErrorInfo and RequestInfo always,
    BadRequest and RetryInfo where they apply. gRPC's own retries (gRFC A6) read the delay only in
    `grpc-retry-pushback-ms`. `randomness`, from 0 to 1, lengthens the retry delay by that fraction,
    so that callers that failed together do not all retry together.
    """
    if not isinstance(error, LatchkeyError):
        error = LatchkeyError(INTERNAL_MESSAGE)
    code = error.code
    pushback: list[tuple[str, str]] = []
    details: list[
        error_details_pb2.ErrorInfo
        | error_details_pb2.RequestInfo
        | error_details_pb2.BadRequest
        | error_details_pb2.RetryInfo
    ] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if isinstance(error, InvalidArgument):
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=v.field, description=v.description
                    )
                    for v in error.violations
                ]
            )
        )
    if code in _RETRYABLE:
        seconds, rest = divmod(error.retry_seconds * (1 + randomness), 1)
        delay = duration_pb2.Duration(seconds=int(seconds), nanos=int(rest * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        pushback.append((PUSHBACK_METADATA, str(math.ceil(delay.ToNanoseconds() / 1e6))))
    message = str(error)
    number: int = code.value[0]
    status = status_pb2.Status(code=number, message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return StatusParts(
        code,
        message,
        error.reason,
        (
            (REQUEST_ID_METADATA, request_id),
            ("grpc-status-details-bin", status.SerializeToString()),
            *pushback,
        ),
    )

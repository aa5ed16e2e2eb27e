"""The errors of the domain, and the one table that turns them into gRPC statuses.

    LatchkeyError
    ├── InvalidArgument       the request is wrong; says which fields and why
    ├── NotFound              the account has no such token
    ├── AlreadyExists         the name is taken
    ├── Denied                who calls may not
    │   ├── Unauthenticated   nobody knows who calls
    │   └── PermissionDenied  a caller that is known, and may not call this
    ├── Overloaded            a bound was reached; worth a retry
    │   └── RateLimited       by this caller alone
    ├── WatchRefused          this server grants no leases
    ├── WatcherSilent         the client of a Watch has not been heard of for long
    └── Unavailable           a dependency is away or too slow; worth a retry
        ├── NotConfirmed      a deletion stands, but verifiers have yet to confirm it
        └── StoreUnavailable  Postgres
            ├── NotReplicated what was written may be undone by a failover
            ├── StoreConflict two transactions undid each other
            └── StoreUnsupported  not a thing that this engine does

Expected outcomes of a verify are values (`verdict.py`), never errors. Messages are written for the
caller: they never contain a secret, a digest, SQL or an address.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

__all__ = [
    "AlreadyExists",
    "Denied",
    "FieldViolation",
    "InvalidArgument",
    "LatchkeyError",
    "NotConfirmed",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "RateLimited",
    "StatusParts",
    "StoreConflict",
    "StoreUnavailable",
    "StoreUnsupported",
    "Unauthenticated",
    "Unavailable",
    "WatchRefused",
    "WatcherSilent",
    "code_of",
    "reason_of",
    "status_of",
]

DOMAIN = "latchkey"
INTERNAL_MESSAGE = "Latchkey failed to answer; its log has the cause under the request id."
# Long enough not to add to an outage, short enough that service is felt to resume with Postgres.
RETRY_DELAY_SECONDS = 0.25
TOO_LATE = "The answer would come too late; try again shortly."
NO_ANSWER = "The database does not answer; try again shortly."
CHANGING_OVER = "The database is changing over; try again shortly."


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request (its path, such as `labels["team"]`) and what is wrong with it."""

    field: str
    description: str


class LatchkeyError(Exception):
    """Base of all errors of the domain. `reason` is the stable, machine-readable name."""

    reason = "INTERNAL"
    retry_seconds = RETRY_DELAY_SECONDS
    """After how long a retry is worth it, where it is at all."""


class InvalidArgument(LatchkeyError):
    """The request is wrong whatever the state of the service; a retry will not help."""

    reason = "INVALID_ARGUMENT"

    def __init__(self, *violations: FieldViolation, reason: str | None = None) -> None:
        self.violations = violations
        if reason is not None:
            self.reason = reason
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))


class NotFound(LatchkeyError):
    """The account has no such token. The same for another account's token, so as not to tell."""

    reason = "TOKEN_NOT_FOUND"

    def __init__(self, message: str, reason: str | None = None) -> None:
        if reason is not None:
            self.reason = reason
        super().__init__(message)


class AlreadyExists(LatchkeyError):
    """A live token of the account has the name."""

    reason = "TOKEN_NAME_TAKEN"


class Denied(LatchkeyError):
    """Whoever calls may not. `caller` is the name of a caller that is known, for the log."""

    def __init__(self, message: str, reason: str, caller: str = "") -> None:
        self.reason = reason
        self.caller = caller
        super().__init__(message)


class Unauthenticated(Denied):
    """What the call presents, if anything, names no caller of the policy."""


class PermissionDenied(Denied):
    """The policy has no such right for this caller."""


class Overloaded(LatchkeyError):
    """A bound on work in progress was reached. Nothing was done."""

    reason = "OVERLOADED"

    def __init__(self, message: str, reason: str | None = None) -> None:
        if reason is not None:
            self.reason = reason
        super().__init__(message)


class RateLimited(Overloaded):
    """The caller has used up what the policy gives it. `retry_seconds`: until it has some again."""

    reason = "RATE_LIMITED"

    def __init__(self, message: str, retry_seconds: float) -> None:
        self.retry_seconds = retry_seconds
        super().__init__(message)


class WatchRefused(LatchkeyError):
    """This server grants no leases, as it was told to remember nothing."""

    reason = "WATCH_REFUSED"


class WatcherSilent(LatchkeyError):
    """The client of a Watch has neither asked nor confirmed anything for long."""

    reason = "WATCHER_SILENT"


class Unavailable(LatchkeyError):
    """No safe answer can be given now. Fail closed: whoever asked must not be let in."""

    reason = "UNAVAILABLE"


class NotConfirmed(Unavailable):
    """A deletion stands, but its caller's deadline came before the last verifier's confirmation."""

    reason = "DELETION_NOT_CONFIRMED"


class StoreUnavailable(Unavailable):
    """Postgres is away, restarting, or too slow."""

    reason = "DATABASE_UNAVAILABLE"


class NotReplicated(StoreUnavailable):
    """Postgres committed what was written, but a failover may undo it."""


class StoreUnsupported(StoreUnavailable):
    """The database's engine does not do what was asked of it."""


class StoreConflict(StoreUnavailable):
    """Two transactions undid each other, again and again. Nothing of this one stands."""


_CODES: Mapping[type[LatchkeyError], grpc.StatusCode] = MappingProxyType(
    {
        InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
        NotFound: grpc.StatusCode.NOT_FOUND,
        AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
        Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
        PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
        Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
        RateLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Unavailable: grpc.StatusCode.UNAVAILABLE,
        NotConfirmed: grpc.StatusCode.UNAVAILABLE,
        StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
        NotReplicated: grpc.StatusCode.UNAVAILABLE,
        StoreUnsupported: grpc.StatusCode.UNAVAILABLE,
        StoreConflict: grpc.StatusCode.UNAVAILABLE,
        WatchRefused: grpc.StatusCode.FAILED_PRECONDITION,
        WatcherSilent: grpc.StatusCode.DEADLINE_EXCEEDED,
        LatchkeyError: grpc.StatusCode.INTERNAL,
    }
)
_RETRYABLE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})


@dataclass(frozen=True, slots=True)
class StatusParts:
    """What `ServicerContext.abort` takes. `reason` is for the log."""

    code: grpc.StatusCode
    message: str
    reason: str
    trailing_metadata: tuple[tuple[str, bytes], ...] = field(repr=False)


def code_of(error: BaseException) -> grpc.StatusCode:
    """Return the status code that tells a caller of `error`."""
    return _CODES[type(error)] if isinstance(error, LatchkeyError) else grpc.StatusCode.INTERNAL


def reason_of(error: BaseException) -> str:
    """Return the reason that a caller is told of `error`."""
    return error.reason if isinstance(error, LatchkeyError) else LatchkeyError.reason


def status_of(error: BaseException, request_id: str, randomness: float = 0.0) -> StatusParts:
    """Return the status that tells a caller of `error`.

    Anything but a LatchkeyError becomes INTERNAL with a fixed text: an unforeseen exception's own
    text may hold anything. Details follow AIP-193: ErrorInfo and RequestInfo always, BadRequest
    and RetryInfo where they apply. `randomness`, 0 to 1, lengthens its delay by so much: callers
    that failed in one moment should not all be back in one.
    """
    if not isinstance(error, LatchkeyError):
        error = LatchkeyError(INTERNAL_MESSAGE)
    code = _CODES[type(error)]
    details: list[
        error_details_pb2.ErrorInfo
        | error_details_pb2.RequestInfo
        | error_details_pb2.BadRequest
        | error_details_pb2.RetryInfo
    ] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN),
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
        (("grpc-status-details-bin", status.SerializeToString()),),
    )

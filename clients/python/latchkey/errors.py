"""All exceptions that the library raises on purpose.

    LatchkeyError
    ├── InvalidArgument (also a ValueError)   the request is wrong; see field_violations
    ├── NotFound                              the account has no such token
    ├── AlreadyExists                         a live token of the account has the name
    ├── FailedPrecondition                    the token or the service does not allow it now
    ├── PermissionDenied                      the policy does not allow this call
    ├── Unauthenticated                       Latchkey does not know this caller
    │   └── AccessError (also a ValueError)   the client's TLS files or credential cannot be used
    ├── ResourceExhausted                     too much load or too large; see retry_after
    ├── Unavailable                           no answer now; see retry_after
    │   └── DeadlineExceeded                  no answer in time
    ├── InternalError                         a fault of the service, or an invalid answer
    └── UnexpectedStatus                      any other gRPC status; see code

DeadlineExceeded is an Unavailable, because for a verify both mean the same: there is no safe
answer, so the answer is no. A verdict is never an exception. `asyncio.CancelledError` passes
through unchanged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import ClassVar

import grpc


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """The problem with one field of a request."""

    field: str
    description: str


class LatchkeyError(Exception):
    """Base class of the library's exceptions. `str()` says what happened and what to do.

    Its texts never contain a secret.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    code: grpc.StatusCode
    """The gRPC status."""
    reason: str | None
    """ErrorInfo.reason: stable, in UPPER_SNAKE case, so that programs can distinguish causes."""
    metadata: Mapping[str, str] = MappingProxyType({})
    """ErrorInfo.metadata: numbers that belong to the reason, such as `max_ttl_seconds`."""
    request_id: str | None
    """Identifies the call. Quote it to the operator of the service."""
    retry_after: timedelta | None
    """The minimum delay that the service requests before another attempt."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str | None = None,
        request_id: str | None = None,
        retry_after: timedelta | None = None,
    ) -> None:
        super().__init__(message)
        self.code = self.default_code if code is None else code
        self.reason = reason
        self.request_id = request_id
        self.retry_after = retry_after


class InvalidArgument(LatchkeyError, ValueError):
    """The request is wrong. Sending it again does not help."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT

    field_violations: Sequence[FieldViolation] = ()


def invalid(field: str, description: str) -> InvalidArgument:
    """Return the error for a request that is not sent. For the library's own use."""
    error = InvalidArgument(f"{field}: {description}.")
    error.field_violations = (FieldViolation(field, description),)
    return error


class NotFound(LatchkeyError):
    """The account has no such token. Tokens of other accounts give the same error."""

    default_code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(LatchkeyError):
    """A live token of the account has this name. Names are compared without regard to case.

    With the reason REQUEST_ID_REUSED, the `request_id` belongs to another request.
    """

    default_code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(LatchkeyError):
    """The state of the token or of the service does not allow the call; see `reason`."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION


class PermissionDenied(LatchkeyError):
    """Latchkey knows this caller but refuses the call."""

    default_code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(LatchkeyError):
    """Latchkey does not know this caller."""

    default_code = grpc.StatusCode.UNAUTHENTICATED


class AccessError(Unauthenticated, ValueError):
    """The client's TLS files or credential cannot be used; see `latchkey.access.Access`."""


class ResourceExhausted(LatchkeyError):
    """The service refuses more work for now, or a message is too large."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(LatchkeyError):
    """There is no answer now. For a verify this means no."""

    default_code = grpc.StatusCode.UNAVAILABLE

    unsent: bool = False
    """Whether no attempt of the call reached the service, so that it changed nothing."""


class DeadlineExceeded(Unavailable):
    """There was no answer in time. The call may or may not have taken effect."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


def late(rpc: str) -> DeadlineExceeded:
    """Return the error for a deadline that passed without an answer. For the library's own use."""
    return DeadlineExceeded(
        f"{rpc} failed: no answer in time. Try again, or allow more time with timeout_seconds."
    )


class InternalError(LatchkeyError):
    """A fault of the service, or an answer that breaks its contract."""

    default_code = grpc.StatusCode.INTERNAL


class UnexpectedStatus(LatchkeyError):
    """A gRPC status that the contract does not name."""

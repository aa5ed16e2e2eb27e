"""Everything that the library raises on purpose.

    LatchkeyError
    ├── InvalidArgument (also a ValueError)   the request is wrong; see field_violations
    ├── NotFound                              the account has no such token
    ├── AlreadyExists                         a live token of the account has the name
    ├── PermissionDenied                      this caller may not do that
    ├── Unauthenticated                       Latchkey does not know this caller
    │   └── AccessError (also a ValueError)   what this client presents is of no use; see Access
    ├── ResourceExhausted                     too much at once; see retry_after
    ├── Unavailable                           no answer now; see retry_after
    │   └── DeadlineExceeded                  no answer in time
    ├── InternalError                         a fault of the service, or an answer without sense
    └── UnexpectedStatus                      any other gRPC status; see code

DeadlineExceeded is an Unavailable because whoever asks "may this secret do this?" must treat both
alike: there is no safe answer, so the answer is no. A verdict is never an exception, and
`asyncio.CancelledError` passes through untouched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

import grpc


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """What is wrong with one field of a request."""

    field: str
    description: str


class LatchkeyError(Exception):
    """Base of all exceptions of this library. `str()` says what happened and what to do.

    No text in it contains a secret.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    code: grpc.StatusCode
    """The gRPC status."""
    reason: str | None
    """ErrorInfo.reason, UPPER_SNAKE and stable: for programs to tell cases apart."""
    request_id: str | None
    """What to quote to whoever runs the service."""
    retry_after: timedelta | None
    """How long the service asks to be left alone before another attempt."""

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
    """The request is wrong, and will be however often it is sent."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT

    field_violations: Sequence[FieldViolation] = ()


def invalid(field: str, description: str) -> InvalidArgument:
    """Return the error for a request that is not even sent. For the library's own use."""
    error = InvalidArgument(f"{field}: {description}.")
    error.field_violations = (FieldViolation(field, description),)
    return error


class NotFound(LatchkeyError):
    """The account has no such token; or it is another account's, which is not told apart."""

    default_code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(LatchkeyError):
    """A live token of the account has this name; letter case is ignored."""

    default_code = grpc.StatusCode.ALREADY_EXISTS


class PermissionDenied(LatchkeyError):
    """Latchkey knows this caller and refuses the call."""

    default_code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(LatchkeyError):
    """Latchkey does not know this caller."""

    default_code = grpc.StatusCode.UNAUTHENTICATED


class AccessError(Unauthenticated, ValueError):
    """What this client is to be known by, or to know the service by, is of no use: see Access."""


class ResourceExhausted(LatchkeyError):
    """The service refuses more work for now, or the message is too large."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(LatchkeyError):
    """There is no answer now. For a verify: not allowed."""

    default_code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(Unavailable):
    """There was no answer in time. What was asked for may or may not have happened."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


def late(rpc: str) -> DeadlineExceeded:
    """Return the error for time that was up while nothing had come. For the library's own use."""
    return DeadlineExceeded(
        f"{rpc} failed: no answer in time. Try again, or allow more time with timeout_seconds."
    )


class InternalError(LatchkeyError):
    """A fault of the service, or an answer that breaks its contract."""

    default_code = grpc.StatusCode.INTERNAL


class UnexpectedStatus(LatchkeyError):
    """A gRPC status that the contract does not name."""

"""gRPC statuses and their rich details, translated into the exceptions of `errors`.

It owns the translation alone; whether a call is tried again is decided in `_retry`.
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from latchkey import errors
from latchkey._shape import redact

# The key that grpcio-status uses. Its own from_call() raises on details that do not fit the status,
# and damaged details must not hide the error that they came with.
_DETAILS_KEY: Final = "grpc-status-details-bin"

_CLASSES: Final[Mapping[grpc.StatusCode, type[errors.LatchkeyError]]] = {
    cls.default_code: cls
    for cls in (
        errors.AlreadyExists,
        errors.DeadlineExceeded,
        errors.InternalError,
        errors.InvalidArgument,
        errors.NotFound,
        errors.PermissionDenied,
        errors.ResourceExhausted,
        errors.Unauthenticated,
        errors.Unavailable,
    )
}

_ADVICE: Final[Mapping[grpc.StatusCode, str]] = {
    grpc.StatusCode.ALREADY_EXISTS: "Choose another name, or delete the token that has it.",
    grpc.StatusCode.DEADLINE_EXCEEDED: "Try again, or allow more time with timeout_seconds.",
    grpc.StatusCode.INTERNAL: "Report it to whoever runs Latchkey.",
    grpc.StatusCode.NOT_FOUND: "Check the account and the token's id.",
    grpc.StatusCode.PERMISSION_DENIED: "Ask whoever runs Latchkey for access.",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "Try again later, with less at once.",
    grpc.StatusCode.UNAUTHENTICATED: "Check the credentials of this caller.",
    grpc.StatusCode.UNAVAILABLE: "Try again later; check the target if it never answers.",
    grpc.StatusCode.UNIMPLEMENTED: "Check that the target is Latchkey, and not an older version.",
}

# Where the answer is lost, the advice depends on what may have happened.
_ADVICE_WHEN_LOST: Final[Mapping[str, str]] = {
    "Create": "The token may exist: find its name with list() and delete it before trying again.",
    "Delete": "The deletion may stand but is not confirmed: call delete() again for its receipt.",
}
# ErrorInfo.reason of a Delete that stands, but whose deadline was too short for the wait.
_NOT_CONFIRMED: Final = "DELETION_NOT_CONFIRMED"
# What gRPC says when it comes to no connection, the reason that we give it, and what to do.
_NO_CONNECTION: Final = (
    (
        re.compile(r"CERTIFICATE_VERIFY_FAILED"),
        "TLS_HANDSHAKE_FAILED",
        "The service's certificate is of none of the trusted CAs: check tls_ca (LATCHKEY_TLS_CA).",
    ),
    (
        re.compile(r"Peer name .* is not in peer certificate"),
        "TLS_HANDSHAKE_FAILED",
        "The service's certificate is for another name: check the target.",
    ),
    (
        re.compile(r"WRONG_VERSION_NUMBER"),
        "TLS_HANDSHAKE_FAILED",
        "The service does not speak TLS there: check the target, or leave TLS out.",
    ),
    (
        re.compile(r"[Hh]andshake failed"),
        "TLS_HANDSHAKE_FAILED",
        "Check the TLS files (latchkey.access) and the service's log.",
    ),
    (
        re.compile(
            r"^(failed to connect to all addresses|connections to all backends failing)"
            r".*(Socket closed|Connection reset by peer)"
        ),
        "CONNECTION_CLOSED",
        "It closed the connection at once, and may want TLS, or another client certificate.",
    ),
)
_LOST: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def from_rpc_error(rpc: str, error: grpc.aio.AioRpcError) -> errors.LatchkeyError:
    """Return the exception for a failed call of the method `rpc` ("Get"). Never raises.

    Raise it outside the `except` block: the original carries the server's texts as they came, and
    a traceback would print it. Here they are scrubbed of whatever looks like a secret.
    """
    code = error.code()
    details = _details(error)
    info = _first(details, error_details_pb2.ErrorInfo)
    request = _first(details, error_details_pb2.RequestInfo)
    text = redact(error.details() or code.name.lower().replace("_", " ")).rstrip(". ")
    reason = redact(info.reason) if info and info.reason else None
    request_id = redact(request.request_id) if request and request.request_id else None

    message = f"{rpc} failed: {text} ({code.name}"
    message += f", request {request_id})." if request_id else ")."
    advice = _ADVICE_WHEN_LOST.get(rpc) if code in _LOST else None
    if code is grpc.StatusCode.UNAVAILABLE and reason is None:
        # No answer at all. A call that never got a connection has done nothing.
        for found, name, what_to_do in _NO_CONNECTION:
            if found.search(text):
                reason, advice = name, what_to_do
                break
    if reason == _NOT_CONFIRMED:
        advice = "The deletion stands but is not confirmed: call delete() again for its receipt."
    advice = advice or _ADVICE.get(code)
    failure = _CLASSES.get(code, errors.UnexpectedStatus)(
        f"{message} {advice}" if advice else message,
        code=code,
        reason=reason,
        request_id=request_id,
        retry_after=_retry_after(_first(details, error_details_pb2.RetryInfo)),
    )
    if isinstance(failure, errors.InvalidArgument):
        bad = _first(details, error_details_pb2.BadRequest)
        failure.field_violations = tuple(
            errors.FieldViolation(redact(v.field), redact(v.description))
            for v in (bad.field_violations if bad else ())
        )
    return failure


def _details(error: grpc.aio.AioRpcError) -> list[AnyMessage]:
    """Return the rich details that came with `error`; none when they are missing or damaged."""
    # In a list of its own: what a server sends as metadata may be of any kind.
    pairs: list[tuple[Any, Any]] = list(error.trailing_metadata() or ())
    for key, value in pairs:
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:
            return []
        # Details of another status say nothing about this one.
        return list(status.details) if status.code == error.code().value[0] else []
    return []


M = TypeVar("M", bound=Message)


def _first(details: list[AnyMessage], kind: type[M]) -> M | None:
    """Return the first detail of `kind` that can be read."""
    for detail in details:
        message = kind()
        try:
            if detail.Unpack(message):
                return message
        except DecodeError:
            continue
    return None


def _retry_after(info: error_details_pb2.RetryInfo | None) -> timedelta | None:
    if info is None or not info.HasField("retry_delay"):
        return None
    try:
        delay = timedelta(
            seconds=info.retry_delay.seconds, microseconds=info.retry_delay.nanos // 1000
        )
    except OverflowError:
        return None
    return delay if delay >= timedelta(0) else None

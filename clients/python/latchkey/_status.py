"""Translates gRPC statuses and their rich details into the exceptions of `errors`.

`_retry` decides whether a call is repeated.
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from latchkey_coherence.redaction import redact

from latchkey import errors

# The key that grpcio-status uses. Its from_call() raises if the details do not match the status.
# Damaged details must not hide the error that they came with.
_DETAILS_KEY: Final = "grpc-status-details-bin"

_CLASSES: Final[Mapping[grpc.StatusCode, type[errors.LatchkeyError]]] = {
    cls.default_code: cls
    for cls in (
        errors.AlreadyExists,
        errors.DeadlineExceeded,
        errors.FailedPrecondition,
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
    grpc.StatusCode.ALREADY_EXISTS: "Choose another name, or delete the token that uses it.",
    grpc.StatusCode.DEADLINE_EXCEEDED: "Try again, or allow more time with timeout_seconds.",
    grpc.StatusCode.INTERNAL: "Report it to the operator of Latchkey.",
    grpc.StatusCode.NOT_FOUND: "Check the account and the token's id.",
    grpc.StatusCode.PERMISSION_DENIED: "Ask the operator of Latchkey for access.",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "Try again later, and ask for less at once.",
    grpc.StatusCode.UNAUTHENTICATED: "Check this caller's credential.",
    grpc.StatusCode.UNAVAILABLE: "Try again later; check the target if it never answers.",
    grpc.StatusCode.UNIMPLEMENTED: "Check that the target is Latchkey, in a recent version.",
}

# If the answer is lost, the advice depends on the possible effects of the call.
_ADVICE_WHEN_LOST: Final[Mapping[str, str]] = {
    "Create": "The token may exist: find its name with list() and delete it before trying again.",
    "Delete": "The token may be deleted, but not confirmed: call delete() again for its receipt.",
    "DeleteAll": "Tokens may be deleted, but not confirmed: call delete_all() again.",
    "Disable": "The token may be disabled, but not confirmed: call disable() again.",
    "Import": "Tokens may be imported: call import_tokens() again.",
    "ReportSecret": "The secrets may be marked: call report_secrets() again.",
    "RetireSecrets": "The secrets may be dead, but not confirmed: call retire_secrets() again.",
    "RevokeSecret": "The secrets may be dead, but not confirmed: call revoke_secrets() again.",
    "Rotate": "The old secrets may be dead: call rotate() again for a new one.",
    "Update": "The token may be changed, but not confirmed: call update() again.",
}
# ErrorInfo.reason of a change that is stored, but whose deadline was too short for the wait.
_NOT_CONFIRMED: Final = {
    "DELETION_NOT_CONFIRMED": (
        "The token is deleted, but not confirmed: call delete() again for its receipt."
    ),
    "CHANGE_NOT_CONFIRMED": "The change is stored, but not confirmed: repeat the call.",
}
# More precise than the advice for the code.
_ADVICE_BY_REASON: Final = {
    "ACCOUNT_DENIED": (
        "Use an account of this caller, or ask the operator to add this one to the caller's "
        "`accounts` in the policy."
    ),
    "IDENTITY_CONFLICT": "Present only the certificate or only the credential of one caller.",
    "METHOD_DENIED": "Ask the operator to give this caller that role in the policy.",
    "FLEET_UPGRADING": "Try again when all servers run the same release.",
    "TOKEN_SEAL_INVALID": "Its row was changed by someone else: delete it and create another one.",
    "TOO_MANY_SECRETS": "End the older ones with retire_secrets(), or rotate with less grace.",
}
# Messages of gRPC for a call that found no connection and was therefore never sent. With any other
# message, the call may have been sent.
_UNSENT: Final = re.compile(
    r"failed to connect to all addresses|connections to all backends failing|DNS resolution failed"
)
# Messages of gRPC for failed connections, each with the reason and the advice that we give for it.
_NO_CONNECTION: Final = (
    (
        re.compile(r"CERTIFICATE_VERIFY_FAILED"),
        "TLS_HANDSHAKE_FAILED",
        "The service's certificate is not from a trusted CA: check tls_ca (LATCHKEY_TLS_CA).",
    ),
    (
        re.compile(r"Peer name .* is not in peer certificate"),
        "TLS_HANDSHAKE_FAILED",
        "The service's certificate is for another name: check the target.",
    ),
    (
        re.compile(r"WRONG_VERSION_NUMBER"),
        "TLS_HANDSHAKE_FAILED",
        "The target does not speak TLS: check the target, or connect without TLS.",
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
        # With TLS 1.3, a client does not learn why the service rejects its certificate.
        (
            "The target closed the connection at once. It may require TLS or a client certificate, "
            "or the client certificate may have expired."
        ),
    ),
)
_LOST: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def from_rpc_error(rpc: str, error: grpc.aio.AioRpcError) -> errors.LatchkeyError:
    """Return the exception for a failed call of the method `rpc` ("Get"). Never raises.

    Raise it outside the `except` block. A traceback would otherwise print the original error, which
    carries the server's texts unredacted. Here they are redacted.
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
    unsent = False
    if code is grpc.StatusCode.UNAVAILABLE and reason is None:
        # No answer at all. A call without a connection has done nothing.
        unsent = _UNSENT.match(text) is not None
        if unsent:
            advice = None
        for found, name, what_to_do in _NO_CONNECTION:
            if found.search(text):
                reason, advice = name, what_to_do
                break
    if reason is not None:
        advice = _NOT_CONFIRMED.get(reason) or _ADVICE_BY_REASON.get(reason) or advice
    advice = advice or _ADVICE.get(code)
    failure = _CLASSES.get(code, errors.UnexpectedStatus)(
        f"{message} {advice}" if advice else message,
        code=code,
        reason=reason,
        request_id=request_id,
        retry_after=_retry_after(_first(details, error_details_pb2.RetryInfo)),
    )
    if info is not None and info.metadata:
        failure.metadata = {key: redact(value) for key, value in info.metadata.items()}
    if isinstance(failure, errors.Unavailable):
        failure.unsent = unsent
    if isinstance(failure, errors.InvalidArgument):
        bad = _first(details, error_details_pb2.BadRequest)
        failure.field_violations = tuple(
            errors.FieldViolation(redact(v.field), redact(v.description))
            for v in (bad.field_violations if bad else ())
        )
    return failure


def _details(error: grpc.aio.AioRpcError) -> list[AnyMessage]:
    """Return the rich details of `error`, or an empty list if they are missing or damaged."""
    # Copied into an untyped list, since a server may send metadata of any type.
    pairs: list[tuple[Any, Any]] = list(error.trailing_metadata() or ())
    for key, value in pairs:
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:
            return []
        # Ignore details of another status.
        return list(status.details) if status.code == error.code().value[0] else []
    return []


M = TypeVar("M", bound=Message)


def _first(details: list[AnyMessage], kind: type[M]) -> M | None:
    """Return the first readable detail of type `kind`."""
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

"""Translation of gRPC statuses into exceptions."""

import pickle
from datetime import timedelta
from typing import Any

import grpc
import latchkey
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from latchkey._status import from_rpc_error

KEY = "grpc-status-details-bin"
SECRET = "lk" + "_" + "S3cr3t" * 9 + "abc"


def rpc_error(
    code: grpc.StatusCode, text: str | None, *details: Message, raw: Any = None
) -> grpc.aio.AioRpcError:
    status = status_pb2.Status(code=code.value[0], message=text or "")
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    value = status.SerializeToString() if raw is None else raw
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), trailing_metadata=grpc.aio.Metadata((KEY, value)), details=text
    )


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
)
def test_every_status_has_its_exception(code: grpc.StatusCode) -> None:
    """Each failure has one class of the tree, its gRPC code, and a message with the cause."""
    failure = from_rpc_error("Get", rpc_error(code, "it broke"))
    assert failure.code is code
    assert "Get failed: it broke" in str(failure)
    assert code.name in str(failure)
    expected = code.name.title().replace("_", "")
    expected = "InternalError" if expected == "Internal" else expected
    named = getattr(latchkey, expected, latchkey.UnexpectedStatus)
    assert type(failure) is named


def test_details_are_translated() -> None:
    """Reason, request id, delay and field violations reach the caller."""
    failure = from_rpc_error(
        "Create",
        rpc_error(
            grpc.StatusCode.INVALID_ARGUMENT,
            "bad name",
            error_details_pb2.ErrorInfo(reason="NAME_TOO_LONG", domain="latchkey"),
            error_details_pb2.RequestInfo(request_id="r-1"),
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field="name", description="at most 64 characters"
                    )
                ]
            ),
        ),
    )
    assert isinstance(failure, latchkey.InvalidArgument)
    assert isinstance(failure, ValueError)
    assert failure.reason == "NAME_TOO_LONG"
    assert failure.request_id == "r-1"
    assert "r-1" in str(failure)
    assert failure.retry_after == timedelta(seconds=1.5)
    assert list(failure.field_violations) == [
        latchkey.FieldViolation("name", "at most 64 characters")
    ]


def test_deadline_exceeded_is_unavailable() -> None:
    """Code that catches Unavailable also catches an exceeded deadline."""
    failure = from_rpc_error("Verify", rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "late"))
    assert isinstance(failure, latchkey.Unavailable)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_lost_answers_come_with_advice(code: grpc.StatusCode) -> None:
    """After a lost change the message says what may have happened and what to do."""
    assert "may exist" in str(from_rpc_error("Create", rpc_error(code, "x")))
    assert "receipt" in str(from_rpc_error("Delete", rpc_error(code, "x")))
    for rpc in ("DeleteAll", "Disable", "RetireSecrets", "RevokeSecret", "Rotate", "Update"):
        message = str(from_rpc_error(rpc, rpc_error(code, "x")))
        assert " may be " in message, rpc
        assert " again" in message, rpc


@pytest.mark.parametrize(
    ("text", "unsent"),
    [
        # The messages of gRPC's two load balancers and its resolver.
        ("failed to connect to all addresses; last error: Connection refused", True),
        ("connections to all backends failing; last error: Connection refused", True),
        ("DNS resolution failed for nowhere.invalid:1: Domain name not found", True),
        ("connections to all backends failing; last error: UNKNOWN: Socket closed", True),
        ("Socket closed", False),
        ("recvmsg:Connection reset by peer", False),
        ("upstream: failed to connect to all addresses", False),
        ("some future message", False),
    ],
)
def test_unsent_calls_are_known_to_change_nothing(text: str, unsent: bool) -> None:
    """It is certain that nothing was changed only if gRPC reports that there was no connection.
    The message then does not say that the token may exist."""
    failure = from_rpc_error("Create", rpc_error(grpc.StatusCode.UNAVAILABLE, text))
    assert isinstance(failure, latchkey.Unavailable)
    assert failure.unsent is unsent
    assert ("may exist" in str(failure)) is not unsent


def test_an_answer_of_the_service_is_not_unsent() -> None:
    """A text like gRPC's does not make an answer of the service look like a failed connection."""
    info = error_details_pb2.ErrorInfo(reason="DATABASE_UNAVAILABLE", domain="latchkey")
    text = "failed to connect to all addresses"
    failure = from_rpc_error("Create", rpc_error(grpc.StatusCode.UNAVAILABLE, text, info))
    assert isinstance(failure, latchkey.Unavailable)
    assert not failure.unsent


@pytest.mark.parametrize(
    ("code", "reason", "words"),
    [
        (grpc.StatusCode.UNAVAILABLE, "CHANGE_NOT_CONFIRMED", "The change is stored"),
        (grpc.StatusCode.FAILED_PRECONDITION, "TOO_MANY_SECRETS", "retire_secrets()"),
        (grpc.StatusCode.FAILED_PRECONDITION, "FLEET_UPGRADING", "the same release"),
        (grpc.StatusCode.FAILED_PRECONDITION, "TOKEN_SEAL_INVALID", "delete it"),
    ],
)
def test_reasons_come_with_advice(code: grpc.StatusCode, reason: str, words: str) -> None:
    """The message of a change that failed says what to do about the reason."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="latchkey")
    failure = from_rpc_error("Rotate", rpc_error(code, "x", info))
    assert failure.reason == reason
    assert words in str(failure)


def test_a_create_that_found_no_connection_created_nothing() -> None:
    """GRPC reports that there was no connection, so the message does not speak of a token that may
    exist."""
    for text in (
        "failed to connect to all addresses; last error: UNKNOWN: Connection refused",
        "connections to all backends failing; last error: UNKNOWN: Connection refused",
        "DNS resolution failed for nowhere.invalid:1: Domain name not found",
    ):
        error = rpc_error(grpc.StatusCode.UNAVAILABLE, text)
        assert "may exist" not in str(from_rpc_error("Create", error))


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("METHOD_DENIED", "give this caller that role"),
        ("ACCOUNT_DENIED", "`accounts` in the policy"),
        ("IDENTITY_CONFLICT", "only the certificate or only the credential"),
    ],
)
def test_refused_callers_get_specific_advice(reason: str, words: str) -> None:
    """The advice for a refusal depends on its reason."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="latchkey")
    error = rpc_error(grpc.StatusCode.PERMISSION_DENIED, "x", info)
    assert words in str(from_rpc_error("Get", error))


def test_an_unconfirmed_deletion_is_reported_as_deleted() -> None:
    """If the deadline was too short for the wait, the message says that the token is deleted."""
    info = error_details_pb2.ErrorInfo(reason="DELETION_NOT_CONFIRMED", domain="latchkey")
    failure = from_rpc_error("Delete", rpc_error(grpc.StatusCode.UNAVAILABLE, "x", info))
    assert failure.reason == "DELETION_NOT_CONFIRMED"
    assert "The token is deleted" in str(failure)
    assert "receipt" in str(failure)


@given(st.binary() | st.text())
@settings(deadline=None)  # the machine may be busy
def test_damaged_details_hide_nothing(raw: bytes | str) -> None:
    """With any bytes in place of the details, the error keeps its class and message."""
    failure = from_rpc_error("Get", rpc_error(grpc.StatusCode.NOT_FOUND, "gone", raw=raw))
    assert type(failure) is latchkey.NotFound
    assert "gone" in str(failure)


@given(
    st.sampled_from(["ErrorInfo", "RequestInfo", "RetryInfo", "BadRequest", "Nonsense"]),
    st.binary(),
)
@settings(deadline=None)  # the machine may be busy
def test_damaged_parts_of_details_hide_nothing(name: str, value: bytes) -> None:
    """A detail of a known type with invalid bytes is ignored."""
    status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0])
    status.details.add(type_url=f"type.googleapis.com/google.rpc.{name}", value=value)
    failure = from_rpc_error(
        "Get", rpc_error(grpc.StatusCode.UNAVAILABLE, "down", raw=status.SerializeToString())
    )
    assert type(failure) is latchkey.Unavailable
    assert failure.retry_after is None or failure.retry_after >= timedelta(0)


def test_details_of_another_status_are_ignored() -> None:
    """Details that contradict the status are ignored."""
    status = status_pb2.Status(code=grpc.StatusCode.NOT_FOUND.value[0])
    packed = AnyMessage()
    packed.Pack(error_details_pb2.ErrorInfo(reason="WRONG"))
    status.details.append(packed)
    raw = status.SerializeToString()
    failure = from_rpc_error("Get", rpc_error(grpc.StatusCode.UNAVAILABLE, "down", raw=raw))
    assert failure.reason is None


def test_an_invalid_delay_is_ignored() -> None:
    """Delays that are negative or too large are ignored."""
    for duration in (Duration(seconds=-5), Duration(seconds=2**62)):
        info = error_details_pb2.RetryInfo(retry_delay=duration)
        failure = from_rpc_error("Get", rpc_error(grpc.StatusCode.UNAVAILABLE, "x", info))
        assert failure.retry_after is None


def test_server_texts_are_redacted() -> None:
    """Even if a server echoed a secret in every text, no exception would contain it."""
    failure = from_rpc_error(
        "Verify",
        rpc_error(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"bad secret {SECRET}",
            error_details_pb2.ErrorInfo(reason=SECRET),
            error_details_pb2.RequestInfo(request_id=SECRET),
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=SECRET, description=SECRET)
                ]
            ),
        ),
    )
    assert "S3cr3t" not in repr(failure) + str(failure) + repr(vars(failure))


def test_exceptions_survive_pickling() -> None:
    """An exception from a worker process reaches its parent complete."""
    failure = from_rpc_error(
        "Get",
        rpc_error(
            grpc.StatusCode.UNAVAILABLE, "down", error_details_pb2.RequestInfo(request_id="r-2")
        ),
    )
    again = pickle.loads(pickle.dumps(failure))  # noqa: S301 - our own bytes
    assert type(again) is type(failure)
    assert (str(again), again.code, again.request_id) == (str(failure), failure.code, "r-2")

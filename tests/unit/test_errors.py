"""What gRPC clients can receive of an error."""

from urllib.parse import quote

import pytest
from google.rpc import error_details_pb2, status_pb2
from latchkey_service.errors import FieldViolation, InvalidArgument, status_of

# gRPC's soft limit of the headers of an answer. Above it, clients reject some answers, and above
# twice as much all of them, with RESOURCE_EXHAUSTED instead of the error.
CLIENTS_BYTES_MAX = 8 * 1024
# Each header counts with 32 bytes more (RFC 9113 §6.5.2), and a name. The others are small.
OTHERS_BYTES = 512


@pytest.mark.parametrize("text", ["x" * 80, "é" * 80])
@pytest.mark.parametrize("count", [1, 64, 1_000])
def test_clients_can_receive_any_number_of_violations(text: str, count: int) -> None:
    """The status of a request with many mistakes fits into the headers that gRPC clients accept. It
    names the first mistakes, and how many others there are."""
    error = InvalidArgument(
        *(FieldViolation(f"permissions[{number}]", text) for number in range(count))
    )
    parts = status_of(error, "a" * 64)
    details = dict(parts.trailing_metadata)["grpc-status-details-bin"]
    encoded_bytes = len(quote(parts.message)) + len(details) * 4 / 3
    assert encoded_bytes + OTHERS_BYTES <= CLIENTS_BYTES_MAX
    status = status_pb2.Status.FromString(details)
    request = error_details_pb2.BadRequest()
    (packed,) = (one for one in status.details if one.Is(request.DESCRIPTOR))
    packed.Unpack(request)
    first, last = request.field_violations[0], request.field_violations[-1]
    assert (first.field, first.description) == ("permissions[0]", text)
    named = len(request.field_violations)
    if count > named:
        assert last.description == f"{count - named + 1} further problems"
    else:
        assert named == count


def test_the_reason_of_an_unnamed_violation_counts() -> None:
    """Programs see the reason of a violation, even if the status does not name it."""
    many = [FieldViolation("permissions", "x" * 80)] * 64
    expiry = FieldViolation("ttl", "is required", "EXPIRY_REQUIRED")
    assert InvalidArgument(*many, expiry).reason == "EXPIRY_REQUIRED"

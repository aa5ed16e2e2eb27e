"""The methods of every service, as the fuzzer calls them, and the form of its inputs."""

from typing import Any, NamedTuple

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import maintenance_service_pb2 as maintenance_pb
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb

__all__ = [
    "ENDLESS",
    "HEALTH",
    "METHODS",
    "REFLECTION",
    "TOKENS",
    "Method",
    "input_of",
    "number_of",
    "parts_of",
]


TOKENS = "/latchkey.v1.TokenService/"


HEALTH = "/grpc.health.v1.Health/"


REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


class Method(NamedTuple):
    """A method, its messages, and which side sends a stream of them."""

    path: str
    request: Any
    response: Any
    requests: bool = False
    responses: bool = False


METHODS = (
    Method(f"{TOKENS}Verify", pb.VerifyRequest, pb.VerifyResponse),
    Method(f"{TOKENS}BatchVerify", pb.BatchVerifyRequest, pb.BatchVerifyResponse),
    Method(f"{TOKENS}Create", pb.CreateRequest, pb.CreateResponse),
    Method(f"{TOKENS}Get", pb.GetRequest, pb.GetResponse),
    Method(f"{TOKENS}List", pb.ListRequest, pb.ListResponse),
    Method(f"{TOKENS}Delete", pb.DeleteRequest, pb.DeleteResponse),
    Method(f"{TOKENS}Watch", pb.WatchRequest, pb.WatchResponse, requests=True, responses=True),
    Method(
        "/latchkey.v1.StatusService/GetStatus",
        status_pb.GetStatusRequest,
        status_pb.GetStatusResponse,
    ),
    Method(
        "/latchkey.v1.AuditService/List",
        audit_pb.AuditServiceListRequest,
        audit_pb.AuditServiceListResponse,
    ),
    Method(f"{HEALTH}Check", health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse),
    Method(
        f"{HEALTH}Watch",
        health_pb2.HealthCheckRequest,
        health_pb2.HealthCheckResponse,
        responses=True,
    ),
    Method(
        REFLECTION,
        reflection_pb2.ServerReflectionRequest,
        reflection_pb2.ServerReflectionResponse,
        requests=True,
        responses=True,
    ),
    # Last, because inputs of the corpus contain the numbers of these methods.
    Method(
        "/latchkey.v1.MaintenanceService/InvalidateAll",
        maintenance_pb.InvalidateAllRequest,
        maintenance_pb.InvalidateAllResponse,
    ),
    Method(f"{TOKENS}Update", pb.UpdateRequest, pb.UpdateResponse),
    Method(f"{TOKENS}Disable", pb.DisableRequest, pb.DisableResponse),
    Method(f"{TOKENS}Enable", pb.EnableRequest, pb.EnableResponse),
    Method(f"{TOKENS}Rotate", pb.RotateRequest, pb.RotateResponse),
    Method(f"{TOKENS}RetireSecrets", pb.RetireSecretsRequest, pb.RetireSecretsResponse),
    Method(f"{TOKENS}RevokeSecret", pb.RevokeSecretRequest, pb.RevokeSecretResponse),
    Method(f"{TOKENS}DeleteAll", pb.DeleteAllRequest, pb.DeleteAllResponse),
    Method(f"{TOKENS}GetUsage", pb.GetUsageRequest, pb.GetUsageResponse),
    Method(f"{TOKENS}Find", pb.FindRequest, pb.FindResponse),
)


# These end only when the server does.
ENDLESS = {f"{TOKENS}Watch", f"{HEALTH}Watch"}


def number_of(name: str) -> int:
    """Return a method's number, given the end of its path."""
    (number,) = (
        n for n, method in enumerate(METHODS) if method.path.endswith((f"/{name}", f".{name}"))
    )
    return number


def parts_of(method: Method, body: bytes) -> list[bytes]:
    """Return the messages of an input: one, or any number for a stream."""
    if not method.requests:
        return [body]
    parts = []
    while body:
        length, body = body[0], body[1:]
        parts.append(body[:length])
        body = body[length:]
    return parts


def input_of(number: int, parts: list[bytes]) -> bytes:
    if not METHODS[number].requests:
        return bytes([number]) + (parts[0] if parts else b"")
    return bytes([number]) + b"".join(bytes([len(p[:255])]) + p[:255] for p in parts)

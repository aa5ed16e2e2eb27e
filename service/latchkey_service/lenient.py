"""Verifies whose secret is not text: still a verdict, not an error.

A proto3 string must be UTF-8, so that a message with other bytes in `secret` does not parse. But
what the holder presented must never make Verify fail, and one holder's bytes must not fail the
other 999 of a batch. Such a message is read once more, with `secret` as bytes.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from latchkey_proto.v1 import token_service_pb2 as pb

__all__ = ["BATCH_MAX", "BATCH_VERIFY", "VERIFY", "lenient_parse"]

VERIFY = "/latchkey.v1.TokenService/Verify"
BATCH_VERIFY = "/latchkey.v1.TokenService/BatchVerify"
# Questions to a BatchVerify.
BATCH_MAX = 1_000


def lenient_parse(path: str, data: bytes) -> Any | None:
    """Return the request of `path`, secrets that are not text emptied, or None if it is none."""
    try:
        if path == VERIFY:
            return _as_text(_VerifyBytes.FromString(data))
        if path == BATCH_VERIFY:
            batch = _BatchVerifyBytes.FromString(data)
            # It is refused anyway, and each question takes time that nobody was asked for yet:
            # what fits into a message would hold up all others for seconds.
            if len(batch.requests) > BATCH_MAX:
                return None
            return pb.BatchVerifyRequest(requests=map(_as_text, batch.requests))
    except DecodeError:
        pass
    return None


def _as_text(request: Any) -> pb.VerifyRequest:
    """Return the request as it should have come. An empty secret is MALFORMED, as it would be."""
    try:
        secret = request.secret.decode()
    except UnicodeDecodeError:
        secret = ""
    return pb.VerifyRequest(secret=secret, required_scope=request.required_scope)


def _messages() -> tuple[Any, Any]:
    """Make the two requests' types anew, with `secret` as bytes: the same on the wire.

    Derived from the contract's own descriptors, so that they cannot drift apart from it.
    """
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    file.name = "latchkey/lenient.proto"
    for message in file.message_type:
        for field in message.field:
            if message.name == "VerifyRequest" and field.name == "secret":
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    # A pool of its own: the default one has these names already, and reflection shows it.
    pool = descriptor_pool.DescriptorPool()
    for dependency in pb.DESCRIPTOR.dependencies:
        pool.AddSerializedFile(dependency.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    names = ("latchkey.v1.VerifyRequest", "latchkey.v1.BatchVerifyRequest")
    verify, batch = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names
    )
    return verify, batch


_VerifyBytes, _BatchVerifyBytes = _messages()

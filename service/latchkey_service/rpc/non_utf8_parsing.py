"""Parses verifies whose texts are not UTF-8, so that they get a verdict instead of an error.

A proto3 string must be UTF-8; otherwise the message does not parse. But no presented secret may
make Verify fail, and one bad secret must not fail the other 999 of a batch. So such a message is
parsed again with all texts as bytes. A text that is not UTF-8 becomes empty, which no token
accepts: as a secret, an address or a permission, an empty text is invalid.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from latchkey_proto.v1 import token_service_pb2 as pb

from latchkey_service.access.methods import BATCH_VERIFY, VERIFY

__all__ = ["BATCH_MAX", "REQUIRED_MAX", "parse_non_utf8"]

# Permissions that a verify may require: as many as a token can have.
REQUIRED_MAX = 64
# Questions in a BatchVerify.
BATCH_MAX = 1_000
_TEXTS = tuple(
    field.name
    for field in pb.VerifyRequest.DESCRIPTOR.fields
    if field.type == descriptor_pb2.FieldDescriptorProto.TYPE_STRING
)


def parse_non_utf8(path: str, data: bytes) -> Any | None:
    """Return the request of `path` with invalid secrets emptied, or None if it does not parse."""
    try:
        if path == VERIFY:
            return _as_text(_VerifyBytes.FromString(data))
        if path == BATCH_VERIFY:
            batch = _BatchVerifyBytes.FromString(data)
            # A larger batch is rejected anyway. Converting every question that fits into a message
            # would block the event loop for seconds.
            if len(batch.requests) > BATCH_MAX:
                return None
            return pb.BatchVerifyRequest(
                requests=map(_as_text, batch.requests), omit_details=batch.omit_details
            )
    except DecodeError:
        pass
    return None


def _as_text(request: Any) -> pb.VerifyRequest:
    """Convert the texts. One that is not UTF-8 becomes empty.

    Keeps all other known fields. If one were lost, a requirement of the caller would be ignored.
    """
    texts: dict[str, Any] = {}
    for name in _TEXTS:
        value = getattr(request, name)
        texts[name] = (
            _decoded(value)
            if isinstance(value, bytes)
            # One permission more than allowed is refused.
            else [_decoded(text) for text in value[: REQUIRED_MAX + 1]]
        )
        request.ClearField(name)
    request.DiscardUnknownFields()
    converted = pb.VerifyRequest.FromString(request.SerializeToString())
    converted.MergeFrom(pb.VerifyRequest(**texts))
    return converted


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return ""


def _messages() -> tuple[Any, Any]:
    """Build both request types with texts as bytes; their wire format is the same.

    They derive from the contract's own descriptors, so they cannot diverge from it.
    """
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    file.name = "latchkey/non_utf8.proto"
    for message in file.message_type:
        for field in message.field:
            text = field.type == descriptor_pb2.FieldDescriptorProto.TYPE_STRING
            if message.name == "VerifyRequest" and text:
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    # A separate pool: the default one already has these names, and reflection exposes it.
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

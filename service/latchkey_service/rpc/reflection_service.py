"""grpc.reflection: describes the served methods to tools such as grpcurl, with their comments.

Serves v1 and v1alpha, whose messages are the same on the wire. Not the servicer of
grpcio-reflection (1.75). That one does not find names with a leading dot or names of methods, which
tools ask for (`grpcurl describe SERVICE.METHOD`), serves v1alpha alone, and has no comments.
"""

import functools
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from importlib import resources
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2, text_format
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

__all__ = ["REFLECTION_SERVICES", "Reflection", "register_reflection"]

_V1: Final = "grpc.reflection.v1.ServerReflection"
_V1_ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
REFLECTION_SERVICES: Final = (_V1, _V1_ALPHA)

_Request = reflection_pb2.ServerReflectionRequest
_Response = reflection_pb2.ServerReflectionResponse
_File = descriptor_pb2.FileDescriptorProto


class Reflection:
    """Answers questions about `services`, from the descriptor set of the contract."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = sorted(services)
        self._files = _described_files()
        self._file_of = _files_by_symbol()
        self._messages = _messages()

    async def ServerReflectionInfo(
        self, requests: AsyncIterable[_Request], _context: Any
    ) -> AsyncIterator[_Response]:
        """Answer each request in turn. A name that does not exist is an answer, not an error."""
        async for request in requests:
            yield self._answer(request)

    def _answer(self, request: _Request) -> _Response:
        response = _Response(valid_host=request.host, original_request=request)
        kind = request.WhichOneof("message_request")
        if kind == "list_services":
            response.list_services_response.service.extend(
                reflection_pb2.ServiceResponse(name=name) for name in self._services
            )
        elif kind == "file_by_filename":
            self._describe(request.file_by_filename, response)
        elif kind == "file_containing_symbol":
            # grpcurl asks for fields and methods with the leading dot of a qualified name.
            symbol = request.file_containing_symbol.removeprefix(".")
            self._describe(self._file_of.get(symbol, ""), response)
        elif kind == "all_extension_numbers_of_type":
            name = request.all_extension_numbers_of_type.removeprefix(".")
            if name in self._messages:
                # The contract has no extensions.
                response.all_extension_numbers_response.base_type_name = name
            else:
                _fail(response, grpc.StatusCode.NOT_FOUND, f"Message not found: {name}")
        elif kind == "file_containing_extension":
            _fail(response, grpc.StatusCode.NOT_FOUND, "Extension not found.")
        else:
            _fail(response, grpc.StatusCode.INVALID_ARGUMENT, "The request asks nothing.")
        return response

    def _describe(self, name: str, response: _Response) -> None:
        """Put the file `name` and everything that it imports into the answer."""
        if name not in self._files:
            _fail(response, grpc.StatusCode.NOT_FOUND, "Symbol or file not found.")
            return
        needed = [name]
        for wanted in needed:
            needed += (d for d in self._files[wanted].dependency if d not in needed)
        response.file_descriptor_response.file_descriptor_proto.extend(
            self._files[wanted].SerializeToString() for wanted in needed
        )


def register_reflection(reflection: Reflection, registrar: Any) -> None:
    """Register `reflection` under the names of both versions."""
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.ServerReflectionInfo,
        request_deserializer=_Request.FromString,
        response_serializer=_Response.SerializeToString,
    )
    for service in REFLECTION_SERVICES:
        registrar.add_registered_method_handlers(service, {"ServerReflectionInfo": handler})


def _fail(response: _Response, code: grpc.StatusCode, message: str) -> None:
    response.error_response.error_code = code.value[0]
    response.error_response.error_message = message


@functools.cache
def _described_files() -> Mapping[str, _File]:
    """Return all files by name: the contract, error details, health and reflection."""
    shipped = resources.files("latchkey_proto").joinpath("latchkey.binpb").read_bytes()
    found: list[_File] = list(descriptor_pb2.FileDescriptorSet.FromString(shipped).file)
    health = _File.FromString(health_pb2.DESCRIPTOR.serialized_pb)
    alpha = _File.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    # grpcio-reflection has no v1. It has the same messages in another package.
    v1 = _File()
    text_format.Parse(str(alpha).replace("v1alpha", "v1"), v1)
    return {file.name: file for file in [*found, health, alpha, v1]}


@functools.cache
def _files_by_symbol() -> Mapping[str, str]:
    """Return the name of the file that defines each symbol."""
    return {symbol: f.name for f in _described_files().values() for symbol in _symbols(f)}


@functools.cache
def _messages() -> frozenset[str]:
    return frozenset(
        name
        for file in _described_files().values()
        for message in file.message_type
        for name, _ in _walk(file.package, message)
    )


def _symbols(file: _File) -> Iterable[str]:
    """Yield the full name of everything in `file` that has one."""
    prefix = f"{file.package}." if file.package else ""
    for message in file.message_type:
        for name, nested in _walk(file.package, message):
            yield name
            yield from (f"{name}.{field.name}" for field in nested.field)
            yield from (f"{name}.{oneof.name}" for oneof in nested.oneof_decl)
            yield from _of_enums(f"{name}.", nested.enum_type)
    yield from _of_enums(prefix, file.enum_type)
    for service in file.service:
        yield prefix + service.name
        yield from (f"{prefix}{service.name}.{method.name}" for method in service.method)


def _of_enums(prefix: str, enums: Iterable[descriptor_pb2.EnumDescriptorProto]) -> Iterable[str]:
    for enum in enums:
        yield prefix + enum.name
        for value in enum.value:
            # protobuf's own name has the parent of the enum; people write the enum.
            yield prefix + value.name
            yield f"{prefix}{enum.name}.{value.name}"


def _walk(
    parent: str, message: descriptor_pb2.DescriptorProto
) -> Iterable[tuple[str, descriptor_pb2.DescriptorProto]]:
    """Yield `message` and all messages inside it, each with its full name."""
    name = f"{parent}.{message.name}" if parent else message.name
    yield name, message
    for nested in message.nested_type:
        yield from _walk(name, nested)

"""The page of the gRPC API, from the descriptor set with the comments of the .proto files."""

import re
from collections.abc import Iterator
from importlib import resources

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

__all__ = ["page"]

PACKAGE = "latchkey.v1"
INTRODUCTION = """# gRPC API

Generated from the comments of the contract. [Errors](../errors.md) lists the reasons of failed
calls, and [Limits](../limits.md) the sizes of requests.
`latchkey proto` writes a descriptor set for tools.
"""
Type = FieldDescriptorProto
# In the contract's own words.
SCALARS = {
    Type.TYPE_BOOL: "bool",
    Type.TYPE_BYTES: "bytes",
    Type.TYPE_DOUBLE: "double",
    Type.TYPE_FIXED32: "fixed32",
    Type.TYPE_FIXED64: "fixed64",
    Type.TYPE_INT32: "int32",
    Type.TYPE_INT64: "int64",
    Type.TYPE_STRING: "string",
    Type.TYPE_UINT32: "uint32",
    Type.TYPE_UINT64: "uint64",
}


def page() -> str:
    """Return the page in Markdown: each service with its methods, then all messages and enums."""
    found = FileDescriptorSet.FromString(
        resources.files("latchkey_proto").joinpath("latchkey.binpb").read_bytes()
    )
    files = sorted(
        (file for file in found.file if file.package == PACKAGE),
        # The service that everyone uses comes first.
        key=lambda file: (file.name != "latchkey/v1/token_service.proto", file.name),
    )
    known = {name for file in files for name in _names(file)}
    lines = [INTRODUCTION]
    for file in files:
        lines += _Page(file, known).services()
    for file in files:
        lines += _Page(file, known).types()
    return "\n".join(lines)


def _names(file: FileDescriptorProto) -> Iterator[str]:
    def below(prefix: str, message: DescriptorProto) -> Iterator[str]:
        name = f"{prefix}.{message.name}"
        yield name
        for enum in message.enum_type:
            yield f"{name}.{enum.name}"
        for inner in message.nested_type:
            yield from below(name, inner)

    for message in file.message_type:
        yield from below(f".{file.package}", message)
    for enum in file.enum_type:
        yield f".{file.package}.{enum.name}"


class _Page:
    """Writes the parts of the page that one file describes."""

    def __init__(self, file: FileDescriptorProto, known: set[str]) -> None:
        self._file = file
        self._known = known
        self._comments = {
            tuple(place.path): (place.leading_comments or place.trailing_comments)
            for place in file.source_code_info.location
        }

    def services(self) -> list[str]:
        lines = []
        for number, service in enumerate(self._file.service):
            lines += [f"## {service.name}", "", self._text((6, number)), ""]
            for index, method in enumerate(service.method):
                comment = self._text((6, number, 2, index))
                lines += [f"### {service.name}.{method.name}", "", self._signature(method), ""]
                lines += [comment, ""]
        return lines

    def types(self) -> list[str]:
        lines: list[str] = []
        for number, message in enumerate(self._file.message_type):
            lines += self._message(message, message.name, (4, number))
        for number, enum in enumerate(self._file.enum_type):
            lines += self._enum(enum, enum.name, (5, number))
        return lines

    def _message(self, message: DescriptorProto, name: str, path: tuple[int, ...]) -> list[str]:
        if message.options.map_entry:
            return []
        lines = [f"## {name}", "", self._text(path), ""]
        if message.field:
            lines += ["| field | type | meaning |", "| --- | --- | --- |"]
        maps = {f"{name}.{m.name}": m for m in message.nested_type if m.options.map_entry}
        for index, field in enumerate(message.field):
            comment = self._cell((*path, 2, index))
            lines.append(
                f"| `{field.name}` = {field.number} | {self._type(field, maps)} | {comment} |"
            )
        lines.append("")
        for index, inner in enumerate(message.nested_type):
            lines += self._message(inner, f"{name}.{inner.name}", (*path, 3, index))
        for index, enum in enumerate(message.enum_type):
            lines += self._enum(enum, f"{name}.{enum.name}", (*path, 4, index))
        return lines

    def _enum(self, enum: EnumDescriptorProto, name: str, path: tuple[int, ...]) -> list[str]:
        lines = [f"## {name}", "", self._text(path), "", "| value | meaning |", "| --- | --- |"]
        for index, value in enumerate(enum.value):
            lines.append(f"| `{value.name}` = {value.number} | {self._cell((*path, 2, index))} |")
        return [*lines, ""]

    def _signature(self, method: MethodDescriptorProto) -> str:
        takes, returns = self._link(method.input_type), self._link(method.output_type)
        takes = f"stream of {takes}" if method.client_streaming else takes
        returns = f"stream of {returns}" if method.server_streaming else returns
        return f"{takes} → {returns}"

    def _type(self, field: FieldDescriptorProto, maps: dict[str, DescriptorProto]) -> str:
        short = field.type_name.removeprefix(f".{PACKAGE}.")
        if short in maps:
            key, value = maps[short].field
            return f"map of {self._type(key, {})} to {self._type(value, {})}"
        found = SCALARS.get(field.type) or self._link(field.type_name)
        if field.label == Type.LABEL_REPEATED:
            return f"repeated {found}"
        return f"optional {found}" if field.proto3_optional else found

    def _link(self, name: str) -> str:
        if name not in self._known:
            return f"`{name.removeprefix('.')}`"
        short = name.removeprefix(f".{PACKAGE}.")
        return f"[{short}](#{short.lower().replace('.', '')})"

    def _text(self, path: tuple[int, ...]) -> str:
        """Return a comment as Markdown."""
        lines = [line.removeprefix(" ") for line in self._comments.get(path, "").splitlines()]
        text = re.sub(r"[<>*_]", r"\\\g<0>", "\n".join(lines).strip())
        return re.sub(r"`[^`]*`", lambda found: found[0].replace("\\", ""), text)

    def _cell(self, path: tuple[int, ...]) -> str:
        return re.sub(r"\s+", " ", self._text(path)).replace("|", "\\|")

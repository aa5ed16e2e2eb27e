"""Server reflection, as grpcurl, ghz and evans use it: both versions, on both transports."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2
from latchkey_service.access.methods import METHODS

from tests.helpers.programs import GRPCURL, found, installed_by_go

if TYPE_CHECKING:
    from pathlib import Path

    import grpc

VERSIONS = ("v1", "v1alpha")
SECONDS = 30.0


async def ask(channel: grpc.aio.Channel, version: str, *requests: Any) -> list[Any]:
    """Send requests on one stream and return the answers."""
    method: Any = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    return [answer async for answer in method(iter(requests), timeout=10)]


def request(**asked: Any) -> Any:
    return reflection_pb2.ServerReflectionRequest(**asked)


def files_of(answer: Any) -> list[descriptor_pb2.FileDescriptorProto]:
    found_files = answer.file_descriptor_response.file_descriptor_proto
    return [descriptor_pb2.FileDescriptorProto.FromString(data) for data in found_files]


@pytest.mark.parametrize("version", VERSIONS)
async def test_every_served_service_and_method_is_found(
    channel: grpc.aio.Channel, version: str
) -> None:
    """The listed services are exactly those that are served. The name of each of their methods,
    with and without a leading dot, leads to a file that loads with the files beside it."""
    (answer,) = await ask(channel, version, request(list_services=""))
    served = {path.split("/")[1] for path in METHODS}
    assert {service.name for service in answer.list_services_response.service} == served
    symbols = [path.strip("/").replace("/", ".") for path in METHODS]
    symbols += [f".{symbol}" for symbol in symbols]
    answers = await ask(channel, version, *(request(file_containing_symbol=s) for s in symbols))
    for symbol, answer in zip(symbols, answers, strict=True):
        assert answer.original_request.file_containing_symbol == symbol
        pool = descriptor_pool.DescriptorPool()
        for file in reversed(files_of(answer)):
            pool.Add(file)
        pool.FindMethodByName(symbol.removeprefix("."))


@pytest.mark.parametrize(
    "symbol",
    [
        "latchkey.v1.Token.hint",
        "latchkey.v1.CreateRequest.expiry",
        "latchkey.v1.Token.LabelsEntry",
        "latchkey.v1.Scope.SCOPE_READ",
        "latchkey.v1.SCOPE_READ",
        "google.rpc.BadRequest.FieldViolation",
        "google.protobuf.Timestamp",
    ],
)
async def test_symbols_of_every_kind_are_found(channel: grpc.aio.Channel, symbol: str) -> None:
    """Fields, oneofs, nested messages, values of enums and the types of error details are found."""
    (answer,) = await ask(channel, "v1", request(file_containing_symbol=symbol))
    assert files_of(answer), answer


async def test_files_have_comments(channel: grpc.aio.Channel) -> None:
    """The contract's comments come with its files."""
    (answer,) = await ask(
        channel, "v1", request(file_by_filename="latchkey/v1/token_service.proto")
    )
    comments = [c.leading_comments for c in files_of(answer)[0].source_code_info.location]
    assert any("Creates a token and returns its secret" in comment for comment in comments)


async def test_unknown_names_are_answers(channel: grpc.aio.Channel) -> None:
    """Whatever does not exist is NOT_FOUND within the stream, which then continues."""
    extension = {"containing_type": "latchkey.v1.Token", "extension_number": 7}
    answers = await ask(
        channel,
        "v1",
        request(file_containing_symbol="latchkey.v1.Nope"),
        request(file_containing_symbol=""),
        request(file_by_filename="nope.proto"),
        request(file_containing_extension=extension),
        request(all_extension_numbers_of_type="latchkey.v1.Nope"),
        request(),
        request(all_extension_numbers_of_type="latchkey.v1.Token"),
    )
    assert [a.error_response.error_code for a in answers] == [5, 5, 5, 5, 5, 3, 0]
    assert answers[-1].all_extension_numbers_response.base_type_name == "latchkey.v1.Token"


async def run(*command: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    async with asyncio.timeout(SECONDS):
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def test_grpcurl_describes_everything(address: str) -> None:
    """The real grpcurl describes a method and a field, with comments."""
    grpcurl = str(installed_by_go("grpcurl", GRPCURL))
    for symbol, words in (
        ("latchkey.v1.TokenService.Delete", "rpc Delete"),
        ("latchkey.v1.Token.hint", "string hint"),
        ("latchkey.v1.TokenService", "// Creates a token and returns its secret"),
    ):
        code, output = await run(grpcurl, "-plaintext", address, "describe", symbol)
        assert code == 0, output
        assert words in output


async def test_grpcurl_reads_error_details_from_the_descriptor_set(
    address: str, tmp_path: Path
) -> None:
    """`latchkey proto` writes a descriptor set with which grpcurl calls the service without
    reflection, and prints the details of errors."""
    grpcurl = str(installed_by_go("grpcurl", GRPCURL))
    file = tmp_path / "latchkey.binpb"
    with file.open("wb") as out:
        command = (f"{sys.prefix}/bin/latchkey", "proto")
        process = await asyncio.create_subprocess_exec(*command, stdout=out)
        async with asyncio.timeout(SECONDS):
            assert await process.wait() == 0
    code, output = await run(
        *(grpcurl, "-plaintext", "-use-reflection=false", "-protoset", str(file)),
        *("-format-error", "-d", '{"account_id": "acme"}'),
        *(address, "latchkey.v1.TokenService/Create"),
    )
    assert code != 0
    details = json.loads(output)["details"]
    assert [d["@type"].rpartition(".")[2] for d in details] == [
        "ErrorInfo",
        "RequestInfo",
        "BadRequest",
    ]
    assert {violation["field"] for violation in details[2]["fieldViolations"]} >= {"name"}


async def test_ghz_calls_a_method(address: str) -> None:
    """The real ghz finds a method by reflection and calls it."""
    ghz = found("ghz")
    if ghz is None:
        pytest.skip("ghz is not here")
    code, output = await run(
        *(str(ghz), "--insecure", "--call", "latchkey.v1.TokenService.Verify", "-n", "20"),
        *("-c", "2", "-d", '{"secret": "no secret"}', address),
    )
    assert code == 0, output
    assert "[OK]" in output

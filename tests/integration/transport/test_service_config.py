"""The documented service configs, with plain gRPC stubs."""

import asyncio
import json
from typing import Any

import grpc
from google.protobuf.descriptor import FileDescriptor
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.errors import StoreUnavailable, status_of
from latchkey_service.settings.settings import Settings

from tests.helpers.calls import CHANNEL_OPTIONS, outcome
from tests.helpers.repository import ROOT
from tests.helpers.servers import serving
from tests.helpers.waiting import WAIT_SECONDS

DIRECT, BALANCED = "service-config.json", "service-config-balancer.json"
PUSHBACK_MS = 400
QUESTION = pb.VerifyRequest(secret="x")


def options(file: str, *more: tuple[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The channel options that docs/deploy.md describes."""
    text = (ROOT / "docs" / file).read_text()
    return (*CHANNEL_OPTIONS, ("grpc.service_config", text), *more)


def test_the_configs_differ_only_in_health_checking() -> None:
    """Behind a balancer, clients retry the same calls in the same way."""
    direct, balanced = (json.loads((ROOT / "docs" / f).read_text()) for f in (DIRECT, BALANCED))
    assert direct.pop("healthCheckConfig") == {"serviceName": ""}
    assert direct == balanced


def test_the_configs_retry_only_methods_of_the_contract_that_create_nothing() -> None:
    """Each named method exists, and none of them issues a secret."""
    (methods,) = json.loads((ROOT / "docs" / DIRECT).read_text())["methodConfig"]
    file: FileDescriptor = pb.DESCRIPTOR
    for name in methods["name"]:
        service = file.services_by_name[name["service"].removeprefix(f"{file.package}.")]
        assert name["method"] in service.methods_by_name
        assert name["method"] not in {"Create", "Rotate", "Import"}


class _Failing(pb_grpc.TokenServiceServicer):
    """Rejects the first verify as the service does, and answers the next one."""

    def __init__(self) -> None:
        self.at: list[float] = []

    async def Verify(self, _request: Any, context: Any) -> pb.VerifyResponse:  # noqa: N802 - gRPC's
        self.at.append(asyncio.get_running_loop().time())
        if len(self.at) == 1:
            error = StoreUnavailable()
            error.retry_seconds = PUSHBACK_MS / 1_000
            status = status_of(error, "a")
            context.set_trailing_metadata(status.trailing_metadata)
            await context.abort(status.code, status.message)
        return pb.VerifyResponse(verdict=pb.VERDICT_VALID)


async def test_grpc_waits_for_the_delay_that_the_service_asks_for() -> None:
    """A retry by gRPC itself waits for `grpc-retry-pushback-ms`, eight times its first
    backoff."""
    server, failing = grpc.aio.server(), _Failing()
    pb_grpc.add_TokenServiceServicer_to_server(failing, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=options(BALANCED)
        ) as channel:
            stub = pb_grpc.TokenServiceStub(channel)
            assert (await stub.Verify(QUESTION, timeout=WAIT_SECONDS)).verdict == pb.VERDICT_VALID
    finally:
        await server.stop(0)
    first, second = failing.at
    assert second - first >= PUSHBACK_MS / 1_000 - 0.01


async def test_a_list_of_addresses_works_with_the_documented_option(
    settings: Settings, transport: str
) -> None:
    """Plain stubs reach both transports at several addresses, with any host name as authority.

    `native` rejects the list itself as a host name, as the documentation says."""
    async with serving(settings) as first, serving(settings) as second:
        target = f"ipv4:{first},{second}"
        named = options(DIRECT, ("grpc.default_authority", "latchkey"))
        async with grpc.aio.insecure_channel(target, options=named) as channel:
            stub = pb_grpc.TokenServiceStub(channel)
            for _ in range(4):
                assert (await outcome(stub.Verify(QUESTION, timeout=WAIT_SECONDS))).ok
        async with grpc.aio.insecure_channel(target, options=options(DIRECT)) as channel:
            end = await outcome(pb_grpc.TokenServiceStub(channel).Verify(QUESTION, timeout=5))
            assert end.ok == (transport == "grpcio")

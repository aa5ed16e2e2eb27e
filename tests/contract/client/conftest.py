"""A scripted Latchkey behind real gRPC, with errors, delays, invalid answers and silence."""

import asyncio
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import latchkey
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import status_pb2
from latchkey_proto.v1 import maintenance_service_pb2 as maintenance_pb
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.client.fake_watch import FakeWatch, mark_of
from tests.helpers.waiting import WAIT_SECONDS

Answer = Callable[[Any, Any], Awaitable[Message]]

# With a valid checksum, so that it passes the offline check.
SECRET = "lk" + "_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmno" + "0jDM4R"


@dataclass
class Call:
    """One call as received by the server."""

    rpc: str
    request: Any
    seconds_left: float | None
    metadata: dict[str, str]
    at: float


@dataclass
class FakeLatchkey:
    """Answers each RPC with the next entry of its script. The last entry repeats."""

    target: str = ""
    calls: list[Call] = field(default_factory=list)
    scripts: dict[str, list[Answer]] = field(default_factory=lambda: defaultdict(list))
    called: asyncio.Event = field(default_factory=asyncio.Event)
    server: grpc.aio.Server | None = None
    watch: FakeWatch | None = None
    """None: Watch is not implemented, as on an old server."""

    def on(self, rpc: str, *answers: Answer) -> None:
        self.scripts[rpc] = list(answers)

    def count(self, rpc: str) -> int:
        return sum(call.rpc == rpc for call in self.calls)

    async def serve(self, rpc: str, request: Any, context: Any) -> Message:
        self.calls.append(
            Call(
                rpc,
                request,
                context.time_remaining(),
                dict(context.invocation_metadata()),
                asyncio.get_running_loop().time(),
            )
        )
        self.called.set()
        script = self.scripts[rpc]
        answer = script.pop(0) if len(script) > 1 else script[0]
        return await answer(request, context)

    async def start(self, address: str) -> None:
        # Without SO_REUSEPORT, so that a second server cannot silently share the port.
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        service = pb.DESCRIPTOR.services_by_name["TokenService"]
        handlers: dict[str, Any] = {
            method.name: grpc.unary_unary_rpc_method_handler(
                partial(self.serve, method.name),
                getattr(pb, method.input_type.name).FromString,
                lambda message: message.SerializeToString(),
            )
            for method in service.methods
            if not (method.client_streaming or method.server_streaming)
        }
        others: list[tuple[Any, str]] = [
            (status_pb, "StatusService"),
            (maintenance_pb, "MaintenanceService"),
        ]
        for module, name in others:
            other = module.DESCRIPTOR.services_by_name[name]
            its_handlers: dict[str, Any] = {
                method.name: grpc.unary_unary_rpc_method_handler(
                    partial(self.serve, method.name),
                    getattr(module, method.input_type.name).FromString,
                    lambda message: message.SerializeToString(),
                )
                for method in other.methods
            }
            self.server.add_generic_rpc_handlers(
                [grpc.method_handlers_generic_handler(other.full_name, its_handlers)]
            )
        if self.watch is not None:
            handlers["Watch"] = grpc.stream_stream_rpc_method_handler(
                self.watch.serve,
                pb.WatchRequest.FromString,
                lambda message: message.SerializeToString(),
            )
        self.server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(service.full_name, handlers)]
        )
        port = self.server.add_insecure_port(address)
        self.target = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(None)
            self.server = None

    # Answers as methods, so that tests need no further imports.

    @staticmethod
    def says(message: Message) -> Answer:
        async def answer(_request: Any, _context: Any) -> Message:
            return message

        return answer

    @staticmethod
    def fails(code: grpc.StatusCode, text: str = "scripted", *details: Message) -> Answer:
        async def answer(_request: Any, context: Any) -> Message:
            status = status_pb2.Status(code=code.value[0], message=text)
            for detail in details:
                packed = AnyMessage()
                packed.Pack(detail)
                status.details.append(packed)
            trailing = (("grpc-status-details-bin", status.SerializeToString()),)
            await context.abort(code, text, trailing)
            raise AssertionError

        return answer

    @staticmethod
    def hangs() -> Answer:
        async def answer(_request: Any, _context: Any) -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        return answer

    def verdict(self, verdict: int, *, token: bool = True) -> Answer:
        message = pb.VerifyResponse(revision=7, mark=mark_of(7))
        # Bypass the enum's type, since a newer server may send any number.
        message.verdict = verdict  # type: ignore[assignment]
        if token:
            message.token.CopyFrom(self.token())
        return self.says(message)

    def judge(self, verdict: int) -> None:
        """Answer every verify, single or in a batch, with `verdict` for the token t1."""
        message = pb.VerifyResponse(revision=7, mark=mark_of(7), token=self.token())
        message.verdict = verdict  # type: ignore[assignment]  # as above

        async def batch(request: Any, _context: Any) -> Message:
            return pb.BatchVerifyResponse(responses=[message] * len(request.requests))

        self.on("Verify", self.says(message))
        self.on("BatchVerify", batch)

    @staticmethod
    def token(token_id: str = "t1", **fields: Any) -> pb.Token:  # noqa: S107 - no password
        token = pb.Token(
            id=token_id,
            account_id="acme",
            name="ci",
            scope=pb.SCOPE_READ,
            hint="lk_…DM4R",
            **fields,
        )
        token.create_time.FromJsonString("2026-01-02T03:04:05.678901Z")
        return token


@pytest.fixture
def secret() -> str:
    """Return a well-formed secret, which only the service can judge."""
    return SECRET


@pytest.fixture
async def fake() -> AsyncIterator[FakeLatchkey]:
    """Serve a scripted Latchkey on its own loopback port."""
    server = FakeLatchkey()
    await server.start("127.0.0.1:0")
    yield server
    await server.stop()


@pytest.fixture
def watch() -> FakeWatch:
    """The script for the Watch streams of `watched`."""
    return FakeWatch()


@pytest.fixture
async def watched(watch: FakeWatch) -> AsyncIterator[FakeLatchkey]:
    """Serve a scripted Latchkey that supports Watch."""
    server = FakeLatchkey(watch=watch)
    await server.start("127.0.0.1:0")
    yield server
    watch.let_go()
    await server.stop()


@pytest.fixture
async def client(fake: FakeLatchkey) -> AsyncIterator[latchkey.Client]:
    """Connect to the scripted Latchkey, with timeouts for a busy machine."""
    async with latchkey.Client(fake.target, timeout_seconds=WAIT_SECONDS) as connected:
        yield connected


@pytest.fixture
async def verifier(fake: FakeLatchkey) -> AsyncIterator[latchkey.Verifier]:
    """Verify with the scripted Latchkey, with timeouts for a busy machine."""
    async with latchkey.Verifier(fake.target, timeout_seconds=WAIT_SECONDS) as connected:
        yield connected


@pytest.fixture
async def dead_target() -> AsyncIterator[str]:
    """Return an address that refuses connections while the test runs."""
    # Bound but not listening, so that no other process takes the port.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
async def silent_target() -> AsyncIterator[str]:
    """Return an address that accepts connections and never answers."""

    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass
        writer.close()

    server = await asyncio.start_server(ignore, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await server.wait_closed()


@pytest.fixture
def patient_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a busy server enough time to receive the release of a lease."""
    monkeypatch.setattr("latchkey._watch.RELEASE_SECONDS", WAIT_SECONDS)


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the delays between attempts, but not their number."""
    monkeypatch.setattr("latchkey._retry.BACKOFF_FIRST_SECONDS", 0.001)

"""The client library during failures: deadlines, retries, closing, and secrecy."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
import uuid
from typing import TYPE_CHECKING, Any

import grpc
import latchkey
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from latchkey import Scope, _retry
from latchkey_proto.v1 import maintenance_service_pb2 as maintenance_pb
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.waiting import WAIT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from google.protobuf.message import Message

    from tests.contract.client.conftest import FakeLatchkey

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
IMPORTED = latchkey.ImportedToken(
    account_id="acme", name="ci", scope=Scope.READ, secret_sha256=bytes(32)
)

METHODS: dict[str, Callable[..., Awaitable[object]]] = {
    "Create": lambda c, **kw: c.create("acme", "ci", Scope.READ, **kw),
    "Get": lambda c, **kw: c.get("acme", "t1", **kw),
    "GetUsage": lambda c, **kw: c.get_usage("acme", "t1", **kw),
    "Import": lambda c, **kw: c.import_tokens([IMPORTED], **kw),
    "GetLimits": lambda c, **kw: c.get_limits("acme", **kw),
    "List": lambda c, **kw: c.list_page("acme", **kw),
    "Delete": lambda c, **kw: c.delete("acme", "t1", **kw),
    "Update": lambda c, **kw: c.update("acme", "t1", name="x", **kw),
    "Disable": lambda c, **kw: c.disable("acme", "t1", **kw),
    "Enable": lambda c, **kw: c.enable("acme", "t1", **kw),
    "Rotate": lambda c, **kw: c.rotate("acme", "t1", **kw),
    "RetireSecrets": lambda c, **kw: c.retire_secrets("acme", "t1", **kw),
    "RevokeSecret": lambda c, **kw: c.revoke_secrets(["x"], **kw),
    "ReportSecret": lambda c, **kw: c.report_secrets(["x"], **kw),
    "DeleteAll": lambda c, **kw: c.delete_all("acme", **kw),
    "Verify": lambda c, **kw: c.verify("x", **kw),
    "BatchVerify": lambda c, **kw: c.batch_verify([("x", None)], **kw),
    "Find": lambda c, **kw: c.find(hint="3kF9", **kw),
    "GetStatus": lambda c, **kw: c.status(**kw),
    "InvalidateAll": lambda c, **kw: c.invalidate_all(**kw),
}
ANSWERS: dict[str, Message] = {
    "Create": pb.CreateResponse(),
    "Get": pb.GetResponse(),
    "GetUsage": pb.GetUsageResponse(),
    "GetLimits": pb.GetLimitsResponse(),
    "Find": pb.FindResponse(),
    "Import": pb.ImportResponse(results=[pb.ImportResult()]),
    "List": pb.ListResponse(),
    "Delete": pb.DeleteResponse(),
    "Update": pb.UpdateResponse(),
    "Disable": pb.DisableResponse(),
    "Enable": pb.EnableResponse(),
    "Rotate": pb.RotateResponse(),
    "RetireSecrets": pb.RetireSecretsResponse(),
    "RevokeSecret": pb.RevokeSecretResponse(results=[pb.RevokeSecretResult()]),
    "ReportSecret": pb.ReportSecretResponse(results=[pb.ReportSecretResult()]),
    "DeleteAll": pb.DeleteAllResponse(),
    "Verify": pb.VerifyResponse(verdict=pb.VERDICT_UNKNOWN),
    "BatchVerify": pb.BatchVerifyResponse(responses=[pb.VerifyResponse()]),
    "GetStatus": status_pb.GetStatusResponse(),
    "InvalidateAll": maintenance_pb.InvalidateAllResponse(),
}
every_rpc = pytest.mark.parametrize("rpc", METHODS)


@every_rpc
async def test_every_call_has_a_deadline(
    fake: FakeLatchkey, rpc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server sees the deadline of the method, of the client, or of the call."""
    fake.on(rpc, fake.says(ANSWERS[rpc]))
    assert 0 < _retry.TIMEOUTS_SECONDS[rpc] <= 10
    # Verify's default is one second, which a busy machine may exceed.
    default = _retry.TIMEOUTS_SECONDS[rpc] + 10
    monkeypatch.setattr(_retry, "TIMEOUTS_SECONDS", {rpc: default})
    async with latchkey.Client(fake.target) as client:
        await METHODS[rpc](client)
        await METHODS[rpc](client, timeout_seconds=77.0)
    async with latchkey.Client(fake.target, timeout_seconds=33.0) as client:
        await METHODS[rpc](client)
        await METHODS[rpc](client, timeout_seconds=77.0)
    for call, expected in zip(fake.calls, (default, 77.0, 33.0, 77.0), strict=True):
        assert call.seconds_left is not None
        # Tolerates a busy machine, but still distinguishes the deadlines.
        assert max(0.0, expected - 3) < call.seconds_left <= expected + 0.1


@every_rpc
async def test_a_hung_server_ends_with_the_deadline(
    client: latchkey.Client, fake: FakeLatchkey, rpc: str
) -> None:
    """Silence raises DeadlineExceeded after one attempt and about the allowed time."""
    fake.on(rpc, fake.hangs())
    started = time.monotonic()
    with pytest.raises(latchkey.DeadlineExceeded) as caught:
        await METHODS[rpc](client, timeout_seconds=0.1)
    assert time.monotonic() - started < 2
    assert fake.count(rpc) <= 1  # 0 if the machine is too busy to connect in time
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


@every_rpc
@pytest.mark.usefixtures("quick_retries")
async def test_every_method_is_retried(
    client: latchkey.Client, fake: FakeLatchkey, rpc: str
) -> None:
    """After UNAVAILABLE each method makes five attempts with the same request."""
    fake.on(rpc, fake.fails(UNAVAILABLE))
    with pytest.raises(latchkey.Unavailable) as caught:
        await METHODS[rpc](client)
    assert fake.count(rpc) == _retry.ATTEMPTS_MAX
    assert all(call.request == fake.calls[0].request for call in fake.calls)
    assert not caught.value.unsent


@pytest.mark.parametrize("rpc", ["Create", "Rotate"])
@pytest.mark.usefixtures("quick_retries")
async def test_each_call_has_one_request_id(
    client: latchkey.Client, fake: FakeLatchkey, rpc: str
) -> None:
    """All attempts of a call carry the same UUID, and each call another one. A caller that wants to
    try again later can give its own."""
    fake.on(rpc, fake.fails(UNAVAILABLE), fake.says(ANSWERS[rpc]))
    own = uuid.uuid4()
    await METHODS[rpc](client)
    await METHODS[rpc](client)
    await METHODS[rpc](client, request_id=own)
    first, retry, second, third = [call.request.request_id for call in fake.calls]
    assert first == retry != second
    assert str(uuid.UUID(first)) == first
    assert third == str(own)


async def test_a_transient_failure_is_hidden(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """A failure is retried if the service requests it, and not before the requested delay."""
    wait = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=300_000_000))
    fake.on("Get", fake.fails(UNAVAILABLE, "busy", wait), fake.says(ANSWERS["Get"]))
    # gRPC sends longer deadlines in whole seconds.
    await client.get("acme", "t1", timeout_seconds=5)
    first, second = fake.calls
    assert second.at - first.at >= 0.3
    assert first.seconds_left is not None
    assert second.seconds_left is not None
    assert second.seconds_left < first.seconds_left - 0.05  # both share one deadline


async def test_a_refused_connection_is_unavailable(dead_target: str) -> None:
    """It raises Unavailable long before the deadline."""
    async with latchkey.Client(dead_target) as client:
        started = time.monotonic()
        with pytest.raises(latchkey.Unavailable) as caught:
            await client.get("acme", "t1", timeout_seconds=60)
        assert time.monotonic() - started < 30
    assert type(caught.value) is latchkey.Unavailable
    assert caught.value.unsent


async def test_a_restarted_service_is_found(fake: FakeLatchkey, tmp_path: Path) -> None:
    """The same client reconnects to a restarted service without a long backoff."""
    fake.on("Get", fake.says(ANSWERS["Get"]))
    # A UNIX socket, because another process could take the port in between.
    address = f"unix:{tmp_path}/s"
    await fake.stop()
    await fake.start(address)
    async with latchkey.Client(address) as client:
        await client.get("acme", "t1")
        await fake.stop()
        with pytest.raises(latchkey.Unavailable):
            await client.get("acme", "t1")
        await fake.start(address)
        end = time.monotonic() + 10
        while True:
            try:
                await client.get("acme", "t1")
                break
            except latchkey.Unavailable:
                assert time.monotonic() < end


async def test_an_unreadable_answer_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    """Bytes that are not a message raise InternalError instead of an empty answer."""

    async def garbage(_request: bytes, _context: Any) -> bytes:
        return b"\xff\xff\xff"

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handlers: dict[str, Any] = {"Verify": grpc.unary_unary_rpc_method_handler(garbage)}
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("latchkey.v1.TokenService", handlers)]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with latchkey.Client(f"127.0.0.1:{port}", timeout_seconds=WAIT_SECONDS) as client:
            with pytest.raises(latchkey.InternalError):
                await client.verify("x")
            with pytest.raises(latchkey.UnexpectedStatus) as caught:
                await client.get("acme", "t1")
    finally:
        await server.stop(None)
    assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED
    assert "Check that the target is Latchkey" in str(caught.value)
    assert caplog.records  # written by grpc


async def test_cancellation_passes_through(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """Cancelling a task cancels its call, or the delay between two attempts."""
    for answer in (
        fake.hangs(),
        fake.fails(UNAVAILABLE, "x", error_details_pb2.RetryInfo(retry_delay=Duration(seconds=20))),
    ):
        fake.on("Get", answer)
        fake.called.clear()
        task = asyncio.create_task(client.get("acme", "t1", timeout_seconds=60))
        await fake.called.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_closing_ends_calls_with_an_error(
    fake: FakeLatchkey, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that waits for a call of a closed client gets an error at once, not a cancellation."""
    caplog.set_level(logging.DEBUG, "latchkey")
    fake.on("Get", fake.hangs())
    client = latchkey.Client(fake.target)
    task = asyncio.create_task(client.get("acme", "t1", timeout_seconds=60))
    await fake.called.wait()
    await client.close()
    await client.close()
    with pytest.raises(latchkey.Unavailable, match="closed"):
        await task
    with pytest.raises(latchkey.Unavailable, match="closed"):
        await client.get("acme", "t1")
    assert "retry in" not in caplog.text


async def test_a_supplied_channel_that_was_closed(
    fake: FakeLatchkey, caplog: pytest.LogCaptureFixture
) -> None:
    """A channel that its owner closed raises Unavailable at once, like a closed client."""
    caplog.set_level(logging.DEBUG, "latchkey")
    channel = grpc.aio.insecure_channel(fake.target)
    client = latchkey.Client(channel=channel)
    await channel.close()
    with pytest.raises(latchkey.Unavailable, match="closed"):
        await client.get("acme", "t1")
    assert "retry in" not in caplog.text


@pytest.mark.usefixtures("quick_retries")
async def test_a_secret_is_never_logged(
    fake: FakeLatchkey, secret: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After any failure, even of a server that echoes, no log or traceback has the secret."""
    caplog.set_level(logging.DEBUG)
    violation = error_details_pb2.BadRequest.FieldViolation(field="secret", description=secret)
    shown = ""
    async with latchkey.Verifier(fake.target, timeout_seconds=WAIT_SECONDS) as verifier:
        for answer in (
            fake.fails(UNAVAILABLE, f"cannot verify {secret}"),
            fake.fails(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"bad secret {secret!r}",
                error_details_pb2.BadRequest(field_violations=[violation]),
            ),
            fake.fails(grpc.StatusCode.UNKNOWN, f"Exception: {secret}"),
            None,
        ):
            fake.on("Verify", answer or fake.hangs())
            # Only the hung server uses the whole timeout.
            seconds = WAIT_SECONDS if answer else 0.5
            with pytest.raises(latchkey.LatchkeyError) as caught:
                await verifier.verify(secret, Scope.READ, timeout_seconds=seconds)
            shown += "".join(traceback.format_exception(caught.value))
            shown += repr(caught.value) + repr(vars(caught.value))
    assert fake.count("Verify") >= 3
    assert "Verify" in caplog.text
    # Search for the random part, in case the text was cut.
    for piece in (secret, secret[3:30], secret[20:46]):
        assert piece not in shown
        assert piece not in caplog.text

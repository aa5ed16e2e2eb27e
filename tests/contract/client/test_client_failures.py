"""The client library when things go wrong: deadlines, retries, closing, and what is never said."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import traceback
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

from tests.support import WAIT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from google.protobuf.message import Message

    from tests.contract.client.conftest import FakeLatchkey

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

METHODS: dict[str, Callable[..., Awaitable[object]]] = {
    "Create": lambda c, **kw: c.create("acme", "ci", Scope.READ, **kw),
    "Get": lambda c, **kw: c.get("acme", "t1", **kw),
    "List": lambda c, **kw: c.list_page("acme", **kw),
    "Delete": lambda c, **kw: c.delete("acme", "t1", **kw),
    "Verify": lambda c, **kw: c.verify("x", **kw),
    "BatchVerify": lambda c, **kw: c.batch_verify([("x", None)], **kw),
    "GetStatus": lambda c, **kw: c.status(**kw),
    "InvalidateAll": lambda c, **kw: c.invalidate_all(**kw),
}
ANSWERS: dict[str, Message] = {
    "Create": pb.CreateResponse(),
    "Get": pb.GetResponse(),
    "List": pb.ListResponse(),
    "Delete": pb.DeleteResponse(),
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
    """The method's default, the client's, or the call's own deadline reaches the server."""
    fake.on(rpc, fake.says(ANSWERS[rpc]))
    policy = _retry.POLICIES[rpc]
    assert 0 < policy.timeout_seconds <= 10
    # A verify's default is a second, which a busy machine may take.
    default = policy.timeout_seconds + 10
    policies = {rpc: dataclasses.replace(policy, timeout_seconds=default)}
    monkeypatch.setattr(_retry, "POLICIES", policies)
    async with latchkey.Client(fake.target) as client:
        await METHODS[rpc](client)
        await METHODS[rpc](client, timeout_seconds=77.0)
    async with latchkey.Client(fake.target, timeout_seconds=33.0) as client:
        await METHODS[rpc](client)
        await METHODS[rpc](client, timeout_seconds=77.0)
    for call, expected in zip(fake.calls, (default, 77.0, 33.0, 77.0), strict=True):
        assert call.seconds_left is not None
        # Room for a busy machine, and still none to mistake one deadline for another.
        assert max(0.0, expected - 3) < call.seconds_left <= expected + 0.1


@every_rpc
async def test_a_server_that_hangs_ends_with_the_deadline(
    client: latchkey.Client, fake: FakeLatchkey, rpc: str
) -> None:
    """Silence ends in DeadlineExceeded, after one attempt and about the time allowed."""
    fake.on(rpc, fake.hangs())
    started = time.monotonic()
    with pytest.raises(latchkey.DeadlineExceeded) as caught:
        await METHODS[rpc](client, timeout_seconds=0.1)
    assert time.monotonic() - started < 2
    assert fake.count(rpc) <= 1  # 0 when the machine is too busy to connect in time
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


@every_rpc
@pytest.mark.usefixtures("quick_retries")
async def test_only_safe_methods_are_tried_again(
    client: latchkey.Client, fake: FakeLatchkey, rpc: str
) -> None:
    """UNAVAILABLE costs a safe method five attempts, and Create exactly one."""
    fake.on(rpc, fake.fails(UNAVAILABLE))
    with pytest.raises(latchkey.Unavailable):
        await METHODS[rpc](client)
    assert fake.count(rpc) == (1 if rpc == "Create" else _retry.ATTEMPTS_MAX)


@every_rpc
@pytest.mark.parametrize(
    "code",
    [code for code in grpc.StatusCode if code not in (grpc.StatusCode.OK, UNAVAILABLE)],
)
async def test_other_failures_are_final(
    client: latchkey.Client, fake: FakeLatchkey, rpc: str, code: grpc.StatusCode
) -> None:
    """No status but UNAVAILABLE is tried again, unless the server says when."""
    fake.on(rpc, fake.fails(code))
    with pytest.raises(latchkey.LatchkeyError) as caught:
        await METHODS[rpc](client)
    assert caught.value.code is code
    assert fake.count(rpc) == 1


@every_rpc
async def test_what_is_refused_for_load_is_tried_again(
    client: latchkey.Client, fake: FakeLatchkey, rpc: str
) -> None:
    """A refusal that says when goes unnoticed, with every method: nothing was begun."""
    wait = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=50_000_000))
    refusal = fake.fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much", wait)
    fake.on(rpc, refusal, fake.says(ANSWERS[rpc]))
    await METHODS[rpc](client)
    first, second = fake.calls
    assert second.at - first.at >= 0.05


async def test_a_passing_failure_goes_unnoticed(
    client: latchkey.Client, fake: FakeLatchkey
) -> None:
    """A call outlives a failure that the service asks to be retried, and not before it asks."""
    wait = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=300_000_000))
    fake.on("Get", fake.fails(UNAVAILABLE, "busy", wait), fake.says(ANSWERS["Get"]))
    # A longer deadline is told in whole seconds.
    await client.get("acme", "t1", timeout_seconds=5)
    first, second = fake.calls
    assert second.at - first.at >= 0.3
    assert first.seconds_left is not None
    assert second.seconds_left is not None
    assert second.seconds_left < first.seconds_left - 0.05  # one deadline for both


async def test_no_waiting_past_the_deadline(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """When the service asks for more time than is left, its own words are raised, at once."""
    wait = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=60))
    fake.on("Get", fake.fails(UNAVAILABLE, "database is away", wait))
    started = time.monotonic()
    with pytest.raises(latchkey.Unavailable, match="database is away") as caught:
        await client.get("acme", "t1", timeout_seconds=30)
    assert time.monotonic() - started < 5
    assert caught.value.retry_after is not None
    assert caught.value.retry_after.total_seconds() == 60
    assert fake.count("Get") == 1


async def test_nobody_listening(dead_target: str) -> None:
    """A refused connection is Unavailable, long before the deadline."""
    async with latchkey.Client(dead_target) as client:
        started = time.monotonic()
        with pytest.raises(latchkey.Unavailable) as caught:
            await client.get("acme", "t1", timeout_seconds=60)
        assert time.monotonic() - started < 30
    assert type(caught.value) is latchkey.Unavailable


async def test_nobody_answering(silent_target: str) -> None:
    """A peer that accepts the connection and says nothing costs no more than the deadline."""
    async with latchkey.Client(silent_target) as client:
        with pytest.raises(latchkey.Unavailable):
            await client.get("acme", "t1", timeout_seconds=0.2)


async def test_service_back_after_a_restart(fake: FakeLatchkey, tmp_path: Path) -> None:
    """The same client finds a service that was away, without waiting out a long backoff."""
    fake.on("Get", fake.says(ANSWERS["Get"]))
    # A socket of its own: a port could be somebody else's when it is needed again.
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


async def test_an_answer_that_cannot_be_read(caplog: pytest.LogCaptureFixture) -> None:
    """Bytes that are no message end in InternalError, not in an empty answer."""

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
    assert caplog.records  # grpc's own


async def test_cancellation_passes_through(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """A cancelled task is cancelled, also in the middle of a call or of a delay."""
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


async def test_closing_ends_calls_with_an_error_and_not_with_a_cancellation(
    fake: FakeLatchkey, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever waits for a call of a client that is closed gets an exception, and at once."""
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
    assert "next one in" not in caplog.text


async def test_a_given_channel_that_was_closed(
    fake: FakeLatchkey, caplog: pytest.LogCaptureFixture
) -> None:
    """A channel that its owner closed is Unavailable like a closed client, and not waited for."""
    caplog.set_level(logging.DEBUG, "latchkey")
    channel = grpc.aio.insecure_channel(fake.target)
    client = latchkey.Client(channel=channel)
    await channel.close()
    with pytest.raises(latchkey.Unavailable, match="closed"):
        await client.get("acme", "t1")
    assert "next one in" not in caplog.text


@pytest.mark.usefixtures("quick_retries")
async def test_a_secret_is_never_said(
    fake: FakeLatchkey, secret: str, caplog: pytest.LogCaptureFixture
) -> None:
    """However a verify fails, even by a server that echoes, no log or traceback has the secret."""
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
            # Only silence takes all the time that there is.
            seconds = WAIT_SECONDS if answer else 0.5
            with pytest.raises(latchkey.LatchkeyError) as caught:
                await verifier.verify(secret, Scope.READ, timeout_seconds=seconds)
            shown += "".join(traceback.format_exception(caught.value))
            shown += repr(caught.value) + repr(vars(caught.value))
    assert fake.count("Verify") >= 3
    assert "Verify" in caplog.text
    # The random part, wherever it may be cut.
    for piece in (secret, secret[3:30], secret[20:46]):
        assert piece not in shown
        assert piece not in caplog.text

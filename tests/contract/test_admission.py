"""Admission under overload: which calls the process limits and the policy limits let through."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.access.methods import MANAGER, OPERATOR
from latchkey_service.postgres import connections, sessions
from latchkey_service.rpc import admission, managed_calls

from tests.helpers.callers import credential, policy_text
from tests.helpers.calls import is_serving, outcome
from tests.helpers.databases import backends, session
from tests.helpers.rich_status import refusal
from tests.helpers.servers import serving
from tests.helpers.waiting import eventually

if TYPE_CHECKING:
    from latchkey_service.settings.settings import Settings

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
# How the client (grpcio 1.75) reports a rejection that arrives while it is writing: the reason for
# the rejection is lost.
OVERTAKEN = "Internal error from Core"


async def test_calls_that_wait_for_the_database_are_bounded(
    settings: "Settings", monkeypatch: pytest.MonkeyPatch
) -> None:
    """While all slots are in use, the next call is rejected at once with RetryInfo. Verifies,
    operator calls and health checks are still answered, and the call in progress completes."""
    # In this test a lock keeps the call in progress, not load, so it must not count as stuck.
    monkeypatch.setattr(admission, "STUCK_SECONDS", 1_000.0)
    # These timeouts must not end the call before the test releases the lock.
    monkeypatch.setitem(sessions.SETTINGS, "lock_timeout", "60s")
    monkeypatch.setattr(connections, "STATEMENT_TIMEOUT_SECONDS", 60.0)
    monkeypatch.setattr(admission, "QUEUE_SECONDS_MAX", 60.0)
    monkeypatch.setattr(managed_calls, "CALL_SECONDS_MAX", 60.0)
    # One call in progress, and one in all.
    monkeypatch.setattr(managed_calls, "CONCURRENCY_LIMITS", {MANAGER: (1, 1), OPERATOR: (1, 1)})
    assert settings.database_url is not None
    url = settings.database_url.get_secret_value()
    async with serving(settings) as address, grpc.aio.insecure_channel(address) as channel:
        stub: Any = pb_grpc.TokenServiceStub(channel)
        status: Any = status_pb_grpc.StatusServiceStub(channel)
        await eventually(lambda: is_serving(channel), "health is up")
        created = await stub.Create(
            pb.CreateRequest(account_id="acme", name="a", scope=pb.SCOPE_READ)
        )
        async with session(url) as connection, connection.transaction():
            await connection.execute("SELECT FROM token FOR UPDATE")
            token = {"account_id": "acme", "id": created.token.id}
            deletion = asyncio.ensure_future(stub.Delete(pb.DeleteRequest(**token)))

            async def is_waiting() -> bool:
                return any(row["wait_event_type"] == "Lock" for row in await backends(url))

            await eventually(is_waiting, "the deletion is at work")
            error = await refusal(stub.List(pb.ListRequest(account_id="acme")))
            assert (error.code, error.reason) == (EXHAUSTED, "OVERLOADED")
            assert error.retry_seconds is not None
            assert 0.25 <= error.retry_seconds <= 0.5
            verified = await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)
            assert verified.verdict == pb.VERDICT_VALID
            assert await status.GetStatus(status_pb.GetStatusRequest(), timeout=5)
            assert await is_serving(channel)
            assert not deletion.done()
        assert (await deletion).receipt.revision
        assert (await outcome(stub.List(pb.ListRequest(account_id="acme")))).ok


@contextlib.asynccontextmanager
async def limited(
    settings: "Settings", tmp_path: Path, limits: dict[str, str]
) -> AsyncIterator[grpc.aio.Channel]:
    """Serve under the test policy with one extra line for each of these callers; yield a
    channel."""
    lines = policy_text()
    for caller, line in limits.items():
        lines = lines.replace(f"[callers.{caller}]\n", f"[callers.{caller}]\n{line}\n")
    policy = tmp_path / "policy.toml"
    policy.write_text(lines)
    settings = settings.model_copy(update={"policy": policy})
    async with serving(settings) as address, grpc.aio.insecure_channel(address) as channel:
        await eventually(lambda: is_serving(channel), "health is up")
        yield channel


def of(caller: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {credential(caller)}"),)


async def test_each_caller_has_its_own_rate(settings: "Settings", tmp_path: Path) -> None:
    """A caller above its rate is rejected, receives the time after which to retry, and is admitted
    then. Each question of a batch counts. Other callers and the methods of other roles are
    unaffected."""
    limits = {
        # The debt must last longer than a busy machine takes to make the calls that check it.
        "verifier": "rates = { verifier = 5 }",
        "acmes-verifier": "rates = { verifier = 2000 }",
        "manager": "rates = { manager = 2 }",
    }
    async with limited(settings, tmp_path, limits) as channel:
        stub: Any = pb_grpc.TokenServiceStub(channel)

        def verify(caller: str) -> Any:
            return stub.Verify(pb.VerifyRequest(secret="x"), metadata=of(caller))

        batch = pb.BatchVerifyRequest(requests=[pb.VerifyRequest(secret="x")] * 100)
        await stub.BatchVerify(batch, metadata=of("verifier"))
        error = await refusal(verify("verifier"))
        assert (error.code, error.reason) == (EXHAUSTED, "RATE_LIMITED")
        # A fifth of a second for each of the 96 questions above the limit, and up to twice as long,
        # minus the time that has passed meanwhile.
        assert error.retry_seconds is not None
        assert 5.0 < error.retry_seconds <= 2 * 19.2
        # A batch that is rejected for its size counts as much as the largest allowed batch.
        large = pb.BatchVerifyRequest(requests=[pb.VerifyRequest()] * 50_000)
        error = await refusal(stub.BatchVerify(large, metadata=of("acmes-verifier")))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        # Nothing is written, because the rejection might then be OVERTAKEN.
        watch = stub.Watch(metadata=of("verifier"))
        assert (await refusal(watch.read())).reason == "RATE_LIMITED"
        assert (await verify("acmes-verifier")).verdict == pb.VERDICT_MALFORMED

        async def listed(caller: str) -> Any:
            request = pb.ListRequest(account_id="acme")
            return await outcome(stub.List(request, metadata=of(caller)))

        ends = await asyncio.gather(*(listed("manager") for _ in range(8)))
        codes = Counter(end.code for end in ends)
        assert set(codes) == {grpc.StatusCode.OK, EXHAUSTED}
        assert codes[grpc.StatusCode.OK] >= 2
        assert (await listed("acmes-manager")).ok

        async def let_in_again() -> bool:
            return bool((await listed("manager")).ok)

        await eventually(let_in_again, "there is room again")


@pytest.mark.parametrize(
    ("method", "data"),
    [("BatchVerify", b""), ("BatchVerify", b"\x0a\x7f"), ("Verify", b"\xff"), ("Watch", b"\xff")],
)
async def test_invalid_requests_count_towards_the_rate(
    settings: "Settings", tmp_path: Path, method: str, data: bytes
) -> None:
    """Empty batches and undecodable messages cost time as well, so a caller that sends them above
    its rate is rejected."""
    async with limited(settings, tmp_path, {"verifier": "rates = { verifier = 1 }"}) as channel:
        path = f"/latchkey.v1.TokenService/{method}"

        async def send() -> grpc.StatusCode:
            if method == "Watch":
                stream: Any = channel.stream_stream(path)
                call: Any = stream(iter([data]), metadata=of("verifier"))
                while await call.details() == OVERTAKEN:
                    call = stream(iter([data]), metadata=of("verifier"))
                return (await refusal(call.read())).code
            unary: Any = channel.unary_unary(path)
            return (await refusal(unary(data, metadata=of("verifier")))).code

        codes = Counter(await asyncio.gather(*(send() for _ in range(30))))
        assert set(codes) <= {grpc.StatusCode.INVALID_ARGUMENT, EXHAUSTED}
        assert codes[EXHAUSTED] > 15


async def test_streams_per_caller_are_limited(settings: "Settings", tmp_path: Path) -> None:
    """A caller's Watch above its limit is rejected, another caller's is not, and a stream that ends
    frees its place."""
    async with limited(settings, tmp_path, {"verifier": "watches = 1"}) as channel:
        stub: Any = pb_grpc.TokenServiceStub(channel)

        async def watch() -> Any:
            """Open a stream and return it with its first grant."""
            call = stub.Watch(metadata=of("verifier"))
            await call.write(pb.WatchRequest(number=1))
            return call, await call.read()

        first, answer = await watch()
        assert answer is not grpc.aio.EOF
        # Nothing is written, for the same reason as above.
        error = await refusal(stub.Watch(metadata=of("verifier")).read())
        assert (error.code, error.reason) == (EXHAUSTED, "WATCHES_LIMITED")
        first.cancel()

        async def there_is_room() -> bool:
            call, answer = await watch()
            call.cancel()
            return answer is not grpc.aio.EOF

        await eventually(there_is_room, "the place of the first is free")

"""Who is let in when too much is asked: by the process's bounds, and by the policy's."""

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
from latchkey_service.rpc import admission, deadlines, interceptor

from tests.callers import credential, policy_text
from tests.conftest import serving
from tests.contract.rich_status import refusal
from tests.support import backends, eventually, is_serving, outcome, session

if TYPE_CHECKING:
    from latchkey_service.settings.settings import Settings

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
# What the client (grpcio 1.75) makes of a refusal that came while it was writing: how it was
# refused is lost.
OVERTAKEN = "Internal error from Core"


async def test_what_waits_for_the_database_is_bounded(
    settings: "Settings", monkeypatch: pytest.MonkeyPatch
) -> None:
    """While all places are taken the next call is refused at once with RetryInfo; verifies, the
    operator and health are answered as ever; and what was at work is done."""
    # Here it is not the load that keeps the one at work, but as long as that may be.
    monkeypatch.setattr(admission, "STUCK_SECONDS", 1_000.0)
    # And the test says how long that is.
    monkeypatch.setitem(sessions.SETTINGS, "lock_timeout", "60s")
    monkeypatch.setattr(connections, "STATEMENT_TIMEOUT_SECONDS", 60.0)
    monkeypatch.setattr(admission, "QUEUE_SECONDS_MAX", 60.0)
    monkeypatch.setattr(deadlines, "CALL_SECONDS_MAX", 60.0)
    # One at work, and there in all.
    monkeypatch.setattr(interceptor, "CONCURRENCY_LIMITS", {MANAGER: (1, 1), OPERATOR: (1, 1)})
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
    """Serve under a policy in which these callers have these further lines; yield a channel."""
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


async def test_a_caller_has_what_the_policy_gives_it(settings: "Settings", tmp_path: Path) -> None:
    """Past its rate a caller is refused, told when to come back, and let in then; each question
    of a batch counts; other callers and other roles' methods are not concerned."""
    limits = {
        # A debt that lasts longer than a busy machine takes for the calls that have to find it.
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
        # A fifth of a second for each of the 96 that were too many, and up to twice as long; less
        # what has passed meanwhile.
        assert error.retry_seconds is not None
        assert 5.0 < error.retry_seconds <= 2 * 19.2
        # One that is refused for its size counts as the largest that is answered, and no more.
        large = pb.BatchVerifyRequest(requests=[pb.VerifyRequest()] * 50_000)
        error = await refusal(stub.BatchVerify(large, metadata=of("acmes-verifier")))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        # Nothing is written, or the refusal might be OVERTAKEN.
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
async def test_what_is_no_question_counts_too(
    settings: "Settings", tmp_path: Path, method: str, data: bytes
) -> None:
    """Empty batches and what is no message take time as well: past its rate a caller is refused."""
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


async def test_a_caller_has_so_many_streams(settings: "Settings", tmp_path: Path) -> None:
    """One Watch too many is refused, another caller's is not, and one that ends makes room."""
    async with limited(settings, tmp_path, {"verifier": "watches = 1"}) as channel:
        stub: Any = pb_grpc.TokenServiceStub(channel)

        async def watch() -> Any:
            """Open a stream and return it with its first grant."""
            call = stub.Watch(metadata=of("verifier"))
            await call.write(pb.WatchRequest(number=1))
            return call, await call.read()

        first, answer = await watch()
        assert answer is not grpc.aio.EOF
        # Nothing is written, as for another refusal above.
        error = await refusal(stub.Watch(metadata=of("verifier")).read())
        assert (error.code, error.reason) == (EXHAUSTED, "WATCHES_LIMITED")
        first.cancel()

        async def there_is_room() -> bool:
            call, answer = await watch()
            call.cancel()
            return answer is not grpc.aio.EOF

        await eventually(there_is_room, "the place of the first is free")

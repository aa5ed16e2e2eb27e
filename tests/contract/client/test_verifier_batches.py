"""The Verifier with several secrets in one call, over real gRPC."""

from __future__ import annotations

import asyncio
import traceback
from typing import TYPE_CHECKING, Any

import grpc
import latchkey
import pytest
from latchkey import Scope, Verdict, _batch
from latchkey._shape import checksum
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.client.fake_watch import mark_of
from tests.helpers.waiting import eventually

if TYPE_CHECKING:
    from tests.contract.client.conftest import FakeLatchkey


def secrets(number: int) -> list[str]:
    """Return distinct well-formed secrets, which only the service can judge."""
    bodies = ["lk" + "_" + f"{n:051d}" for n in range(number)]
    return [body + checksum(body) for body in bodies]


def by_secret(request: pb.VerifyRequest) -> pb.VerifyResponse:
    """Return VALID, or INSUFFICIENT_SCOPE, for a token whose id is the secret's number."""
    number = int(request.secret[3:54])
    token = pb.Token(id=f"t{number}", account_id="acme", name="n", scope=pb.SCOPE_READ)
    enough = request.required_scope != pb.SCOPE_WRITE
    verdict = pb.VERDICT_VALID if enough else pb.VERDICT_INSUFFICIENT_SCOPE
    return pb.VerifyResponse(verdict=verdict, token=token, revision=7, mark=mark_of(7))


async def judge_all(request: pb.BatchVerifyRequest, _context: Any) -> pb.BatchVerifyResponse:
    return pb.BatchVerifyResponse(responses=[by_secret(one) for one in request.requests])


async def judge(request: pb.VerifyRequest, _context: Any) -> pb.VerifyResponse:
    return by_secret(request)


@pytest.fixture(autouse=True)
def scripts(fake: FakeLatchkey) -> None:
    """Make each answer depend on the secret."""
    fake.on("Verify", judge)
    fake.on("BatchVerify", judge_all)


async def test_misses_that_happen_together_are_one_call(
    verifier: latchkey.Verifier, fake: FakeLatchkey
) -> None:
    """Each verify gets its own answer. The same question is sent once."""
    questions = [(s, scope) for s in secrets(5) for scope in (None, Scope.READ, Scope.WRITE)]
    answers = await asyncio.gather(*(verifier.verify(*q) for q in (*questions, *questions)))
    assert [(call.rpc, len(call.request.requests)) for call in fake.calls] == [("BatchVerify", 15)]
    for (secret, scope), answer in zip((*questions, *questions), answers, strict=True):
        assert answer.token is not None
        assert answer.token.id == f"t{int(secret[3:54])}"
        assert answer.allowed is (scope is not Scope.WRITE)
    stats = verifier.stats()
    assert (stats.batches, stats.misses) == (1, 30)


async def test_a_single_miss_is_a_plain_verify(
    verifier: latchkey.Verifier, fake: FakeLatchkey
) -> None:
    """Consecutive misses are separate Verify calls."""
    for secret in secrets(3):
        assert (await verifier.verify(secret)).allowed
    assert [call.rpc for call in fake.calls] == ["Verify"] * 3
    assert verifier.stats().batches == 0


async def test_batches_have_a_size(verifier: latchkey.Verifier, fake: FakeLatchkey) -> None:
    """No call contains more questions than fit into its answer."""
    many = secrets(2 * _batch.BATCH_MAX + 1)
    answers = await asyncio.gather(*(verifier.verify(secret) for secret in many))
    assert all(answer.allowed for answer in answers)
    sizes = sorted(len(call.request.requests) for call in fake.calls)
    assert sizes == [1, _batch.BATCH_MAX, _batch.BATCH_MAX]


async def test_incomplete_answers_are_asked_for_again(
    verifier: latchkey.Verifier, fake: FakeLatchkey
) -> None:
    """An answer of a batch that lacks details of its token is neither given to the application nor
    cached: the verify gets the whole token from a separate Verify."""
    short, complete = secrets(2)

    async def omit_one(request: pb.BatchVerifyRequest, _context: Any) -> pb.BatchVerifyResponse:
        answers = [by_secret(one) for one in request.requests]
        for one, answer in zip(request.requests, answers, strict=True):
            answer.details_omitted = one.secret == short
        return pb.BatchVerifyResponse(responses=answers)

    fake.on("BatchVerify", omit_one)
    answers = await asyncio.gather(verifier.verify(short), verifier.verify(complete))
    assert all(answer.allowed and not answer.details_omitted for answer in answers)
    assert [call.rpc for call in fake.calls] == ["BatchVerify", "Verify"]
    assert fake.calls[1].request.secret == short


async def test_details_can_be_omitted(client: latchkey.Client, fake: FakeLatchkey) -> None:
    """`batch_verify` passes the wish on, and reports which tokens lack details."""

    async def omit(request: pb.BatchVerifyRequest, _context: Any) -> pb.BatchVerifyResponse:
        answers = [by_secret(one) for one in request.requests]
        for answer in answers:
            answer.details_omitted = request.omit_details
        return pb.BatchVerifyResponse(responses=answers)

    fake.on("BatchVerify", omit)
    for wanted in (True, False):
        (answer,) = await client.batch_verify([(secrets(1)[0], None)], omit_details=wanted)
        assert answer.details_omitted is wanted


async def test_no_miss_joins_a_call_that_was_sent(
    verifier: latchkey.Verifier, fake: FakeLatchkey
) -> None:
    """The answer to a verify is read after the verify has started."""
    first, second = secrets(2)
    reads: list[asyncio.Event] = []

    async def slow(request: pb.BatchVerifyRequest, context: Any) -> pb.BatchVerifyResponse:
        read = asyncio.Event()
        reads.append(read)
        await read.wait()
        return await judge_all(request, context)

    fake.on("BatchVerify", slow)
    early = [asyncio.create_task(verifier.verify(s)) for s in (first, second)]
    await fake.called.wait()
    late = [asyncio.create_task(verifier.verify(s)) for s in (first, second)]
    await eventually(lambda: len(reads) == 2, "the second call")
    reads[1].set()
    await asyncio.gather(*late)
    assert not any(task.done() for task in early)
    reads[0].set()
    await asyncio.gather(*early)


async def test_each_caller_has_its_own_timeout(
    verifier: latchkey.Verifier, fake: FakeLatchkey
) -> None:
    """A caller that gives up or is cancelled does not affect the others of its batch."""
    answered = asyncio.Event()

    async def slow(request: pb.BatchVerifyRequest, context: Any) -> pb.BatchVerifyResponse:
        await answered.wait()
        return await judge_all(request, context)

    fake.on("BatchVerify", slow)
    hasty, gone, patient, twin = secrets(3) + secrets(3)[2:]
    tasks = [
        asyncio.create_task(verifier.verify(hasty, timeout_seconds=0.05)),
        asyncio.create_task(verifier.verify(gone)),
        asyncio.create_task(verifier.verify(patient)),
        asyncio.create_task(verifier.verify(twin)),
    ]
    await fake.called.wait()
    tasks[1].cancel()
    with pytest.raises(latchkey.DeadlineExceeded):
        await tasks[0]
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    answered.set()
    assert (await tasks[2]).allowed
    assert (await tasks[3]).allowed
    assert fake.count("BatchVerify") == 1


async def test_a_batch_has_the_longest_timeout_of_its_callers(
    verifier: latchkey.Verifier, fake: FakeLatchkey
) -> None:
    """The call's deadline is exactly that of its most patient caller."""
    one, other = secrets(2)
    await asyncio.gather(
        verifier.verify(one, timeout_seconds=10), verifier.verify(other, timeout_seconds=15)
    )
    (call,) = fake.calls
    assert call.seconds_left is not None
    assert 10 < call.seconds_left <= 15.1


@pytest.mark.usefixtures("quick_retries")
async def test_all_callers_of_a_batch_get_its_error(
    verifier: latchkey.Verifier, fake: FakeLatchkey
) -> None:
    """Each gets its own exception, with all details of the service and without a secret."""
    both = secrets(2)
    fake.on("BatchVerify", fake.fails(grpc.StatusCode.UNAVAILABLE, f"no {both[0]}"))
    errors = await asyncio.gather(*(verifier.verify(s) for s in both), return_exceptions=True)
    assert fake.count("BatchVerify") > 1  # it was retried
    one, other = errors
    assert isinstance(one, latchkey.Unavailable)
    assert isinstance(other, latchkey.Unavailable)
    assert one is not other
    assert one.code is grpc.StatusCode.UNAVAILABLE
    assert both[0] not in "".join(traceback.format_exception(one)) + repr(vars(one))


@pytest.mark.parametrize("status", ["UNIMPLEMENTED", "PERMISSION_DENIED"])
async def test_refused_batches_are_replaced_by_single_verifies(
    verifier: latchkey.Verifier, fake: FakeLatchkey, status: str
) -> None:
    """If a proxy only allows Verify, that is detected once, and no verify fails."""
    fake.on("BatchVerify", fake.fails(grpc.StatusCode[status]))
    for _ in range(2):
        answers = await asyncio.gather(*(verifier.verify(secret) for secret in secrets(3)))
        assert all(answer.verdict is Verdict.VALID for answer in answers)
    assert (fake.count("BatchVerify"), fake.count("Verify")) == (1, 6)


async def test_a_slow_refusal_costs_time_of_the_verify(fake: FakeLatchkey) -> None:
    """The single verify after a refused batch gets the time that is left."""
    taken = 0.5

    async def refuse(request: pb.BatchVerifyRequest, context: Any) -> pb.BatchVerifyResponse:
        await asyncio.sleep(taken)
        await fake.fails(grpc.StatusCode.PERMISSION_DENIED)(request, context)
        raise AssertionError

    fake.on("BatchVerify", refuse)
    async with latchkey.Verifier(fake.target, timeout_seconds=5, cache_entries=0) as verifier:
        answers = await asyncio.gather(*(verifier.verify(secret) for secret in secrets(3)))
    assert all(answer.allowed for answer in answers)
    alone = [call.seconds_left for call in fake.calls if call.rpc == "Verify"]
    assert len(alone) == 3
    # The deadline is rounded up in transit, by less than a tenth of a second.
    assert all(left is not None and left < 5 - taken + 0.1 for left in alone)


async def test_a_refusal_that_uses_up_the_time_is_a_timeout(
    fake: FakeLatchkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no time is left after the refusal, no call is made and every verify fails."""
    loop = asyncio.get_running_loop()
    clock = loop.time
    async with (
        latchkey.Client(fake.target) as client,
        latchkey.Verifier(client, timeout_seconds=5, cache_entries=0) as verifier,
    ):

        async def refuse(*_: Any, timeout_seconds: float) -> None:
            monkeypatch.setattr(loop, "time", lambda: clock() + timeout_seconds)
            raise latchkey.PermissionDenied("No batches.")

        monkeypatch.setattr(client, "batch_verify", refuse)
        results = await asyncio.gather(
            *(verifier.verify(secret) for secret in secrets(3)), return_exceptions=True
        )
        monkeypatch.setattr(loop, "time", clock)
    for error in results:
        assert isinstance(error, latchkey.DeadlineExceeded)
        assert "no answer in time. Try again" in str(error)
    assert fake.calls == []


async def test_closing_ends_a_batch(fake: FakeLatchkey) -> None:
    """All verifies in progress fail at once when the verifier is closed."""
    fake.on("BatchVerify", fake.hangs())
    verifier = latchkey.Verifier(fake.target, timeout_seconds=30)
    tasks = [asyncio.create_task(verifier.verify(secret)) for secret in secrets(3)]
    await fake.called.wait()
    await verifier.close()
    for task in tasks:
        with pytest.raises(latchkey.Unavailable, match="closed"):
            await task

"""The short path of verifies, with the verifier replaced: limits, rates, and restricted answers."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from latchkey_coherence.verdict_cache import NOWHERE, Position
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.access.methods import BATCH_VERIFY, METHODS, VERIFY
from latchkey_service.access.policy import ANONYMOUS, Accounts, Caller
from latchkey_service.access.rates import RateLimits
from latchkey_service.errors import InvalidArgument, RateLimited, RequestTooLarge
from latchkey_service.rpc.counters import Counts
from latchkey_service.rpc.verify_calls import VerifyCalls, encode_token
from latchkey_service.tokens.usage import PendingUses
from latchkey_service.tokens.verdict import CachedToken, Scope, TokenRecord, Verdict
from latchkey_service.tokens.verifier import MALFORMED, UNKNOWN, Answer, Question

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POSITION = Position(7, 2**64 - 1)


class Verifier:
    """Answers each question with the answer that its secret names."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def verify_cached(
        self, presented: str, _scope: int, _address: str = "", _permissions: Collection[str] = ()
    ) -> Answer:
        self.asked.append(presented)
        return self.answers.get(presented, MALFORMED)

    async def verify_batch(
        self, questions: Sequence[Question], _: float | None, _caller: str
    ) -> list[Answer]:
        return [self.verify_cached(*question) for question in questions]


class Context:
    def time_remaining(self) -> None:
        return None


def path_with(
    answers: dict[str, Answer], seen: Callable[[CachedToken], None] = lambda _: None
) -> tuple[Any, Verifier]:
    verifier = Verifier(answers)
    unused: Any = None
    uses = PendingUses(lambda: None)
    calls = VerifyCalls(verifier, unused, Counts(), uses, seen, 0.0, time.monotonic, time.time)  # type: ignore[arg-type]  # a stand-in
    return calls, verifier


def answer_for(account_id: str, verdict: Verdict) -> Answer:
    record = TokenRecord("t1", account_id, "name", Scope.READ, NOW, None, "lk_…")
    return Answer(verdict, encode_token(record), account_id, POSITION)


@pytest.mark.parametrize("verdict", [Verdict.VALID, Verdict.DELETED, Verdict.EXPIRED])
@pytest.mark.parametrize("batch", [False, True])
async def test_foreign_token_looks_like_an_unissued_secret(verdict: Verdict, batch: bool) -> None:
    """A caller limited to accounts gets neither revision nor mark for another account's token, nor
    for one that was purged."""
    caller = Caller("a", frozenset(), accounts=Accounts(frozenset({"acme"}), ()))
    answers = {
        "own": answer_for("acme", verdict),
        "foreign": answer_for("globex", verdict),
        "purged": Answer(Verdict.UNKNOWN, position=POSITION),
        "unknown": UNKNOWN,
        "malformed": MALFORMED,
    }
    calls, _ = path_with(answers)
    requests = [pb.VerifyRequest(secret=name) for name in answers]
    if batch:
        data = pb.BatchVerifyRequest(requests=requests).SerializeToString()
        encoded = await calls._batch_verify(data, Context(), caller)
        responses = list(pb.BatchVerifyResponse.FromString(encoded).responses)
    else:
        responses = [
            pb.VerifyResponse.FromString(
                await calls._verify(request.SerializeToString(), Context(), caller)
            )
            for request in requests
        ]
    own, *others = responses
    assert (own.verdict, own.token.account_id, own.revision, own.mark) == (
        int(verdict),
        "acme",
        *POSITION,
    )
    unknown = pb.VerifyResponse(verdict=pb.VERDICT_UNKNOWN)
    assert others == [
        unknown,
        unknown,
        unknown,
        pb.VerifyResponse(verdict=pb.VERDICT_MALFORMED),
    ]


async def test_verify_above_the_limit_is_malformed_and_not_parsed() -> None:
    """However long a secret is, the answer is a verdict. The limit is exact."""
    calls, verifier = path_with({})
    fitting = METHODS[VERIFY].bytes_max - len(
        pb.VerifyRequest(secret="x" * 1_000).SerializeToString()
    )
    for more, asked in ((0, 1), (1, 0)):
        verifier.asked.clear()
        data = pb.VerifyRequest(secret="x" * (1_000 + fitting + more)).SerializeToString()
        assert len(data) == METHODS[VERIFY].bytes_max + more
        answer = pb.VerifyResponse.FromString(await calls._verify(data, Context(), ANONYMOUS))
        assert answer == pb.VerifyResponse(verdict=pb.VERDICT_MALFORMED)
        assert len(verifier.asked) == asked


async def test_batch_above_the_limit_is_refused() -> None:
    """A BatchVerify has room for 1,000 secrets with an address and permissions. A larger one is
    refused before it is parsed."""
    calls, verifier = path_with({})
    question = pb.VerifyRequest(secret="x" * 68, required_scope=pb.SCOPE_READ)
    full = pb.BatchVerifyRequest(requests=[question] * 1_000).SerializeToString()
    answer = await calls._batch_verify(full, Context(), ANONYMOUS)
    assert len(pb.BatchVerifyResponse.FromString(answer).responses) == 1_000
    verifier.asked.clear()
    with pytest.raises(RequestTooLarge):
        await calls._batch_verify(bytes(METHODS[BATCH_VERIFY].bytes_max + 1), Context(), ANONYMOUS)
    assert not verifier.asked


@pytest.mark.parametrize("data", [b"", b"\xff", bytes(METHODS[BATCH_VERIFY].bytes_max + 1)])
async def test_refused_batches_count_towards_the_rate(data: bytes) -> None:
    """An empty batch, one that does not parse, and one that is too large count as one question."""
    calls, _ = path_with({})
    caller = Caller("a", frozenset(), rates=RateLimits({"verifier": 1}))
    with pytest.raises(InvalidArgument):
        await calls._batch_verify(data, Context(), caller)
    with pytest.raises(RateLimited):
        await calls._batch_verify(data, Context(), caller)


def test_answers_without_a_position_omit_it() -> None:
    """An answer that needed no read has no revision and no mark."""
    calls, _ = path_with({})
    assert calls._completed(Answer(Verdict.UNKNOWN, position=NOWHERE), "", ANONYMOUS) == b"\x08\x03"


async def test_only_a_valid_answer_is_a_first_use() -> None:
    """A verify that is refused, or whose caller may not see the token, does not use the secret.
    Its answer has no position, so no client keeps it and hides the first use."""
    record = CachedToken(
        token_id="t1",
        account_id="acme",
        scope=1,
        expires=math.inf,
        token=b"",
        deleted=False,
        retires_older=b"d",
        keep_until=math.inf,
    )
    refused = answer_for("acme", Verdict.INSUFFICIENT_SCOPE)._replace(record=record)
    valid = answer_for("acme", Verdict.VALID)._replace(record=record)
    seen: list[CachedToken] = []
    calls, _ = path_with({"refused": refused, "valid": valid}, seen.append)
    stranger = Caller("a", frozenset(), accounts=Accounts(frozenset({"globex"}), ()))

    async def ask(secret: str, caller: Caller = ANONYMOUS) -> pb.VerifyResponse:
        data = pb.VerifyRequest(secret=secret).SerializeToString()
        return pb.VerifyResponse.FromString(await calls._verify(data, Context(), caller))

    answer = await ask("refused")
    assert answer.verdict == pb.VERDICT_INSUFFICIENT_SCOPE
    assert (answer.revision, answer.mark) == NOWHERE
    assert (await ask("valid", stranger)).verdict == pb.VERDICT_UNKNOWN
    assert seen == []
    answer = await ask("valid")
    assert (answer.revision, answer.mark) == POSITION
    assert seen == [record]
    # Once the first use has been seen, refusals may be kept again.
    record.retires_older = None
    assert (await ask("refused")).mark == POSITION.mark
    await ask("valid")
    assert seen == [record]

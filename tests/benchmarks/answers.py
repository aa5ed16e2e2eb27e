"""Checks answers: a pass over a server with a real client, and the samples that the load kept."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens import page_tokens

from tests.benchmarks.seed import ACCOUNT, Seeded

__all__ = [
    "PAGE",
    "Verified",
    "check_ceiling",
    "check_service",
    "remember",
    "right_create",
    "right_list",
]

CALL_SECONDS_MAX = 10.0
OTHER_ACCOUNT = "bench-answers"
PAGE = 50
# The maximum for BatchVerify.
REMEMBER_AT_ONCE = 1_000


def check_ceiling(address: str) -> list[str]:
    """Return the errors in a constant server's answers; empty if they are right."""
    with grpc.insecure_channel(address) as channel:
        answer = pb_grpc.TokenServiceStub(channel).Verify(
            pb.VerifyRequest(secret="x"), timeout=CALL_SECONDS_MAX
        )
    right = answer.verdict == pb.VERDICT_VALID and answer.token.id
    return [] if right else ["the constant is not what it should be"]


def check_service(address: str, seeded: Seeded, keyring: Keyring) -> list[str]:
    """Return the errors in a service's answers: each verdict, a batch, two pages, Create."""
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.TokenServiceStub(channel)
        return [*_wrong_verdicts(stub, seeded, keyring), *_wrong_pages(stub, seeded)]


def _wrong_verdicts(
    stub: pb_grpc.TokenServiceStub, seeded: Seeded, keyring: Keyring
) -> Iterable[str]:
    # Random, so that the pass can be repeated on the same database.
    number = int.from_bytes(os.urandom(6))

    def create(name: str, **fields: Any) -> pb.CreateResponse:
        request = pb.CreateRequest(
            account_id=OTHER_ACCOUNT, name=f"{name} {number:x}", scope=pb.SCOPE_READ, **fields
        )
        return stub.Create(request, timeout=CALL_SECONDS_MAX)

    deleted, expired = create("deleted"), create("expired", ttl={"nanos": 1_000_000})
    fresh = create("fresh")
    receipt = stub.Delete(
        pb.DeleteRequest(account_id=OTHER_ACCOUNT, id=deleted.token.id), timeout=CALL_SECONDS_MAX
    ).receipt
    if receipt.revision < 1:
        yield "Delete: no revision"
    unknown = keyring.mint("lk", os.urandom).secret.reveal()
    made_up = Keyring([Pepper(bytes(32))]).mint("lk", os.urandom).secret.reveal()
    secret, token_id = seeded.secrets[0]
    questions = [
        (secret, pb.SCOPE_READ, pb.VERDICT_VALID, token_id),
        (secret, pb.SCOPE_WRITE, pb.VERDICT_INSUFFICIENT_SCOPE, token_id),
        (secret[:-1] + "~", pb.SCOPE_READ, pb.VERDICT_MALFORMED, ""),
        (unknown, pb.SCOPE_READ, pb.VERDICT_UNKNOWN, ""),
        (made_up, pb.SCOPE_READ, pb.VERDICT_UNKNOWN, ""),
        (deleted.secret, pb.SCOPE_READ, pb.VERDICT_DELETED, deleted.token.id),
        (expired.secret, pb.SCOPE_READ, pb.VERDICT_EXPIRED, expired.token.id),
        (fresh.secret, pb.SCOPE_READ, pb.VERDICT_VALID, fresh.token.id),
        *((s, pb.SCOPE_READ, pb.VERDICT_VALID, i) for s, i in seeded.secrets[1:92]),
    ]
    requests = [pb.VerifyRequest(secret=s, required_scope=scope) for s, scope, _, _ in questions]
    batch = stub.BatchVerify(pb.BatchVerifyRequest(requests=requests), timeout=CALL_SECONDS_MAX)
    if len(batch.responses) != len(questions):
        yield f"BatchVerify: {len(batch.responses)} answers to {len(questions)} questions"
    for place, (_, _, verdict, token_id) in enumerate(questions):
        single = stub.Verify(requests[place], timeout=CALL_SECONDS_MAX)
        for method, answer in (("Verify", single), ("BatchVerify", batch.responses[place])):
            if (answer.verdict, answer.token.id) != (verdict, token_id):
                yield f"{method}, question {place}: {pb.Verdict.Name(answer.verdict)}"


def _wrong_pages(stub: pb_grpc.TokenServiceStub, seeded: Seeded) -> Iterable[str]:
    last_page = seeded.tokens // PAGE
    for page in (1, last_page):
        request = pb.ListRequest(account_id=ACCOUNT, page_size=PAGE)
        if page > 1:
            position = seeded.position(PAGE * (page - 1))
            request.page_token = page_tokens.encode(ACCOUNT, position.key, position.id)
        answer = stub.List(request, timeout=CALL_SECONDS_MAX)
        expected = [seeded.position(PAGE * (page - 1) + n).id for n in range(1, PAGE + 1)]
        if [token.id for token in answer.tokens] != expected:
            yield f"List, page {page}: not the expected tokens"
        if bool(answer.next_page_token) != (page < last_page):
            yield f"List, page {page}: wrong about whether there is a next page"


def remember(address: str, secrets: Sequence[tuple[str, str]]) -> None:
    """Make a server cache these secrets, pairs with token IDs, unless it has.

    Raises RuntimeError if it does not answer each with its token.
    """
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.TokenServiceStub(channel)
        for place in range(0, len(secrets), REMEMBER_AT_ONCE):
            some = secrets[place : place + REMEMBER_AT_ONCE]
            requests = [pb.VerifyRequest(secret=s, required_scope=pb.SCOPE_READ) for s, _ in some]
            answer = stub.BatchVerify(
                pb.BatchVerifyRequest(requests=requests), timeout=CALL_SECONDS_MAX
            )
            if [response.token.id for response in answer.responses] != [i for _, i in some]:
                raise RuntimeError("BatchVerify: not the requested tokens")


class Verified:
    """Distinguishes right from wrong answers to Verify and BatchVerify of seeded secrets."""

    def __init__(self, seeded: Seeded) -> None:
        self._ids = dict(seeded.secrets)

    def single(self, request: bytes, answer: bytes) -> bool:
        """Return whether the verdict is VALID, for the requested token."""
        return self._right(
            pb.VerifyRequest.FromString(request), pb.VerifyResponse.FromString(answer)
        )

    def batch(self, request: bytes, answer: bytes) -> bool:
        """Return whether all answers are right, and in order."""
        questions = pb.BatchVerifyRequest.FromString(request).requests
        answers = pb.BatchVerifyResponse.FromString(answer).responses
        return len(questions) == len(answers) and all(map(self._right, questions, answers))

    def _right(self, question: pb.VerifyRequest, answer: pb.VerifyResponse) -> bool:
        return answer.verdict == pb.VERDICT_VALID and answer.token.id == self._ids[question.secret]


def right_create(request: bytes, answer: bytes) -> bool:
    """Return whether the token is the requested one, with a secret."""
    asked, created = pb.CreateRequest.FromString(request), pb.CreateResponse.FromString(answer)
    return created.token.name == asked.name and len(created.secret) == 60


def right_list(request: bytes, answer: bytes) -> bool:
    """Return whether it is a full page."""
    return len(pb.ListResponse.FromString(answer).tokens) == PAGE

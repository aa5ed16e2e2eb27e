"""The size of a BatchVerify's answer, and what it leaves out."""

from datetime import UTC, datetime

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.rpc.batch_answer import (
    ANSWER_BYTES_MAX,
    SMALL_BYTES_MAX,
    encode_batch,
    verdict_counts,
    without_details,
)
from latchkey_service.rpc.verify_calls import encode_token
from latchkey_service.tokens.verdict import Scope, TokenRecord, Verdict

NOW = datetime(2026, 1, 1, 1, 1, 1, 999_999, UTC)
GRPC_DEFAULT_MAX = 4 * 1024 * 1024
BATCH_MAX = 1_000
# In the client library, the largest batch.
LIBRARY_MAX = 150
# The longest fields that the service accepts, of characters of four bytes where any are allowed.
LARGEST = TokenRecord(
    "tok_" + "z" * 26,
    "a" * 128,
    "𐍈" * 64,
    Scope.WRITE,
    NOW,
    NOW,
    "p" * 10 + "_…abcd",
    labels={f"{n:02}" + "𐍈" * 61: "𐍈" * 255 for n in range(16)},
    disable_time=NOW,
    delete_time=NOW,
    allowed_networks=("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128",) * 32,
    permissions=tuple(f"{n:02}" + "r" * 29 + ":" + "a" * 31 for n in range(64)),
)
SMALL = TokenRecord("t", "acme", "n", Scope.READ, NOW, None, "lk_…")


def response(record: TokenRecord | None) -> bytes:
    """Return an encoded answer as the short path makes it."""
    if record is None:
        return pb.VerifyResponse(verdict=pb.VERDICT_UNKNOWN).SerializeToString()
    position = pb.VerifyResponse(revision=2**62, mark=2**63).SerializeToString()
    return bytes((0x08, pb.VERDICT_VALID)) + encode_token(record) + position


def decoded(data: bytes) -> list[pb.VerifyResponse]:
    return list(pb.BatchVerifyResponse.FromString(data).responses)


@pytest.mark.parametrize("count", [1, LIBRARY_MAX])
def test_complete_answers_of_the_client_librarys_batches_fit(count: int) -> None:
    """As many of the largest tokens as the client library asks for are complete."""
    answers = decoded(encode_batch([response(LARGEST)] * count))
    assert len(answers) == count
    for answer in answers:
        assert answer == pb.VerifyResponse.FromString(response(LARGEST))


def test_the_largest_answer_fits_into_grpcs_default_limit() -> None:
    """A thousand of the largest tokens get a thousand verdicts, and as many details as fit. A
    token without details lacks nothing else, and has no position."""
    data = encode_batch([response(LARGEST)] * BATCH_MAX)
    assert ANSWER_BYTES_MAX - len(response(LARGEST)) - BATCH_MAX * 5 < len(data)
    assert len(data) <= ANSWER_BYTES_MAX == GRPC_DEFAULT_MAX
    complete = pb.VerifyResponse.FromString(response(LARGEST))
    short = pb.VerifyResponse()
    short.CopyFrom(complete)
    for field in ("labels", "allowed_networks", "permissions"):
        short.token.ClearField(field)
    short.revision = short.mark = 0
    short.details_omitted = True
    answers = decoded(data)
    omitted = [answer.details_omitted for answer in answers]
    assert not any(omitted[:100])
    assert 0 < sum(omitted) < BATCH_MAX
    for answer in answers:
        assert answer == (short if answer.details_omitted else complete)


def test_small_answers_after_large_ones_stay_complete() -> None:
    """Secrets without a token, and tokens without details, need no omission and keep their
    positions while there is room."""
    large = [response(LARGEST)] * 500
    answers = decoded(encode_batch([*large, response(None), response(SMALL)]))
    assert answers[-2] == pb.VerifyResponse(verdict=pb.VERDICT_UNKNOWN)
    assert answers[-1] == pb.VerifyResponse.FromString(response(SMALL))
    assert answers[-3].details_omitted


def test_details_are_omitted_on_request() -> None:
    """With `omit_details`, no token has details, and every answer with a token says so."""
    answers = decoded(
        encode_batch([response(LARGEST), response(None), response(SMALL)], omit_details=True)
    )
    assert [answer.details_omitted for answer in answers] == [True, False, True]
    assert [answer.verdict for answer in answers] == [
        pb.VERDICT_VALID,
        pb.VERDICT_UNKNOWN,
        pb.VERDICT_VALID,
    ]
    for answer in answers:
        assert not answer.token.labels
        assert not answer.token.allowed_networks
        assert not answer.token.permissions
        assert answer.revision == answer.mark == 0
    assert answers[0].token.name == LARGEST.name


def test_answers_without_details_are_small() -> None:
    """The space that is reserved for an answer without details suffices for the largest one."""
    assert len(without_details(response(LARGEST))) <= SMALL_BYTES_MAX


def test_a_batch_has_few_counts_of_verdicts() -> None:
    """The largest batch has no more attributes in its span than there are verdicts, and they count
    each of its answers."""
    verdicts = [verdict for verdict in Verdict for _ in range(BATCH_MAX // len(Verdict))]
    encoded = [
        pb.VerifyResponse(verdict=pb.Verdict.Value(f"VERDICT_{v.name}")).SerializeToString()
        for v in verdicts
    ]
    counts = verdict_counts(encoded)
    names = {name.removeprefix("latchkey.verdicts.") for name in counts}
    assert names == {verdict.name.lower() for verdict in Verdict}
    assert sum(counts.values()) == len(verdicts)

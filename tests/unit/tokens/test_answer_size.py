"""Pages of tokens fit into one message."""

from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.rpc.verify_calls import put_token
from latchkey_service.tokens.answer_size import fitting
from latchkey_service.tokens.verdict import TokenRecord, TokenSecret

from tests.unit.rpc.test_batch_answer import LARGEST, NOW, SMALL

GRPC_DEFAULT_MAX = 4 * 1024 * 1024
PAGE_MAX = 500
SECRET = TokenSecret("p" * 10 + "_…abcd", NOW, NOW, retire_on_first_use=True, last_used_time=NOW)
FULL = LARGEST._replace(
    last_used_time=NOW,
    last_used_by="c" * 64,
    description="𐍈" * 256,
    secrets=(SECRET,) * 5,
)


def answer(records: list[TokenRecord]) -> bytes:
    response = pb.ListResponse(next_page_token="x" * 1_000, total_size=10_000)
    for record in records:
        put_token(record, response.tokens.add())
    return response.SerializeToString()


def test_the_largest_tokens_fit() -> None:
    """As many of the largest tokens as fit are less than gRPC's default limit, and use most of
    it."""
    count = fitting([FULL] * PAGE_MAX)
    assert 100 < count < PAGE_MAX
    assert 0.8 * GRPC_DEFAULT_MAX < len(answer([FULL] * count)) <= GRPC_DEFAULT_MAX


def test_a_page_of_usual_tokens_is_complete() -> None:
    """Usual tokens are never left out, an empty page is empty, and one token always fits."""
    assert fitting([SMALL] * PAGE_MAX) == PAGE_MAX
    assert fitting([]) == 0
    assert fitting([FULL._replace(description="x" * 5_000_000)] * 2) == 1

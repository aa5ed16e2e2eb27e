"""Verifies whose secret is not UTF-8, and their cost."""

from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.access.methods import BATCH_VERIFY
from latchkey_service.rpc.non_utf8_parsing import BATCH_MAX, parse_non_utf8

# A question with a secret of one byte that is not UTF-8, and one without a secret.
NOT_TEXT, EMPTY = b"\x0a\x03\x0a\x01\xff", b"\x0a\x00"


def test_rest_of_a_batch_is_unchanged() -> None:
    """A secret that is not UTF-8 becomes empty, and the rest is kept, up to the largest batch."""
    good = pb.VerifyRequest(secret="x", required_scope=pb.SCOPE_READ)
    rest = pb.BatchVerifyRequest(requests=[good] * (BATCH_MAX - 1))
    assert parse_non_utf8(BATCH_VERIFY, NOT_TEXT + rest.SerializeToString()) == (
        pb.BatchVerifyRequest(requests=[pb.VerifyRequest(), *rest.requests])
    )


def test_oversized_batch_is_not_converted() -> None:
    """It is rejected anyway, before its caller is known, so it must not block others."""
    assert parse_non_utf8(BATCH_VERIFY, NOT_TEXT + EMPTY * BATCH_MAX) is None

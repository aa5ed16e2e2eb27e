"""Verifies whose secret is not text, and what they may cost."""

from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.lenient import BATCH_MAX, BATCH_VERIFY, lenient_parse

# A question with a secret of one byte that is not UTF-8, and one without a secret.
NOT_TEXT, EMPTY = b"\x0a\x03\x0a\x01\xff", b"\x0a\x00"


def test_the_others_of_a_batch_are_as_they_were() -> None:
    """What is not text is emptied, and all else is kept, up to the largest batch there is."""
    good = pb.VerifyRequest(secret="x", required_scope=pb.SCOPE_READ)
    rest = pb.BatchVerifyRequest(requests=[good] * (BATCH_MAX - 1))
    assert lenient_parse(BATCH_VERIFY, NOT_TEXT + rest.SerializeToString()) == (
        pb.BatchVerifyRequest(requests=[pb.VerifyRequest(), *rest.requests])
    )


def test_a_batch_that_is_too_large_is_not_gone_through() -> None:
    """It is refused anyway, before who sent it is known: it must not take the time of others."""
    assert lenient_parse(BATCH_VERIFY, NOT_TEXT + EMPTY * BATCH_MAX) is None

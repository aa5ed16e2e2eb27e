"""Tokens as the contract has them."""

from datetime import UTC, datetime

import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.rpc.verify_calls import put_token
from latchkey_service.tokens.verdict import Scope, TokenRecord, TokenSecret

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("infinity", "shown"),
    [
        (datetime.max, datetime(9999, 12, 29, tzinfo=UTC)),  # noqa: DTZ901 - as the driver has it
        (datetime.min, datetime(1, 1, 3, tzinfo=UTC)),  # noqa: DTZ901 - as above
    ],
)
def test_infinite_times_are_shown(infinity: datetime, shown: datetime) -> None:
    """A row into which somebody wrote an infinite time can be shown. So it keeps neither its
    account from listing tokens, nor operators from finding it."""
    secret = TokenSecret("lk_…aB3x", MOMENT, infinity, False, None, infinity)
    record = TokenRecord("tok_1", "acme", "deploy", Scope.READ, MOMENT, infinity, "lk_…aB3x")
    token = pb.Token()
    put_token(record._replace(disable_time=infinity, secrets=(secret,)), token)
    for time in (
        token.expire_time,
        token.disable_time,
        token.secrets[0].expire_time,
        token.secrets[0].leak_report_time,
    ):
        assert time.ToDatetime(UTC) == shown

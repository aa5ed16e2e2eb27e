"""The ids that sign-in providers give people work as account ids, over each transport."""

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.rich_status import refusal

ACCEPTED = [
    "jane@example.com",
    "jane.o-neil+tokens@example.com",
    "auth0|5f7c8ec7c33c6c004bbafe82",
    "waad|~jane=/Users",
    "x" * 128,
]
REFUSED = [
    "x" * 129,
    "jane doe",
    "a*",
    "jane@exämple.com",
    'a"b',
    "a'b",
    "a\\b",
    "a\n",
    "a%b",
    "a?b",
]


@pytest.mark.parametrize("account", ACCEPTED)
async def test_a_provider_s_id_is_an_account_id(stub, account):
    """An account with such an id can use its own tokens, and no other account can delete them."""
    created = await stub.Create(
        pb.CreateRequest(account_id=account, name="deploy", scope=pb.SCOPE_READ)
    )
    listed = await stub.List(pb.ListRequest(account_id=account))
    assert [token.id for token in listed.tokens] == [created.token.id]
    verified = await stub.Verify(pb.VerifyRequest(secret=created.secret))
    assert verified.token.account_id == account
    other = account[:-1] + ("y" if account[-1] != "y" else "z")
    error = await refusal(stub.Delete(pb.DeleteRequest(account_id=other, id=created.token.id)))
    assert error.code == grpc.StatusCode.NOT_FOUND
    await stub.Delete(pb.DeleteRequest(account_id=account, id=created.token.id))
    assert not (await stub.List(pb.ListRequest(account_id=account))).tokens


@pytest.mark.parametrize("account", REFUSED)
async def test_other_characters_are_refused(stub, account):
    """White space, quotes, wildcards and characters outside ASCII are INVALID_ARGUMENT."""
    request = pb.CreateRequest(account_id=account, name="deploy", scope=pb.SCOPE_READ)
    error = await refusal(stub.Create(request))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["account_id"])

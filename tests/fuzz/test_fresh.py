"""What the answers about the newest token forbid: the fuzzer's check would not notice otherwise."""

from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, timestamp_pb2
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.fuzz.fresh import Fresh
from tests.fuzz.methods import METHODS, TOKENS

RECEIPT = pb.Receipt(effective_time=timestamp_pb2.Timestamp(seconds=1))
NAMED: dict[str, Any] = {"account_id": "acme", "id": "tok_1"}
WIDE: dict[str, Any] = {
    **NAMED,
    "scope": pb.SCOPE_WRITE,
    "allowed_networks": ["192.0.2.0/24"],
    "permissions": ["orders:*"],
}
TOKEN = pb.Token(**WIDE)
QUESTION = pb.VerifyRequest(
    secret="first",
    required_scope=pb.SCOPE_WRITE,
    client_address="192.0.2.1",
    required_permissions=["orders:read"],
)
ENDS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Update", NAMED, {"token": pb.Token(**WIDE | {"scope": pb.SCOPE_READ})}),
    ("Update", NAMED, {"token": pb.Token(**WIDE | {"allowed_networks": ["10.0.0.0/8"]})}),
    ("Update", NAMED, {"token": pb.Token(**WIDE | {"permissions": ["orders:list"]})}),
    (
        "Update",
        NAMED,
        {"token": pb.Token(**WIDE, expire_time=timestamp_pb2.Timestamp(seconds=1))},
    ),
    (
        "Disable",
        NAMED,
        {"token": pb.Token(**WIDE, disable_time=timestamp_pb2.Timestamp(seconds=1))},
    ),
    ("Rotate", NAMED, {"token": TOKEN, "secret": "second"}),
    ("RevokeSecret", {"secrets": ["first"]}, {}),
    ("Delete", NAMED, {}),
    ("DeleteAll", {"account_id": "acme"}, {}),
]


def fresh() -> Fresh:
    return Fresh(pb.CreateResponse(token=TOKEN, secret="first"))


def learn(token: Fresh, name: str, request: dict[str, Any], response: dict[str, Any]) -> None:
    (method,) = (m for m in METHODS if m.path == f"{TOKENS}{name}")
    answer = method.response(**response)
    token.learn(method.path, method.request(**request), grpc.StatusCode.OK, answer)


@pytest.mark.parametrize(("name", "request_", "response"), ENDS)
def test_a_confirmed_change_forbids_valid(
    name: str, request_: dict[str, Any], response: dict[str, Any]
) -> None:
    """After each change that narrows, VALID is forbidden, but not before it is confirmed."""
    token = fresh()
    assert token.may_be_valid(QUESTION)
    learn(token, name, request_, response | {"receipt": pb.Receipt()})
    assert token.may_be_valid(QUESTION)
    token = fresh()
    learn(token, name, request_, response | {"receipt": RECEIPT})
    assert not token.may_be_valid(QUESTION)


def test_other_answers_forbid_nothing() -> None:
    """Other tokens, a grace, an Enable and an unknown outcome leave VALID possible."""
    token = fresh()
    for name, request, response in ENDS:
        other = {"secrets": ["x"]} if "secrets" in request else {"account_id": "globex"}
        learn(token, name, other, response | {"receipt": RECEIPT})
    grace = NAMED | {"grace": duration_pb2.Duration(seconds=9)}
    learn(token, "Rotate", grace, {"token": TOKEN, "secret": "second", "receipt": RECEIPT})
    assert token.may_be_valid(QUESTION)
    _, request, response = ENDS[4]
    learn(token, "Disable", request, response | {"receipt": RECEIPT})
    learn(token, "Enable", NAMED, {"token": TOKEN})
    assert token.may_be_valid(QUESTION)
    learn(token, "Disable", request, response | {"receipt": RECEIPT})
    enable = pb.EnableRequest(**NAMED)
    token.learn(f"{TOKENS}Enable", enable, grpc.StatusCode.UNAVAILABLE, None)
    assert token.may_be_valid(QUESTION)

"""The newest token that the fuzzer has created, and which verdicts the answers so far forbid. Pure.

A change that narrows the token forbids VALID from its confirmed answer on, where the changed token
does not permit the question. Changes that widen it may take a moment, so nothing requires VALID.
"""

import time
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

import grpc
from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2
from google.protobuf.message import Message
from latchkey_coherence.verdict import includes, parse_address
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.fuzz.methods import TOKENS

__all__ = ["NARROWING", "Fresh", "seeds"]

_CHANGES = {f"{TOKENS}{name}" for name in ("Update", "Disable", "Rotate", "RetireSecrets")}
NARROWING = _CHANGES | {f"{TOKENS}{name}" for name in ("Delete", "RevokeSecret", "DeleteAll")}
"""Methods that may narrow a token."""
_ENABLE = f"{TOKENS}Enable"
_ANSWERED = (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
# Secrets that ended, each of which costs a Verify after a change.
_ENDED_KEPT = 3


class Fresh:
    """A token, as its answers describe it."""

    def __init__(self, created: pb.CreateResponse) -> None:
        self.account = created.token.account_id
        self.id = created.token.id
        self.secret = created.secret
        self.deleted = False
        self.ended: list[str] = []
        """Its secrets that have ended, the newest last."""
        # Not known after a change whose effect is not confirmed.
        self._token: pb.Token | None = created.token

    def learn(self, path: str, request: Any, code: grpc.StatusCode, response: Any) -> None:
        """Learn from the answer to a call. `response` is None without one."""
        if path in _CHANGES or path == _ENABLE:
            if (request.account_id, request.id) == (self.account, self.id):
                self._learn_change(path, request, code, response)
        elif response is None:
            return
        elif path == f"{TOKENS}Delete":
            named = (request.account_id, request.id) == (self.account, self.id)
            self.deleted |= named and _is_confirmed(response)
        elif path == f"{TOKENS}RevokeSecret":
            if self.secret in request.secrets and _is_confirmed(response):
                self._end()
        elif path == f"{TOKENS}DeleteAll" and request.account_id == self.account:
            everything = not request.dry_run and not request.filter.ByteSize()
            self.deleted |= everything and not response.more and _is_confirmed(response)

    def may_be_valid(self, request: pb.VerifyRequest) -> bool:
        """Return whether no answer so far forbids VALID for a question about this token."""
        token = self._token
        if self.deleted or request.secret in self.ended:
            return False
        if token is None:
            return True
        address = parse_address(request.client_address)
        return not (
            token.HasField("disable_time")
            or (token.HasField("expire_time") and token.expire_time.seconds < time.time() - 1)
            or not 0 <= request.required_scope <= token.scope
            or (
                token.allowed_networks
                and not any(address in ip_network(n) for n in token.allowed_networks if address)
            )
            or not includes(frozenset(token.permissions), request.required_permissions)
        )

    def questions(self) -> list[pb.VerifyRequest]:
        """Return verifies that must not be answered VALID, or may be, as `may_be_valid` says."""
        found = []
        for secret in (self.secret, *self.ended[-_ENDED_KEPT:]):
            found.append(pb.VerifyRequest(secret=secret))
            found.append(
                pb.VerifyRequest(
                    secret=secret,
                    required_scope=pb.SCOPE_WRITE,
                    client_address="192.0.2.1",
                    required_permissions=["orders:read"],
                )
            )
        return found

    def _learn_change(self, path: str, request: Any, code: grpc.StatusCode, response: Any) -> None:
        if response is None:
            if code not in _ANSWERED:
                # It may have been made.
                self._token = None
            return
        waits = path != _ENABLE and response.HasField("receipt")
        self._token = response.token if not waits or _is_confirmed(response) else None
        if path == f"{TOKENS}Rotate":
            at_once = not (request.HasField("grace") or request.retire_on_first_use)
            if at_once and _is_confirmed(response):
                self._end()
            self.secret = response.secret

    def _end(self) -> None:
        if self.secret not in self.ended:
            self.ended.append(self.secret)


def seeds(account: str, other: str, token_id: str, secret: str) -> Iterator[tuple[str, Message]]:
    """Yield the changes of the newest token, and the token to change, by the names of methods."""
    named: dict[str, Any] = {"account_id": account, "id": token_id}
    yield (
        "Create",
        pb.CreateRequest(
            account_id=account,
            name="all",
            scope=pb.SCOPE_WRITE,
            allowed_networks=["192.0.2.0/24"],
            permissions=["orders:read"],
        ),
    )
    expiry = timestamp_pb2.Timestamp(seconds=4102444800)
    for token in (
        pb.Token(scope=pb.SCOPE_READ),
        pb.Token(expire_time=expiry),
        pb.Token(allowed_networks=["203.0.113.0/24"]),
        pb.Token(permissions=["orders:list"]),
    ):
        mask = field_mask_pb2.FieldMask(paths=[field.name for field, _ in token.ListFields()])
        yield "Update", pb.UpdateRequest(**named, token=token, update_mask=mask)
    yield "Disable", pb.DisableRequest(**named)
    yield "Enable", pb.EnableRequest(**named)
    yield "Rotate", pb.RotateRequest(**named)
    yield "Rotate", pb.RotateRequest(**named, grace=duration_pb2.Duration(seconds=60))
    yield "RetireSecrets", pb.RetireSecretsRequest(**named)
    yield "RevokeSecret", pb.RevokeSecretRequest(secrets=[secret, "x"])
    yield "DeleteAll", pb.DeleteAllRequest(account_id=other)
    yield "GetUsage", pb.GetUsageRequest(**named)
    yield "Find", pb.FindRequest(id=named["id"])


def _is_confirmed(response: Any) -> bool:
    return bool(response.receipt.HasField("effective_time"))

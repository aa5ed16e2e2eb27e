"""Connections to the service under load, and the calls that several operations share."""

import contextlib
import os
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.secret_format import Keyring

from tests.helpers.callers import (
    CALLERS,
    ca_pem,
    channel_credentials,
    credential,
    spiffe_identity,
    uri,
)
from tests.soak.patience import patiently

__all__ = [
    "CALL_SECONDS",
    "UNANSWERED",
    "Connections",
    "Place",
    "WrongAnswer",
    "bearer",
    "must_be",
    "must_end",
]

# Permanent channels, each with a separate connection: enough for both workers to get some.
CHANNELS = 8
CALL_SECONDS = 10.0
# The server is too busy, which fails a soak, but it has given no answer.
UNANSWERED = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)

# A separate connection for each channel. A connection attempt (which the option limits, despite its
# name) may take as long as a call, because a briefly busy machine is not a fault.
_CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.min_reconnect_backoff_ms", int(CALL_SECONDS * 1000)),
)

Metadata = tuple[tuple[str, str], ...]


class WrongAnswer(Exception):
    """An answer that must not occur."""


@dataclass(frozen=True)
class Place:
    """The service's address and files."""

    address: str
    tls_address: str
    pid: int
    keyring: Keyring
    policy: Path
    folder: Path


def bearer(name: str) -> Metadata:
    return (("authorization", f"Bearer {credential(name)}"),)


def must_be(found: object, expected: object, what: str) -> None:
    """Raise WrongAnswer if `found` is not what was expected."""
    if found != expected:
        raise WrongAnswer(f"{found}, not {expected}, for {what}")


async def must_end(call: Any, *codes: grpc.StatusCode) -> None:
    """Raise WrongAnswer if a call ends with none of these statuses."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if error.code() in UNANSWERED and error.code() not in codes:
            raise
    code = await call.code()
    if code not in codes:
        raise WrongAnswer(f"{code.name}, not {' or '.join(c.name for c in codes)}")


class Connections:
    """Permanent channels to the service, and new ones for each caller."""

    def __init__(self, place: Place, chance: random.Random) -> None:
        self._place = place
        self._random = chance
        self._channels: list[grpc.aio.Channel] = []
        self.stubs: list[Any] = []
        """A stub of TokenService on each permanent channel."""
        self.refused: Counter[str] = Counter()
        """Calls that were refused because of load and repeated, by method."""
        # The test covers the handshake, and not the generation of a key.
        self._credentials = {
            name: channel_credentials(spiffe_identity(uri(name))) for name in CALLERS
        }

    def open(self) -> None:
        """Open the permanent channels."""
        for _ in range(CHANNELS):
            channel = grpc.aio.insecure_channel(self._place.address, options=_CHANNEL_OPTIONS)
            self._channels.append(channel)
            self.stubs.append(pb_grpc.TokenServiceStub(channel))

    async def close(self) -> None:
        """Close the permanent channels."""
        for channel in self._channels:
            await channel.close()

    def channel(self) -> grpc.aio.Channel:
        return self._random.choice(self._channels)

    def stub(self) -> Any:
        return self._random.choice(self.stubs)

    def missing(self) -> str:
        """Return a secret that only the database can identify as unknown."""
        return self._place.keyring.mint("lk", os.urandom).secret.reveal()

    async def create(self, account: str, name: str) -> pb.CreateResponse:
        request = pb.CreateRequest(
            account_id=account, name=name, scope=pb.SCOPE_READ, request_id=str(uuid.uuid4())
        )
        answer: pb.CreateResponse = await self.manage("Create", request)
        return answer

    async def manage(self, method: str, request: Any, caller: str = "manager") -> Any:
        """Call a method that changes or lists tokens. If there is too much load, try again as the
        client library does."""
        return await self.repeat(getattr(self.stub(), method), request, caller, method)

    async def repeat(self, function: Any, request: Any, caller: str, kind: str) -> Any:
        """Do the same with the method `function` of any service. `kind` is for the report."""
        return await patiently(
            lambda seconds: function(request, timeout=seconds, metadata=bearer(caller)),
            CALL_SECONDS,
            self.refused,
            kind,
        )

    async def verify(self, stub: Any, secret: str) -> int:
        question = pb.VerifyRequest(secret=secret)
        answer = await self.repeat(stub.Verify, question, "verifier", "Verify")
        return int(answer.verdict)

    @contextlib.asynccontextmanager
    async def fresh(self, name: str | None = None) -> AsyncIterator[grpc.aio.Channel]:
        """Return a new channel, with this caller's certificate, or in plaintext."""
        if name is None:
            made = grpc.aio.insecure_channel(self._place.address, options=_CHANNEL_OPTIONS)
        else:
            made = grpc.aio.secure_channel(
                self._place.tls_address, self._credentials[name], options=_CHANNEL_OPTIONS
            )
        async with made as channel:
            yield channel

    def tls_files(self) -> dict[str, Any]:
        folder = self._place.folder
        files = {name: folder / f"{name}.pem" for name in ("tls_ca", "tls_certificate", "tls_key")}
        if not files["tls_ca"].exists():
            identity = spiffe_identity(uri("verifier"))
            files["tls_certificate"].write_bytes(identity.certificate)
            files["tls_key"].write_bytes(identity.key)
            files["tls_ca"].write_bytes(ca_pem())
        return files

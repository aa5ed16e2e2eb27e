"""The Verifier over real gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING

import latchkey
import pytest
from latchkey import Scope, Secret
from latchkey._retry import VERIFY_TIMEOUT_SECONDS
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.waiting import WAIT_SECONDS

if TYPE_CHECKING:
    from tests.contract.client.conftest import FakeLatchkey


async def test_a_live_secret_is_allowed(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str
) -> None:
    """The service judges a well-formed secret, for the requested scope."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    for presented in (secret, Secret(secret)):
        answer = await verifier.verify(presented, Scope.WRITE)
        assert answer.allowed
        assert answer.token is not None
        assert answer.token.id == "t1"
    assert fake.calls[0].request == pb.VerifyRequest(
        secret=secret, required_scope=pb.SCOPE_WRITE, spends_shares=True
    )


async def test_no_safe_answer_is_an_exception(
    dead_target: str, silent_target: str, secret: str
) -> None:
    """If the service cannot be reached or does not answer, verify raises."""
    for target in (dead_target, silent_target):
        async with latchkey.Verifier(target, timeout_seconds=0.3) as verifier:
            with pytest.raises(latchkey.Unavailable):
                await verifier.verify(secret)


async def test_a_call_can_only_shorten_the_deadline(fake: FakeLatchkey, secret: str) -> None:
    """The verifier's bound applies even if the call allows more time."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    assert VERIFY_TIMEOUT_SECONDS == 1
    async with latchkey.Verifier(fake.target, timeout_seconds=15) as verifier:
        await verifier.verify(secret, timeout_seconds=60)
        await verifier.verify(secret, timeout_seconds=10)
    first, second = (call.seconds_left for call in fake.calls)
    assert first is not None
    assert second is not None
    assert first <= 15.1
    assert second <= 10.1


async def test_a_client_that_was_passed_in_stays_open(fake: FakeLatchkey, secret: str) -> None:
    """Closing a verifier does not close a client that was passed in."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    async with latchkey.Client(fake.target, timeout_seconds=WAIT_SECONDS) as client:
        async with latchkey.Verifier(client, timeout_seconds=WAIT_SECONDS) as verifier:
            await verifier.verify(secret)
        assert (await client.verify(secret)).allowed
    with pytest.raises(latchkey.Unavailable):
        await verifier.verify(secret)

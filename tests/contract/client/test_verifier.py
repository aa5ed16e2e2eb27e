"""The client library's Verifier against real gRPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import latchkey
import pytest
from latchkey import Scope, Secret, Verdict
from latchkey._retry import VERIFY_TIMEOUT_SECONDS
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.support import WAIT_SECONDS

if TYPE_CHECKING:
    from tests.contract.client.conftest import FakeLatchkey


async def test_a_live_secret_is_allowed(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str
) -> None:
    """A well-formed secret is the service's to judge, with the scope that was asked about."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    for presented in (secret, Secret(secret)):
        answer = await verifier.verify(presented, Scope.WRITE)
        assert answer.allowed
        assert answer.token is not None
        assert answer.token.id == "t1"
    assert fake.calls[0].request == pb.VerifyRequest(secret=secret, required_scope=pb.SCOPE_WRITE)


async def test_what_is_no_secret_costs_no_call(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str
) -> None:
    """Garbage and typos are MALFORMED without a word to the service."""
    for presented in ("", "hunter2", "\ud800", secret + "\n", secret[:-1] + "!", secret.swapcase()):
        answer = await verifier.verify(presented)
        assert answer == latchkey.Verification(verdict=Verdict.MALFORMED)
        assert not answer.allowed
    assert fake.calls == []


@pytest.mark.parametrize("number", [0, 2, 3, 4, 5, 6, 99])
async def test_nothing_but_valid_is_allowed(
    verifier: latchkey.Verifier, fake: FakeLatchkey, secret: str, number: int
) -> None:
    """No other number in the answer, known or not, allows anything."""
    fake.on("Verify", fake.verdict(number))
    assert not (await verifier.verify(secret)).allowed


async def test_no_safe_answer_is_an_exception(
    dead_target: str, silent_target: str, secret: str
) -> None:
    """When the service cannot be reached or says nothing, there is no answer to misread."""
    for target in (dead_target, silent_target):
        async with latchkey.Verifier(target, timeout_seconds=0.3) as verifier:
            with pytest.raises(latchkey.Unavailable):
                await verifier.verify(secret)


async def test_a_call_can_only_shorten_the_deadline(fake: FakeLatchkey, secret: str) -> None:
    """The verifier's bound holds however long its caller would wait."""
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


async def test_a_given_client_stays_open(fake: FakeLatchkey, secret: str) -> None:
    """Closing a verifier leaves a client alone that somebody else made."""
    fake.on("Verify", fake.verdict(pb.VERDICT_VALID))
    async with latchkey.Client(fake.target, timeout_seconds=WAIT_SECONDS) as client:
        async with latchkey.Verifier(client, timeout_seconds=WAIT_SECONDS) as verifier:
            await verifier.verify(secret)
        assert (await client.verify(secret)).allowed
    with pytest.raises(latchkey.Unavailable):
        await verifier.verify(secret)


@pytest.mark.parametrize("scope", [Scope.UNSPECIFIED, "read", 1])
async def test_a_wrong_question_is_wrong_for_every_secret(
    verifier: latchkey.Verifier, scope: Any
) -> None:
    """A scope that is none is refused also where the secret alone would settle the answer."""
    with pytest.raises((latchkey.InvalidArgument, TypeError)):
        await verifier.verify("hunter2", scope)


def test_endless_bounds_are_refused() -> None:
    """A verifier without a bound cannot be made."""
    with pytest.raises(latchkey.InvalidArgument):
        latchkey.Verifier(timeout_seconds=float("inf"))

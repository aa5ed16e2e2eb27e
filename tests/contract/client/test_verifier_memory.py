"""The client library's Verifier answering from memory, against a scripted Watch over real gRPC."""

from __future__ import annotations

import latchkey
from latchkey import Scope, Verdict
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.contract.client.fake_watch import FakeWatch, watching
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.contract.client.conftest import FakeLatchkey


async def test_a_warm_verify_costs_no_call(
    watched: FakeLatchkey, secret: str
) -> None:
    """What the service said once is said again from memory, for every scope."""
    watched.on("Verify", watched.verdict(pb.VERDICT_VALID))
    async with latchkey.Verifier(watched.target) as verifier:
        await watching(verifier)
        assert verifier.verify_nowait(secret) is None
        first = await verifier.verify(secret, Scope.READ)
        assert await verifier.verify(secret) is first
        assert verifier.verify_nowait(secret, Scope.READ) is first
        refused = verifier.verify_nowait(secret, Scope.WRITE)
        assert refused is not None
        assert refused.verdict is Verdict.INSUFFICIENT_SCOPE
        assert refused.token == first.token
    assert watched.count("Verify") == 1

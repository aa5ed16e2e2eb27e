"""Which connections the guard counts as known callers' when the policy changes."""

import contextlib
from pathlib import Path

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.settings.settings import Settings

from tests.helpers.callers import credential, policy_text
from tests.helpers.calls import CHANNEL_OPTIONS, is_serving, outcome
from tests.helpers.servers import serving_as
from tests.helpers.waiting import WAIT_SECONDS, eventually
from tests.helpers.watch_client import WatchClient


def identity(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {credential(name)}"),)


async def test_a_revoked_caller_is_no_longer_known(
    settings: Settings, tmp_path: Path, transport: str
) -> None:
    """When the policy no longer has a caller, its connections count as a stranger's at once. A
    caller that stays keeps its Watch, and the connection with it stays known."""
    if transport != "grpcio":
        pytest.skip("the guard does not tell callers apart on `native`")
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text())
    settings = settings.model_copy(update={"policy": policy})
    async with serving_as(settings) as server, contextlib.AsyncExitStack() as stack:
        known = server.guard._known

        def names() -> set[str]:
            return {*known._new, *known._old}

        async def channel() -> grpc.aio.Channel:
            return await stack.enter_async_context(
                grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS)
            )

        one, two = await channel(), await channel()
        await eventually(lambda: is_serving(one), "it serves")
        assert not names()
        request = pb.VerifyRequest(secret="x")
        manager = identity("manager")
        denied = pb_grpc.TokenServiceStub(two).Verify(
            request, metadata=manager, timeout=WAIT_SECONDS
        )
        assert (await outcome(denied)).code is grpc.StatusCode.PERMISSION_DENIED
        (revoked,) = names()
        watch = WatchClient(pb_grpc.TokenServiceStub(one), identity("verifier"))
        await watch.granted()
        (watching_peer,) = names() - {revoked}
        await server.replace_policy(policy_text(["verifier"]))
        assert names() == {watching_peer}
        await watch.granted()
        watch.call.cancel()

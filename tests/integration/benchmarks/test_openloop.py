"""The open loop of `make bench` against the service, on both transports."""

import asyncio
import itertools

from latchkey_proto.v1 import token_service_pb2 as pb

from tests.benchmarks import openloop
from tests.benchmarks.openloop import Traffic
from tests.benchmarks.rows import SERVICE

# Few calls, and a longer time-out than a busy machine needs: all of them are answered.
PER_S, SECONDS, PATIENCE_SECONDS = 40.0, 0.5, 10.0


def traffic(method: str, request, begins_with: bytes = b"\x08\x01", **more) -> Traffic:
    path = method if method.startswith("/") else SERVICE + method
    requests = itertools.repeat(request.SerializeToString() if request is not None else b"")
    return Traffic(path, requests, begins_with, PER_S, timeout_seconds=PATIENCE_SECONDS, **more)


async def test_calls_are_answered_and_statuses_counted(address, create):
    """Verifies and health checks are OK, and rejected calls are counted under the status that the
    service returned, although the headers of each differ from all others."""
    token = await create()
    verify = pb.VerifyRequest(secret=token.secret, required_scope=pb.SCOPE_READ)
    done = await asyncio.to_thread(
        openloop.run,
        address,
        [
            traffic("Verify", verify),
            traffic("/grpc.health.v1.Health/Check", None, connections=1),
            traffic("Create", pb.CreateRequest(), seed=1),
            traffic("Get", pb.GetRequest(account_id="acme", id="tok_" + 26 * "0")),
            traffic("NoSuchMethod", None),
        ],
        warm_up_seconds=0.1,
        seconds=SECONDS,
    )
    verifies, checks, *others = done.outcomes
    for outcome in done.outcomes:
        assert outcome.held_back == 0
        assert outcome.sent == outcome.offered > 0
        assert outcome.tally.connections_lost == 0
    for outcome in (verifies, checks):
        assert outcome.tally.ok == outcome.sent == PER_S * SECONDS
        assert 0 < outcome.percentile_us(0.50) <= outcome.percentile_us(0.99)
    # INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED.
    for outcome, code in zip(others, (3, 5, 12), strict=True):
        assert outcome.tally.failed == {code: outcome.sent}


async def test_wrong_answers_are_counted(address, create):
    """An answer that starts differently than expected is counted as wrong."""
    token = await create()
    verify = pb.VerifyRequest(secret=token.secret, required_scope=pb.SCOPE_WRITE)
    done = await asyncio.to_thread(
        openloop.run, address, [traffic("Verify", verify)], warm_up_seconds=0.0, seconds=0.2
    )
    tally = done.outcomes[0].tally
    assert (tally.ok, tally.wrong) == (0, tally.sent)
    assert tally.sent > 0

"""The load of `make bench` against the service, on both transports."""

import asyncio
import itertools
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import grpc
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.benchmarks import load
from tests.benchmarks.load import Traffic
from tests.benchmarks.rows import SERVICE
from tests.helpers.calls import is_serving
from tests.helpers.raw_http2 import MAX_CONCURRENT_STREAMS, SETTINGS, Frame
from tests.helpers.waiting import eventually

# Few calls, and a longer time-out than a busy machine needs: all of them are answered.
PER_S, SECONDS, PATIENCE_SECONDS = 20.0, 0.5, 10.0


def traffic(method: str, request, begins_with: bytes = b"\x08\x01", **more) -> Traffic:
    path = method if method.startswith("/") else SERVICE + method
    requests = itertools.repeat(request.SerializeToString() if request is not None else b"")
    more = {"per_second": PER_S, "timeout_seconds": PATIENCE_SECONDS} | more
    return Traffic(path, requests, begins_with, **more)


async def test_calls_are_answered_and_statuses_counted(address, create):
    """Verifies and health checks are OK, and rejected calls are counted under the status that the
    service returned, although the headers of each differ from all others."""
    token = await create()
    verify = pb.VerifyRequest(secret=token.secret, required_scope=pb.SCOPE_READ)
    async with grpc.aio.insecure_channel(address) as channel:
        await eventually(lambda: is_serving(channel), "the server is healthy")
    done = await asyncio.to_thread(
        load.run,
        address,
        [
            traffic("Verify", verify),
            traffic("/grpc.health.v1.Health/Check", None, connections=1),
            traffic("Create", pb.CreateRequest(), connections=4),
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
        assert outcome.connections_lost == 0
    for outcome in (verifies, checks):
        assert outcome.ok == outcome.sent == PER_S * SECONDS
        assert 0 < outcome.percentile_us(0.50) <= outcome.percentile_us(0.99)
    # INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED.
    for outcome, code in zip(others, (3, 5, 12), strict=True):
        assert outcome.failed == {code: outcome.sent}


async def test_closed_loop_keeps_its_number_in_flight(address, create):
    """Without a rate, calls follow each other, and each counts that is answered in the stretch."""
    token = await create()
    verify = pb.VerifyRequest(secret=token.secret, required_scope=pb.SCOPE_READ)
    closed = traffic("Verify", verify, per_second=None, in_flight_max=3)
    done = await asyncio.to_thread(
        load.run, address, [closed], warm_up_seconds=0.1, seconds=SECONDS
    )
    (outcome,) = done.outcomes
    assert outcome.failures == 0
    assert outcome.ok == outcome.good > 3


async def test_wrong_answers_are_counted(address, create):
    """An answer that starts differently than expected is counted as wrong."""
    token = await create()
    verify = pb.VerifyRequest(secret=token.secret, required_scope=pb.SCOPE_WRITE)
    done = await asyncio.to_thread(
        load.run, address, [traffic("Verify", verify)], warm_up_seconds=0.0, seconds=0.2
    )
    (outcome,) = done.outcomes
    assert (outcome.ok, outcome.wrong) == (0, outcome.sent)
    assert outcome.sent > 0


def test_silent_server_does_not_slow_the_schedule():
    """Calls arrive on schedule at a server that stops answering: those that find no free stream are
    held back, the others are too late, and the percentiles say so."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        settings = Frame(SETTINGS, 0, 0, struct.pack(">HI", MAX_CONCURRENT_STREAMS, 2)).encoded()
        port = listener.getsockname()[1]
        silent = traffic("Verify", None, per_second=1_000.0, timeout_seconds=0.1)
        running = pool.submit(
            load.run, f"127.0.0.1:{port}", [silent], warm_up_seconds=0.1, seconds=0.2
        )
        listener.settimeout(PATIENCE_SECONDS)
        peer, _ = listener.accept()
        with peer:
            peer.sendall(settings)
            (outcome,) = running.result().outcomes
    assert outcome.offered == 200
    assert outcome.sent + outcome.held_back == outcome.offered
    assert outcome.too_late == outcome.failures == outcome.sent > 0
    assert outcome.held_back > 150
    assert outcome.percentile_us(0.5) == 0.1e6

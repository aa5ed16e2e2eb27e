"""One stretch of the open loop against a running server: a script for manual experiments.

    python -m tests.benchmarks.openloop_by_hand 127.0.0.1:50051 Create 20000 Verify 1000

Each method with its calls per second, all at the same time, with health checks besides.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator

import grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.benchmarks import openloop
from tests.benchmarks.openloop import Outcome, Traffic
from tests.benchmarks.openloop_connection import UNLIMITED
from tests.benchmarks.rows import SERVICE

HEALTH_PER_S = 50.0
CALL_SECONDS_MAX = 10.0
# Field 1 as a message; VERDICT_VALID; SERVING.
_FIELD_1, _ONE = b"\x0a", b"\x08\x01"


def main() -> None:
    """Run it and print the outcome."""
    options = _options()
    traffics = {
        "health": Traffic(
            "/grpc.health.v1.Health/Check", itertools.repeat(b""), _ONE, HEALTH_PER_S, 1
        )
    }
    for method, per_second in zip(options.load[::2], options.load[1::2], strict=True):
        requests = creates() if method == "Create" else _verifies(options.address)
        begins_with = _FIELD_1 if method == "Create" else _ONE
        traffics[method] = Traffic(
            *(SERVICE + method, requests, begins_with, float(per_second)),
            connections=options.connections,
            timeout_seconds=options.timeout,
            in_flight_max=options.in_flight,
            seed=options.seed,
        )
    done = openloop.run(
        options.address,
        list(traffics.values()),
        warm_up_seconds=options.warm_up,
        seconds=options.seconds,
    )
    form = "{:<8}" + " {:>9}" * 13
    lines = [
        form.format(
            *("method", "offered/s", "sent/s", "held/s", "ok/s", "refused/s", "unavail/s"),
            *("late/s", "other/s", "lost", "p50 µs", "p99 µs", "ref50 µs", "ref99 µs"),
        ),
        *(
            form.format(method, *_cells(outcome))
            for method, outcome in zip(traffics, done.outcomes, strict=True)
        ),
    ]
    lines.append(
        f"generator: {'kept up' if done.kept_up else 'DID NOT KEEP UP'}; "
        f"99 of 100 sent within {done.late_ms:.2f} ms; {done.cpu_share:.0%} of a core"
    )
    sys.stdout.write("\n".join(lines) + "\n")


def creates() -> Iterator[bytes]:
    """Yield requests for tokens with unique names."""
    run = os.urandom(6).hex()
    for number in itertools.count():
        yield pb.CreateRequest(
            account_id="bench-overload", name=f"{run} {number}", scope=pb.SCOPE_READ
        ).SerializeToString()


def _verifies(address: str) -> Iterator[bytes]:
    with grpc.insecure_channel(address) as channel:
        created = pb_grpc.TokenServiceStub(channel).Create(
            pb.CreateRequest.FromString(next(creates())), timeout=CALL_SECONDS_MAX
        )
    request = pb.VerifyRequest(secret=created.secret, required_scope=pb.SCOPE_READ)
    return itertools.repeat(request.SerializeToString())


def _cells(outcome: Outcome) -> list[str]:
    tally = outcome.tally
    rates = (
        *(outcome.offered, outcome.sent, outcome.held_back, tally.good, tally.refused),
        *(tally.unavailable, tally.too_late, tally.other),
    )
    return [
        *(f"{count / outcome.seconds:,.0f}" for count in rates),
        str(tally.connections_lost),
        *(f"{outcome.percentile_us(share):,.0f}" for share in (0.50, 0.99)),
        *(f"{outcome.refused_us(share):,.0f}" for share in (0.50, 0.99)),
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="HOST:PORT")
    parser.add_argument("load", nargs="+", help="METHOD PER_SECOND ...; Create or Verify")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--warm-up", type=float, default=0.5)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument(
        "--in-flight", type=int, default=UNLIMITED, help="at most, on each connection"
    )
    parser.add_argument("--timeout", type=float, default=1.0, help="the calls' deadline, seconds")
    parser.add_argument("--seed", type=int, help="arrivals by chance instead of evenly")
    return parser.parse_args()


if __name__ == "__main__":
    main()

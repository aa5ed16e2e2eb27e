"""A flood of made-up secrets with the right form and checksum: a script, run with an address.

It reads a number of seconds, calls Verify for that long at a bounded rate, and prints how many
calls returned UNKNOWN and how many did not.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator

from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.secret_format import Keyring, Pepper

from tests.benchmarks import load
from tests.benchmarks.rows import SERVICE

__all__ = ["CALLS_PER_S"]

CALLS_PER_S = 2_000
# In bursts of this size, two milliseconds apart.
IN_FLIGHT = 4
SECRETS = 5_000
# Only field 1, the verdict.
_UNKNOWN = bytes((0x08, pb.VERDICT_UNKNOWN))


def main(address: str) -> None:
    """Flood on request, until standard input closes."""
    # With a key that the service does not have: the tag is wrong.
    keyring = Keyring([Pepper(os.urandom(32))])
    requests = [
        pb.VerifyRequest(
            secret=keyring.mint("lk", os.urandom).secret.reveal(), required_scope=pb.SCOPE_READ
        ).SerializeToString()
        for _ in range(SECRETS)
    ]
    _say("ready")
    for line in sys.stdin:
        done = load.run(
            address,
            SERVICE + "Verify",
            _paced(requests),
            in_flight=IN_FLIGHT,
            warm_up_seconds=0.0,
            seconds=float(line),
            begins_with=_UNKNOWN,
        )
        _say(f"{done.calls} {done.failures}")


def _paced(requests: list[bytes]) -> Iterator[bytes]:
    began = time.monotonic()
    for number, request in enumerate(itertools.cycle(requests)):
        due = began + number / CALLS_PER_S
        if (wait := due - time.monotonic()) > 0:
            time.sleep(wait)
        yield request


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])

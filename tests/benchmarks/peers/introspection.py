"""Load over HTTP/1.1, for a product without gRPC: connections that each ask and wait in turn."""

import contextlib
import itertools
import re
import select
import socket
import time
from collections.abc import Callable, Sequence

from tests.benchmarks.load import LoadError, Outcome

__all__ = ["ask", "run"]

RECEIVE_BYTES = 1 << 15
WAIT_SECONDS_MAX = 10.0
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def run(
    address: str,
    requests: Sequence[bytes],
    allows: Callable[[bytes], bool],
    *,
    connections: int,
    warm_up_seconds: float,
    seconds: float,
    meter: Callable[[], tuple[float, ...]],
) -> tuple[Outcome, tuple[float, ...]]:
    """Send the requests over and over, one at a time on each connection. Return the
    outcomes of those answered after the warm-up, and what `meter` counted. Raises LoadError and
    OSError.
    """
    turn = itertools.cycle(requests)
    outcome = Outcome(WAIT_SECONDS_MAX)
    with contextlib.ExitStack() as stack:
        host, _, port = address.rpartition(":")
        began: dict[socket.socket, int] = {}
        received: dict[socket.socket, bytes] = {}
        for _ in range(connections):
            one = socket.create_connection((host, int(port)), WAIT_SECONDS_MAX)
            stack.callback(one.close)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            began[one], received[one] = time.perf_counter_ns(), b""
            one.sendall(next(turn))
        start = time.monotonic()
        begin, end = start + warm_up_seconds, start + warm_up_seconds + seconds
        before: tuple[float, ...] | None = None
        while (now := time.monotonic()) < end:
            if before is None and now >= begin:
                before, begin = meter(), now
            ready, _, _ = select.select(list(began), [], [], WAIT_SECONDS_MAX)
            if not ready:
                raise LoadError("the server does not answer")
            for one in ready:
                received[one] += (chunk := one.recv(RECEIVE_BYTES))
                if not chunk:
                    raise LoadError("the server closed a connection")
                if (body := _body(received[one])) is None:
                    continue
                if before is not None:
                    if allows(body):
                        outcome.good += 1
                        outcome.latencies.append(time.perf_counter_ns() - began[one])
                    else:
                        outcome.wrong += 1
                began[one], received[one] = time.perf_counter_ns(), b""
                one.sendall(next(turn))
        if before is None:
            raise LoadError("the server did not answer during the warm-up")
        outcome.seconds = time.monotonic() - begin
        outcome.latencies.sort()
        return outcome, tuple(b - a for a, b in zip(before, meter(), strict=True))


def ask(address: str, request: bytes, allows: Callable[[bytes], bool]) -> bool:
    """Send one request on a new connection, and return whether the answer allows it."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), WAIT_SECONDS_MAX) as one:
        one.sendall(request)
        received = b""
        while (body := _body(received)) is None:
            if not (chunk := one.recv(RECEIVE_BYTES)):
                raise LoadError("the server closed a connection")
            received += chunk
    return allows(body)


def _body(answer: bytes) -> bytes | None:
    """Return the body of a whole answer, or None if a part is missing."""
    head, blank, body = answer.partition(b"\r\n\r\n")
    if not blank:
        return None
    length = _LENGTH.search(head)
    if length is None or not head.startswith(b"HTTP/1.1 200"):
        raise LoadError(f"an unexpected answer: {head[:200]!r}")
    return body if len(body) >= int(length[1]) else None

"""The API Tokens page: server time and weight of its first page.

A separate part besides the table, because a browser's request is not a gRPC call, and no other
server is compared. One request at a time over a kept-alive connection, as a person makes them. The
page runs on a separate core, in front of the service that the other rows use.
"""

import contextlib
import http.client
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

__all__ = ["Page", "measure"]

TOKENS = 1_000
ACCOUNT = "bench-page"
REQUESTS, QUICK_REQUESTS = 300, 60
WARM_UP = 20
CALL_SECONDS_MAX = 10.0
START_SECONDS_MAX = 30.0
P50_MS_MAX = 30.0
WEIGHT_KB_MAX = 100.0
_ADDRESS = re.compile(r"API Tokens: http://(\S+) ")


@dataclass(frozen=True, slots=True)
class Page:
    """The result. Times are in ms: p50 and p99 from the request's start to the answer's end."""

    tokens: int
    requests: int
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """CPU of the page's process per request, which neighbours on the machine change little."""
    weight_kb: float
    """The page with its script, style sheet and picture, as they are sent: uncompressed."""
    met: bool

    def lines(self) -> list[str]:
        """Return it as readable lines."""
        wanted = f"(wanted: p50 ≤ {P50_MS_MAX:.0f} ms)"
        times = f"p50 {self.p50_ms:.1f} ms, p99 {self.p99_ms:.1f} ms, CPU {self.cpu_ms:.1f} ms"
        return [
            f"First page of an account with {self.tokens:,} tokens, {self.requests} one at a time:",
            f"  server time {times} {wanted}",
            f"  weight {self.weight_kb:.1f} KB (wanted: ≤ {WEIGHT_KB_MAX:.0f} KB)",
            f"  {'PASS' if self.met else 'MISS'}",
        ]

    def document(self) -> dict[str, Any]:
        """Return it for the file."""
        return asdict(self)


def measure(target: str, scratch: Path, core: int, *, quick: bool) -> Page:
    """Fill an account of the service at `target`, run the page on `core`, and measure it."""
    _fill(target)
    with _page(target, scratch, core) as (address, process):
        connection = http.client.HTTPConnection(address, timeout=CALL_SECONDS_MAX)
        try:
            return _measured(connection, process, QUICK_REQUESTS if quick else REQUESTS)
        finally:
            connection.close()


def _measured(
    connection: http.client.HTTPConnection, process: psutil.Process, requests: int
) -> Page:
    page, took, cpu = b"", [], 0.0
    for number in range(WARM_UP + requests):
        if number == WARM_UP:
            cpu = sum(process.cpu_times()[:2])
        began = time.perf_counter()
        page = _get(connection, "/")
        if number >= WARM_UP:
            took.append((time.perf_counter() - began) * 1e3)
    cpu = (sum(process.cpu_times()[:2]) - cpu) / requests * 1e3
    # A fast wrong answer is not a result.
    rows, total = page.count(b'<tr role="row" id='), b">50</span> of 1,000 tokens" in page
    if rows != 50 or not total:
        raise SystemExit(f"the page has {rows} rows, and {'' if total else 'not '}the right total")
    paths = sorted(set(re.findall(rb'(?:src|href)="(/static/[^"]+)"', page)))
    weight = len(page) + sum(len(_get(connection, path.decode())) for path in paths)
    took.sort()
    p50, p99 = statistics.median(took), took[int(len(took) * 0.99) - 1]
    kilobytes = weight / 1_000
    met = p50 <= P50_MS_MAX and kilobytes <= WEIGHT_KB_MAX
    return Page(
        tokens=TOKENS,
        requests=requests,
        p50_ms=round(p50, 2),
        p99_ms=round(p99, 2),
        cpu_ms=round(cpu, 2),
        weight_kb=round(kilobytes, 1),
        met=met,
    )


def _get(connection: http.client.HTTPConnection, path: str) -> bytes:
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise SystemExit(f"the page answered {answer.status} to {path}")
    return body


def _fill(target: str) -> None:
    """Create varied tokens, as real users would. Existing ones stay."""
    with grpc.insecure_channel(target) as channel:
        stub = pb_grpc.TokenServiceStub(channel)
        for number in range(TOKENS):
            request = pb.CreateRequest(
                account_id=ACCOUNT,
                name=f"service {number:04} of the platform",
                scope=pb.SCOPE_WRITE if number % 3 == 0 else pb.SCOPE_READ,
            )
            if number % 4:
                request.ttl.seconds = 86_400 * (number % 300 + 1)
            try:
                stub.Create(request, timeout=CALL_SECONDS_MAX)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    raise


@contextlib.contextmanager
def _page(target: str, scratch: Path, core: int) -> Iterator[tuple[str, psutil.Process]]:
    """Run the page as its users do; once it answers, yield its address and its process."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LATCHKEY_")}
    before = os.sched_getaffinity(0)
    with (scratch / "page.out").open("w+") as out, (scratch / "page.log").open("wb") as log:
        os.sched_setaffinity(0, {core})
        try:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "latchkey_cli", "console", "--listen", "127.0.0.1:0"),
                    *("--account", ACCOUNT, "--target", target),
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                cwd=scratch,
                env=inherited,
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, before)
        try:
            give_up = time.monotonic() + START_SECONDS_MAX
            while (match := _ADDRESS.search((scratch / "page.out").read_text("utf-8"))) is None:
                if process.poll() is not None or time.monotonic() > give_up:
                    said = (scratch / "page.log").read_text("utf-8", "replace")
                    raise SystemExit(f"the page did not start; its log ends:\n{said[-2000:]}")
                time.sleep(0.02)
            yield match[1], psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(START_SECONDS_MAX)

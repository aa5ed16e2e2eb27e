"""Verifies of a known caller beside a flood of anonymous calls, over `native` and over TLS.

Slices with and without the flood alternate, so other load of the machine affects both alike: only
the ratios count. The verifies arrive on a schedule (an open loop), and each has a second. Runs as a
part of `make bench`, and alone: `python -m tests.benchmarks.flood DATABASE_URL`.
"""

import asyncio
import contextlib
import functools
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.helpers.anonymous_flood import flooding
from tests.helpers.callers import ca_pem, credential, policy_text, write_server_files
from tests.helpers.calls import CHANNEL_OPTIONS, is_serving
from tests.helpers.free_ports import free_port
from tests.helpers.service_process import service
from tests.helpers.waiting import eventually

__all__ = ["SECONDS_MAX", "TITLE", "Slice", "document", "lines", "measure", "problems"]

TITLE = "anonymous flood"
LISTENERS = ("native", "tls")
ROUNDS, SECONDS = 6, 3.0
QUICK_ROUNDS, QUICK_SECONDS = 1, 2.0
# The share of the run that this part may take.
SECONDS_MAX = 120.0
# Below the capacity of either listener on a busy core.
PER_SECOND = 200
DEADLINE_SECONDS = 1.0
# Connections of the flood. It keeps as many calls open on each as the server allows.
CONNECTIONS = 50
# The flood connects, and its first calls are answered, before a slice is measured.
SETTLE_SECONDS = 1.5
GOODPUT_MIN, P99_MAX = 0.9, 5.0
# From the middle third of the rounds to the last.
GROWTH_MAX = 0.1


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice's share of verifies that were answered in time, p99 and the worker's memory."""

    goodput: float
    p99_ms: float
    resident_mib: float


@dataclass(slots=True)
class Result:
    """The slices of a listener, without and with the flood. Slices of a round have one index."""

    quiet: list[Slice] = field(default_factory=list)
    flooded: list[Slice] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Return the median ratio of goodput with the flood to that without."""
        return statistics.median(f.goodput / q.goodput for q, f in self._rounds())

    @property
    def p99(self) -> float:
        """Return the median ratio of p99 with the flood to that without."""
        return statistics.median(f.p99_ms / q.p99_ms for q, f in self._rounds())

    @property
    def thirds(self) -> tuple[float, float]:
        """Return the worker's median memory in the middle third of the rounds and in the last.

        The first third does not count. The allocator keeps the memory of a burst, and the refusals
        of the first floods wait for up to half a minute, so memory grows until both are full.
        """
        rounds = [max(q.resident_mib, f.resident_mib) for q, f in self._rounds()]
        third = max(1, len(rounds) // 3)
        last = statistics.median(rounds[-third:])
        return statistics.median(rounds[third:-third] or [last]), last

    @property
    def growth(self) -> float:
        """Return the relative growth of memory from the middle third of the rounds to the last."""
        middle, last = self.thirds
        return last / middle - 1

    def _rounds(self) -> list[tuple[Slice, Slice]]:
        return list(zip(self.quiet, self.flooded, strict=True))


def measure(
    database_url: str, pepper_file: Path | None = None, *, quick: bool = False
) -> dict[str, Result]:
    """Measure both listeners of one service. Without a pepper file, the database must be empty."""
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if quick else (ROUNDS, SECONDS)
    with _folder() as folder:
        policy = folder / "policy.toml"
        policy.write_text(policy_text())
        files: dict[str, Any] = write_server_files(folder)
        # With it, callers without a certificate could not connect.
        del files["tls_client_ca"]
        ca = folder / "ca.pem"
        ca.write_bytes(ca_pem())
        given: dict[str, Any] = {"database_url": database_url, "policy": policy}
        if pepper_file is not None:
            given["pepper_file"] = pepper_file
        tls = f"localhost:{free_port()}"
        with service(
            folder / "service",
            listen="127.0.0.1:0",
            transport="native",
            tls_listen=tls,
            log_format="json",
            data_dir=folder / "data",
            **given,
            **files,
        ) as running:
            return asyncio.run(_measure(running, tls, ca, rounds, seconds))


async def _measure(
    running: Any, tls: str, ca: Path, rounds: int, seconds: float
) -> dict[str, Result]:
    addresses = {"native": await running.welcome(), "tls": tls}
    (pid,) = running.worker_pids
    worker = psutil.Process(pid)
    secret = await _create(addresses["native"])
    results = {name: Result() for name in LISTENERS}
    order = random.Random(1)  # noqa: S311 - for order, not for secrets
    for _, name in itertools.product(range(rounds), LISTENERS):
        own = functools.partial(_verifies, addresses[name], name == "tls", secret, seconds)
        floods = [False, True]
        order.shuffle(floods)
        for flooded in floods:
            with contextlib.ExitStack() as stack:
                if flooded:
                    stack.enter_context(
                        flooding(
                            addresses[name],
                            connections=CONNECTIONS,
                            seconds=seconds + 30,
                            ca=ca if name == "tls" else None,
                        )
                    )
                await asyncio.sleep(SETTLE_SECONDS)
                goodput, p99_ms = await own()
                found = Slice(goodput, p99_ms, worker.memory_info().rss / 2**20)
            (results[name].flooded if flooded else results[name].quiet).append(found)
    if running.worker_pids != [pid]:
        raise RuntimeError("the flood ended the worker")
    return results


async def _create(address: str) -> str:
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        await eventually(functools.partial(is_serving, channel), "it serves")
        created = await pb_grpc.TokenServiceStub(channel).Create(
            pb.CreateRequest(account_id="acme", name="measured", scope=pb.SCOPE_READ),
            metadata=_presented("manager"),
            timeout=5,
        )
        secret: str = created.secret
        return secret


async def _verifies(
    address: str, encrypted: bool, secret: str, seconds: float
) -> tuple[float, float]:
    """Verify on a schedule. Return the share of answers in time, and p99 of those in ms."""
    if encrypted:
        credentials = grpc.ssl_channel_credentials(ca_pem())
        made = grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
    else:
        made = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    took: list[float] = []
    request, metadata = pb.VerifyRequest(secret=secret), _presented("verifier")
    async with made as channel:
        stub = pb_grpc.TokenServiceStub(channel)

        async def verify(due: float) -> None:
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await stub.Verify(request, metadata=metadata, timeout=DEADLINE_SECONDS)
                if answer.verdict == pb.VERDICT_VALID:
                    took.append(time.monotonic() - due)

        await verify(time.monotonic())
        took.clear()
        calls = []
        began, count = time.monotonic(), round(PER_SECOND * seconds)
        for number in range(count):
            due = began + number / PER_SECOND
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            calls.append(asyncio.create_task(verify(due)))
        await asyncio.gather(*calls)
    took.sort()
    p99 = took[min(len(took) - 1, int(0.99 * len(took)))] if took else DEADLINE_SECONDS
    return len(took) / count, p99 * 1_000


def _presented(name: str) -> Sequence[tuple[str, str]]:
    return (("authorization", f"Bearer {credential(name)}"),)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Create a folder that the service's account can enter."""
    with tempfile.TemporaryDirectory(prefix="latchkey-bench-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def lines(results: dict[str, Result]) -> list[str]:
    """Return the results for people."""
    return [
        f"{TITLE}, {name}: goodput {found.goodput:.2f}, p99 {found.p99:.1f} times that without it "
        f"({statistics.median(s.p99_ms for s in found.quiet):.1f} ms), memory "
        f"{found.thirds[0]:.0f} to {found.thirds[1]:.0f} MiB"
        for name, found in results.items()
    ]


def document(results: dict[str, Result]) -> dict[str, Any]:
    """Return the results as JSON."""
    return {
        name: {"goodput": found.goodput, "p99": found.p99, "growth": found.growth}
        for name, found in results.items()
    }


def problems(results: dict[str, Result]) -> list[str]:
    """Return the targets that were missed."""
    found = []
    for name, result in results.items():
        if result.goodput < GOODPUT_MIN:
            found.append(f"{TITLE}, {name}: goodput {result.goodput:.2f}, not {GOODPUT_MIN}")
        if result.p99 > P99_MAX:
            found.append(f"{TITLE}, {name}: p99 {result.p99:.1f} times, not {P99_MAX}")
        if result.growth > GROWTH_MAX:
            found.append(f"{TITLE}, {name}: memory grew by {result.growth:.0%}")
    return found


if __name__ == "__main__":
    measured = measure(sys.argv[1], quick="--quick" in sys.argv)
    for line in [*lines(measured), *problems(measured)]:
        print(line)  # noqa: T201 - for a person

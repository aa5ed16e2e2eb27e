"""A cache by itself: the time of an answer in the client, and the size of an entry in the
server."""

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import psutil
from latchkey import Scope, Verifier
from latchkey._key import secret_hash
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.benchmarks import processes
from tests.benchmarks.coherence_figures import Bench, Figure

__all__ = ["entries", "in_process", "watches"]

# Secrets that a client has cached: as many as a busy service sees, and more than fit into a core's
# cache.
KNOWN = 10_000
# Passes per slice, a fifth of a second: no longer, because the lease is renewed in between.
PASSES = 5
WATCH_SECONDS_MAX = 20.0
POLL_SECONDS = 0.02
CALL_SECONDS_MAX = 20.0
BATCH = 1_000
# Batches in flight: while one is read here, the next is answered.
BATCHES_IN_FLIGHT = 3
# The share of the entries that is read before memory is first measured.
FIRST_SHARE = 0.02
# Half a minute for a million on a quiet machine. On a busy one the cache stays smaller.
FILL_SECONDS_MAX = 75.0
ENTRY_BYTES_MAX = 500.0
# A verify that reaches Postgres costs it about 15 µs.
REMEMBERED_POSTGRES_US_MAX = 3.0


def in_process(bench: Bench) -> Iterator[Figure]:
    """Compare `verify_nowait` with its lower limit: a hash and a dict look-up."""
    yield from asyncio.run(_in_process(bench))


async def _in_process(bench: Bench) -> list[Figure]:
    known = [secret for secret, _ in bench.seeded["usual"].secrets[:KNOWN]]
    floors, recalls = [], []
    async with Verifier(bench.servers["native"].address) as verifier:
        await watches(verifier)
        await asyncio.gather(*(verifier.verify(secret, Scope.READ) for secret in known))
        table = {secret_hash(s.encode()).digest(): verifier.verify_nowait(s) for s in known}
        for _ in range(bench.rounds * 3):
            floors.append(_floor(known, table))
            recalls.append(_recall(known, verifier))
            # Time to renew the lease.
            await asyncio.sleep(POLL_SECONDS)
    ratios = [floor / recall for floor, recall in zip(floors, recalls, strict=True)]
    name = "verify_nowait, warm"
    return [
        Figure.median("hash and dict.get alone", "calls/s", floors),
        Figure.median(f"{name}, of a core", "calls/s", recalls, at_least=250_000),
        Figure.median(f"{name}, by hash and dict.get alone", "times", ratios, at_most=2.5),
    ]


def _floor(known: Sequence[str], table: dict[bytes, Any]) -> float:
    """Return how many there are per second of a core."""
    find = table.get
    began = time.thread_time()
    for _ in range(PASSES):
        for secret in known:
            find(secret_hash(secret.encode()).digest())
    return PASSES * len(known) / (time.thread_time() - began)


def _recall(known: Sequence[str], verifier: Verifier) -> float:
    verify, scope = verifier.verify_nowait, Scope.READ
    hits = verifier.stats().hits
    began = time.thread_time()
    for _ in range(PASSES):
        for secret in known:
            verify(secret, scope)
    took = time.thread_time() - began
    if (found := verifier.stats().hits - hits) != PASSES * len(known):
        raise RuntimeError(f"only {found} of {PASSES * len(known)} were answered from the cache")
    return PASSES * len(known) / took


def entries(bench: Bench) -> Iterator[Figure]:
    """Fill a worker's cache from the largest database, and measure its growth."""
    number = bench.seeded["large"].tokens
    settings = bench.settings("large", CACHE_ENTRIES=number)
    first = int(number * FIRST_SHARE)
    with (
        processes.latchkey(bench.scratch, "entries", settings, {bench.cores.server}) as server,
        grpc.insecure_channel(server.address) as channel,
        bench.secrets_file.open(encoding="ascii") as file,
    ):
        secrets = (line.rstrip() for line in file)
        worker = psutil.Process(server.pid)
        began = time.monotonic()
        _verify(channel, itertools.islice(secrets, first))
        before = worker.memory_info().rss
        until = began + FILL_SECONDS_MAX
        added = _verify(channel, itertools.takewhile(lambda _: time.monotonic() < until, secrets))
        grown = worker.memory_info().rss - before
        rate = (first + added) / (time.monotonic() - began)
        # Otherwise the oldest entries would be evicted first.
        file.seek(0)
        meter = processes.meter(server, bench.postmaster)
        _, postgres = meter()
        _verify(channel, (line.rstrip() for line in itertools.islice(file, first)))
        if (meter()[1] - postgres) / first * 1e6 > REMEMBERED_POSTGRES_US_MAX:
            raise RuntimeError("the worker has not cached all entries")
    yield Figure.median("BatchVerify of 1,000 into an empty cache", "secrets/s", [rate])
    yield Figure.median(
        f"server memory per entry, of {first + added:,}",
        "bytes",
        [grown / added],
        at_most=ENTRY_BYTES_MAX,
    )


def _verify(channel: grpc.Channel, secrets: Iterator[str]) -> int:
    """Verify them in batches; return the number. Raises RuntimeError if one is not valid."""
    stub = pb_grpc.TokenServiceStub(channel)
    number = 0
    under_way: list[Any] = []

    def check(call: Any) -> None:
        for answer in call.result().responses:
            if answer.verdict != pb.VERDICT_VALID:
                raise RuntimeError(f"BatchVerify: {pb.Verdict.Name(answer.verdict)}")

    while batch := list(itertools.islice(secrets, BATCH)):
        questions = [pb.VerifyRequest(secret=s, required_scope=pb.SCOPE_READ) for s in batch]
        request = pb.BatchVerifyRequest(requests=questions)
        number += len(batch)
        under_way.append(stub.BatchVerify.future(request, timeout=CALL_SECONDS_MAX))
        if len(under_way) == BATCHES_IN_FLIGHT:
            check(under_way.pop(0))
    for call in under_way:
        check(call)
    return number


async def watches(verifier: Verifier) -> None:
    """Wait until the client may cache its answers."""
    give_up = time.monotonic() + WATCH_SECONDS_MAX
    while not (stats := verifier.stats()).watching:
        if time.monotonic() > give_up:
            raise RuntimeError(f"a client does not watch: {stats.fallback_reason}")
        await asyncio.sleep(POLL_SECONDS)

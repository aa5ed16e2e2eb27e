"""Verifies that cross the network: during a flood of garbage, and as cache misses of the client."""

import asyncio
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from latchkey import Scope, Verdict, Verifier
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.secret_format import Keyring, Pepper

from tests.benchmarks import load
from tests.benchmarks.answers import remember
from tests.benchmarks.coherence_figures import Bench, Figure
from tests.benchmarks.coherence_memory import watches
from tests.benchmarks.load import Traffic
from tests.benchmarks.rows import IN_FLIGHT, SERVICE, WARM_SECRETS
from tests.benchmarks.seed import Seeded

__all__ = ["flood", "misses"]

# A busy service below its limit.
MODERATE = 8
WARM_UP_SECONDS = 0.2
CALLS_PER_S = 2_000
MADE_UP_SECRETS = 5_000
# Below this share of the stated rate it was not such a flood.
FLOOD_SHARE_MIN = 0.9
_VALID = bytes((0x08, pb.VERDICT_VALID, 0x12))
# Only field 1, the verdict.
_UNKNOWN = bytes((0x08, pb.VERDICT_UNKNOWN))


def flood(bench: Bench) -> Iterator[Figure]:
    """Compare valid traffic's p99 with and without a flood."""
    server, usual = bench.servers["native"], bench.seeded["usual"]
    remember(server.address, usual.secrets[:WARM_SECRETS])
    requests = itertools.cycle(
        [
            pb.VerifyRequest(secret=secret, required_scope=pb.SCOPE_READ).SerializeToString()
            for secret, _ in usual.secrets[:WARM_SECRETS]
        ]
    )

    made_up = itertools.cycle(_made_up())

    def p99(*beside: Traffic) -> float:
        valid = Traffic(SERVICE + "Verify", requests, _VALID, in_flight_max=MODERATE)
        run = load.run(
            server.address,
            [valid, *beside],
            warm_up_seconds=WARM_UP_SECONDS,
            seconds=bench.slice_seconds,
        )
        verifies, *floods = run.outcomes
        if verifies.failures:
            raise RuntimeError(f"{verifies.failures} valid secrets were refused")
        for outcome in floods:
            if outcome.failures:
                raise RuntimeError(f"{outcome.failures} made-up secrets were not answered UNKNOWN")
            rates.append(outcome.goodput)
        return verifies.percentile_us(0.99)

    calm, flooded = [], []
    rates: list[float] = []
    for number in range(bench.rounds):
        # In turns, so that interference on the machine affects both sides.
        for with_flood in (False, True) if number % 2 else (True, False):
            if with_flood:
                flooded.append(p99(Traffic(SERVICE + "Verify", made_up, _UNKNOWN, CALLS_PER_S)))
            else:
                calm.append(p99())
    flood_name = f"{CALLS_PER_S:,} made-up secrets/s"
    rate = Figure.median("Flood of made-up secrets, all UNKNOWN", "calls/s", rates)
    if rate.value < FLOOD_SHARE_MIN * CALLS_PER_S:
        flood_name = f"only {rate.value:,.0f} made-up secrets/s"
    name = f"Verify, warm, {MODERATE} in flight"
    ratios = [with_ / without for with_, without in zip(flooded, calm, strict=True)]
    yield rate
    yield Figure.median(f"{name}, p99", "µs", calm)
    yield Figure.median(f"{name}, p99 beside {flood_name}", "µs", flooded)
    yield Figure.median(f"{name}, p99 beside {flood_name} by without", "times", ratios, at_most=1.5)


def _made_up() -> list[bytes]:
    """Return requests with the right form and checksum. Their tag is wrong, because the service
    does not have the key."""
    keyring = Keyring([Pepper(os.urandom(32))])
    secrets = (keyring.mint("lk", os.urandom).secret.reveal() for _ in range(MADE_UP_SECRETS))
    return [
        pb.VerifyRequest(secret=secret, required_scope=pb.SCOPE_READ).SerializeToString()
        for secret in secrets
    ]


def misses(bench: Bench) -> Iterator[Figure]:
    """Verify uncached secrets with the client library, on servers with and without a cache."""
    usual = bench.seeded["usual"]
    remember(bench.servers["native"].address, usual.secrets[:WARM_SECRETS])
    for kind, run in asyncio.run(_misses(bench, usual)).items():
        name = f"client misses, {IN_FLIGHT} in flight, of a server that {kind}"
        wanted = 20_000 if kind == "remembers" else None
        yield Figure.median(name, "calls/s", run.rates, at_least=wanted)
        yield Figure.median(f"{name}, CPU of the client", "µs", run.client_us)


@dataclass(slots=True)
class _Run:
    """Slices of one client's misses."""

    rates: list[float] = field(default_factory=list)
    # CPU per miss.
    client_us: list[float] = field(default_factory=list)


async def _misses(bench: Bench, usual: Seeded) -> dict[str, _Run]:
    ids = dict(usual.secrets[:WARM_SECRETS])
    # It caches a single secret, so that it does all the work of caching and never has the next
    # secret.
    remembers = Verifier(bench.servers["native"].address, cache_entries=1)
    # A server without a cache does not allow Watch.
    reads = Verifier(bench.servers["reading"].address, cache_entries=0)
    runs = {"remembers": _Run(), "reads": _Run()}
    async with remembers, reads:
        await watches(remembers)
        secrets = itertools.cycle(ids.items())
        for _ in range(bench.rounds):
            for verifier, run in zip((remembers, reads), runs.values(), strict=True):
                await _slice(verifier, secrets, WARM_UP_SECONDS)
                cpu = time.process_time()
                calls, took = await _slice(verifier, secrets, bench.slice_seconds)
                run.rates.append(calls / took)
                run.client_us.append((time.process_time() - cpu) / calls * 1e6)
        if hits := remembers.stats().hits + reads.stats().hits:
            raise RuntimeError(f"{hits} of them were no misses")
    return runs


async def _slice(
    verifier: Verifier, secrets: Iterator[tuple[str, str]], seconds: float
) -> tuple[int, float]:
    """Verify without a pause; return the number of verifies and the seconds."""
    clock = time.perf_counter
    began = clock()
    calls = 0

    async def ask() -> None:
        nonlocal calls
        while clock() - began < seconds:
            secret, token_id = next(secrets)
            answer = await verifier.verify(secret, Scope.READ)
            if answer.verdict is not Verdict.VALID or answer.token is None:
                raise RuntimeError(f"a valid secret was answered {answer.verdict.name}")
            if answer.token.id != token_id:
                raise RuntimeError("a secret was answered with another one's token")
            calls += 1

    await asyncio.gather(*(ask() for _ in range(IN_FLIGHT)))
    return calls, clock() - began

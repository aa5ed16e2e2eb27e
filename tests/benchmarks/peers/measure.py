"""The rounds, the deletions and the table of `make bench ARGS=--peers`."""

import contextlib
import itertools
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import grpc

from tests.benchmarks import load, processes
from tests.benchmarks.peers import introspection
from tests.benchmarks.peers.programs import Unavailable
from tests.benchmarks.peers.servers import (
    CREDENTIALS,
    PRODUCTS,
    GrpcCheck,
    HttpCheck,
    Running,
)

__all__ = ["Result", "lines", "measure", "write"]

ROUNDS, SECONDS, WARM_UP_SECONDS = 7, 1.2, 0.6
IN_FLIGHT = 32
# The last credentials are deleted, and the rest are checked in the rounds.
DELETIONS = 20
CHECKED = CREDENTIALS - 2 * DELETIONS
# Deletions that take seconds to be felt are repeated less often.
DELETIONS_SECONDS_MAX = 60.0
# Longer than any cache here keeps an answer.
STALE_SECONDS_MAX = 90.0
CALL_SECONDS_MAX = 20.0


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice: checks per second and their median at IN_FLIGHT and at one, CPU per check."""

    per_second: float
    server_cpu_us: float
    alone_p50_us: float


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured of one product.

    `stale_ms` has, for each deletion, how long after its confirmation the last accepted check
    began; 0 if none was accepted.
    """

    name: str
    version: str
    slices: list[Slice]
    delete_ms: list[float]
    stale_ms: list[float]

    def document(self, first: "Result") -> dict[str, Any]:
        """Return it for the file, with medians. `first` is the product that others are compared
        with."""
        return {
            "name": self.name,
            "version": self.version,
            "checks_per_second": round(_median(s.per_second for s in self.slices)),
            "times_slower": round(_times(first, self), 2),
            "server_cpu_us": round(_median(s.server_cpu_us for s in self.slices)),
            "alone_p50_us": round(_median(s.alone_p50_us for s in self.slices)),
            "delete_p50_ms": round(statistics.median(self.delete_ms), 1),
            "stale_ms": {
                "median": round(statistics.median(self.stale_ms)),
                "longest": round(max(self.stale_ms)),
                "deletions": len(self.stale_ms),
            },
        }


async def _create_database(postgres_url: str, name: str) -> str:
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
    return urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))


def measure(
    scratch: Path,
    placing: str,
    run: Callable[..., Any],
    say: Callable[[str], None],
    *,
    rounds: int = ROUNDS,
    only: str = "",
) -> tuple[list[Result], dict[str, str]]:
    """Measure all products that can be installed here. Return the results, and why the others are
    missing. Latchkey comes first."""
    cores = processes.cores(placing)
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        url, _ = stack.enter_context(processes.postgres(scratch / "data", {cores.postgres}))
        running: list[Running] = []
        for name, product in PRODUCTS.items():
            if only not in name and name != "latchkey":
                continue
            say(f"Starting {name}")
            database = run(_create_database(url, f"peer_{name}"))
            try:
                running += stack.enter_context(product(scratch, database, cores.server))
            except (Unavailable, RuntimeError, OSError) as error:
                if name == "latchkey":
                    raise
                missing[name] = str(error)
                say(f"  not measured: {error}")
        os.sched_setaffinity(0, {cores.load})
        slices: dict[str, list[Slice]] = defaultdict(list)
        for number in range(rounds):
            began = time.monotonic()
            # Each round begins with another product, so that none is always first.
            turn = number % len(running)
            for one in running[turn:] + running[:turn]:
                slices[one.name].append(_slice(one))
            say(f"Round {number + 1} of {rounds}: {time.monotonic() - began:.0f} s")
        results = []
        for place, one in enumerate(running):
            say(f"Deleting from {one.name}")
            # Two variants may share their credentials.
            delete_ms, stale_ms = _deletions(one, CHECKED + (place % 2) * DELETIONS)
            results.append(Result(one.name, one.version, slices[one.name], delete_ms, stale_ms))
        return results, missing


def _slice(one: Running) -> Slice:
    many, cpu = _run(one, IN_FLIGHT)
    alone, _ = _run(one, 1)
    return Slice(many.goodput, cpu / many.ok * 1e6, alone.percentile_us(0.5))


def _run(one: Running, in_flight: int) -> tuple[load.Outcome, float]:
    """Run one slice; return the outcome and the server's CPU seconds."""
    check = one.check
    meter: Callable[[], tuple[float, ...]] = lambda: (processes.cpu_seconds(one.pid),)  # noqa: E731
    try:
        if isinstance(check, HttpCheck):
            outcome, (cpu,) = introspection.run(
                check.address,
                check.requests[:CHECKED],
                check.allows,
                connections=in_flight,
                warm_up_seconds=WARM_UP_SECONDS,
                seconds=SECONDS,
                meter=meter,
            )
        else:
            traffic = load.Traffic(
                check.path,
                itertools.cycle(check.requests[:CHECKED]),
                check.begins_with,
                in_flight_max=in_flight,
                metadata=check.metadata,
            )
            measured = load.run(
                check.address,
                [traffic],
                warm_up_seconds=WARM_UP_SECONDS,
                seconds=SECONDS,
                meter=meter,
            )
            outcome, (cpu,) = measured.outcomes[0], measured.metered
            wrong = sum(not check.allows(answer) for _, answer in outcome.samples)
            if wrong:
                raise SystemExit(f"{one.name}: {wrong} of {len(outcome.samples)} answers are wrong")
    except (load.LoadError, OSError) as error:
        raise SystemExit(f"{one.name}: {error}") from error
    if not outcome.ok or outcome.failures:
        raise SystemExit(f"{one.name}: {outcome.ok} right answers, {outcome.failures} others")
    return outcome, cpu


def _deletions(one: Running, first: int) -> tuple[list[float], list[float]]:
    """Delete credentials one after another, each used just before, and see until when they are
    accepted. Returns the durations of the deletions and of what followed, in ms."""
    delete_ms: list[float] = []
    stale_ms: list[float] = []
    give_up = time.monotonic() + DELETIONS_SECONDS_MAX
    with _checker(one.check) as allowed:
        for number in range(first, first + DELETIONS):
            if stale_ms and time.monotonic() > give_up:
                break
            if not (allowed(number) and allowed(number)):
                raise SystemExit(f"{one.name}: a credential is refused before its deletion")
            began = time.perf_counter()
            one.delete(number)
            done = time.perf_counter()
            last = done
            while (asked := time.perf_counter()) < done + STALE_SECONDS_MAX and allowed(number):
                last = asked
            delete_ms.append((done - began) * 1e3)
            stale_ms.append((last - done) * 1e3)
    return delete_ms, stale_ms


@contextlib.contextmanager
def _checker(check: GrpcCheck | HttpCheck) -> Iterator[Callable[[int], bool]]:
    """Yield a function that asks about a credential by its number, on one connection."""
    if isinstance(check, HttpCheck):
        http = check

        def ask_http(number: int) -> bool:
            return introspection.ask(http.address, http.requests[number], http.allows)

        yield ask_http
        return
    with grpc.insecure_channel(check.address) as channel:
        call: Callable[..., bytes] = channel.unary_unary(check.path, None, None)
        rpc = check

        def ask(number: int) -> bool:
            answer = call(rpc.requests[number], timeout=CALL_SECONDS_MAX, metadata=rpc.metadata)
            return rpc.allows(answer)

        yield ask


def lines(results: Sequence[Result], missing: dict[str, str]) -> Iterator[str]:
    """Yield the lines of the table."""
    form = "{:<28} {:<9} {:>9} {:>9} {:>10} {:>10} {:>11} {:>12} {:>13}"
    yield form.format(
        *("product", "version", "checks/s", "times", "CPU µs", "p50 µs", "delete ms"),
        *("stale median", "stale longest"),
    )
    for one in results:
        found = one.document(results[0])
        yield form.format(
            *(one.name, one.version, f"{found['checks_per_second']:,}"),
            f"{found['times_slower']:.1f}x",
            *(f"{found['server_cpu_us']:,}", f"{found['alone_p50_us']:,}", found["delete_p50_ms"]),
            *(_seconds(found["stale_ms"]["median"]), _seconds(found["stale_ms"]["longest"])),
        )
    yield f"Medians over the rounds, {IN_FLIGHT} checks in flight. Times: how many times as many"
    yield "checks per second Latchkey answers, as the median of the rounds' ratios. CPU: of the"
    yield "server for each check. p50: one check at a time. Stale: how long after the deletion was"
    yield "confirmed the last accepted check began."
    for name, why in missing.items():
        yield f"Not measured: {name}: {why}"


def _times(first: Result, other: Result) -> float:
    return _median(
        a.per_second / b.per_second for a, b in zip(first.slices, other.slices, strict=True)
    )


def _median(values: Iterator[float]) -> float:
    return statistics.median(values)


def _seconds(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.1f} s" if milliseconds >= 100 else f"{milliseconds:.0f} ms"


def write(results: Sequence[Result], missing: dict[str, str], output: Path) -> None:
    """Write the results as JSON."""
    document = {
        "products": [one.document(results[0]) for one in results],
        "not_measured": missing,
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")

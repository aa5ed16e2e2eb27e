"""The behaviour of a server under more load than it can handle.

An open loop (load.py) at a tenth, once, twice and ten times the server's capacity in the same
round. A good server keeps answering as many calls about as fast, and refuses the rest. A separate
part besides the table of calls; slices of all loads in turns within each round, on dedicated
servers whose caches start empty.
"""

import contextlib
import random
import sys
import time
from collections.abc import Mapping, Sequence

from tests.benchmarks import processes
from tests.benchmarks.answers import remember
from tests.benchmarks.coherence_figures import Bench
from tests.benchmarks.load import LoadError
from tests.benchmarks.overload_figures import ALONE, FLOODED, LOADS, UNLOADED, Case, Result, Round
from tests.benchmarks.overload_slices import Seen, Slicer
from tests.benchmarks.rows import CREATES_IN_FLIGHT, IN_FLIGHT, WARM_SECRETS, Row

__all__ = ["SECONDS_MAX", "cases", "measure"]

# The share of the run that this part may take.
SECONDS_MAX = 100.0
ROUNDS, SECONDS = 3, 0.5
QUICK_ROUNDS, QUICK_SECONDS = 1, 0.3
# A slice in which the load did not keep up is repeated, at most this often in a round.
AGAIN_MAX = 2
# The slice has few calls, and p99 must be computed from them.
UNLOADED_LONGER = 2.0
# The load of the measured traffic, as a share of its own capacity, while the other one floods.
MODERATE = 0.5
FLOOD = 10.0
# Each server's settings that differ from the defaults.
SERVERS: Mapping[str, Mapping[str, str]] = {
    "native": {"TRANSPORT": "native"},
    "grpcio": {"TRANSPORT": "grpcio"},
    "reading": {"TRANSPORT": "native", "CACHE": "off"},
}


def cases(rows: Sequence[Row], only: str) -> list[Case]:
    """Return the cases that `--only` selects. `rows` are all rows of the table of calls."""
    by_key = {row.key: row for row in rows}
    warm = by_key["Verify, warm", "native", IN_FLIGHT]
    create = by_key["Create", "native", CREATES_IN_FLIGHT]
    found = [
        Case(warm),
        Case(by_key["Verify, warm", "grpcio", IN_FLIGHT]),
        Case(by_key["Verify, reading", "native", IN_FLIGHT]),
        Case(create),
        Case(warm, create),
        Case(create, warm),
    ]
    return [case for case in found if only in case.title]


def measure(bench: Bench, chosen: Sequence[Case]) -> list[Result]:
    """Measure the cases in rounds; skip rounds that do not fit into the remaining time.

    A case in which the server breaks down or answers wrongly is not measured any further, and its
    result says why.
    """
    results = [Result(case) for case in chosen]
    if not chosen:
        return results
    with contextlib.ExitStack() as stack:
        slicers = {}
        for name in dict.fromkeys(case.row.server for case in chosen):
            settings = bench.settings("usual", **SERVERS[name])
            server = stack.enter_context(
                processes.latchkey(
                    bench.scratch, f"overload-{name}", settings, {bench.cores.server}
                )
            )
            seconds = QUICK_SECONDS if bench.quick else SECONDS
            slicers[name] = Slicer(server, bench.postmaster, seconds)
            if name != "reading":
                remember(server.address, bench.seeded["usual"].secrets[:WARM_SECRETS])
        order = random.Random(1)  # noqa: S311 - for order, not for secrets
        longest = 0.0
        rounds = QUICK_ROUNDS if bench.quick else ROUNDS
        for number in range(1, rounds + 1):
            began = time.monotonic()
            if began + longest > bench.give_up:
                _say(f"Out of time: overload, {number - 1} rounds instead of {rounds}")
                break
            again = AGAIN_MAX
            for result in order.sample(results, len(results)):
                if result.errors:
                    continue
                slicer = slicers[result.case.row.server]
                try:
                    again = _round(result, slicer, order, again)
                except (LoadError, RuntimeError, OSError) as error:
                    result.errors.append(f"{result.case.title}: {error}")
            longest = max(longest, time.monotonic() - began)
            _say(f"overload, round {number} of {rounds}: {time.monotonic() - began:.0f} s")
    return results


def _round(result: Result, slicer: Slicer, order: random.Random, again: int) -> int:
    """Take one slice of each load of a case, in random order. Return the rest of `again`."""
    case = result.case
    bounded = slicer.bounded(case.row)
    rates: dict[str, list[tuple[Row, float]]]
    if case.beside is None:
        rates = {load: [(case.row, bounded * times)] for load, times in LOADS.items()}
    else:
        flood = slicer.bounded(case.beside)
        own = (case.row, bounded * MODERATE)
        rates = {ALONE: [own], FLOODED: [own, (case.beside, flood * FLOOD)]}
    seen: dict[str, Seen] = {}
    for load in order.sample(list(rates), len(rates)):
        longer = UNLOADED_LONGER if load == UNLOADED else 1.0
        seen[load] = slicer.slice(rates[load], longer=longer)
        if not seen[load].kept_up and again:
            again -= 1
            seen[load] = slicer.slice(rates[load], longer=longer)
    result.rounds.append(Round(bounded, {load: seen[load] for load in rates}))
    return again


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()

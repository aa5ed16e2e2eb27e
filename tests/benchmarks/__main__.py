"""`make bench`: the speed of Latchkey, compared with the limit of its stack, in one run.

All servers stay up throughout. They are pinned to the same core, and each is idle except during its
own slices; the load, which is this process, is pinned to another core. In each round every row runs
for a short slice, in a random order, with rows that are compared one right after the other.
Interference on the machine therefore affects all of them alike, and ratios within a round are valid
where absolute figures are not. Needs Linux, for pinning and for CPU time per process.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import grpc
from latchkey_service.secret_format import Keyring
from latchkey_service.tokens import pepper_file as pepper_files

from tests.benchmarks import (
    coherence,
    console,
    flood,
    hosts,
    load,
    overload,
    overload_figures,
    processes,
    report,
    sizes,
)
from tests.benchmarks.answers import check_ceiling, check_service, remember
from tests.benchmarks.peers import measure as peers
from tests.benchmarks.rows import READING, TRANSPORTS, WARM_SECRETS, Row, Sizes, rows
from tests.benchmarks.seed import Seeded, seed

FULL, QUICK = Sizes(100_000, 10_000, 1_000_000), Sizes(10_000, 1_000, 50_000)
ROUNDS, SECONDS = 9, 1.2
QUICK_ROUNDS, QUICK_SECONDS = 2, 0.4
# Unmeasured start of each slice, until the server's caches and the connection's buffers have
# settled.
WARM_UP_SECONDS = 0.2
# The run must end within ten minutes; no round begins that might not fit.
RUN_SECONDS_MAX = 570.0 - flood.SECONDS_MAX
OUTPUT = Path("build/bench.json")


def main() -> int:
    """Measure, print, write. Returns 1 if an answer was wrong or a server broke down: a slow result
    does not fail the run, a wrong one does."""
    options = parsed()
    began, load_before = time.monotonic(), os.getloadavg()[0]
    # In both cases, all processes are shut down.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.sizes:
        return _compare_sizes(options)
    if options.peers:
        return _compare_peers(options)
    if options.hosts:
        return _measure_hosts(options)
    cores = processes.cores(options.postgres_core)
    counts = QUICK if options.quick else FULL
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(_scratch())
        pepper_file = scratch / "peppers"
        keyring = pepper_files.load_or_create(pepper_file, create=True)
        _say("Starting Postgres and filling databases")
        url, postmaster = stack.enter_context(
            processes.postgres(scratch / "data", {cores.postgres})
        )
        secrets_file = scratch / "secrets"
        seeded = asyncio.run(_seed(url, counts, keyring, secrets_file))
        servers = _servers(stack, scratch, seeded, pepper_file, cores.server)
        wrong = _check(servers, seeded, keyring)
        for line in wrong:
            _say(f"WRONG ANSWER: {line}")
        if wrong:
            return 1
        os.sched_setaffinity(0, {cores.load})
        all_rows = rows(seeded, counts)
        chosen = [row for row in all_rows if options.only in _title(row)]
        bench = coherence.Bench(
            *(scratch, pepper_file, cores, postmaster, seeded, servers, secrets_file),
            quick=options.quick,
            give_up=began + coherence.SECONDS_MAX,
        )
        figures = coherence.measure(bench, coherence.chosen(options.only))
        overloads = overload.cases(all_rows, options.only)
        give_up = began + RUN_SECONDS_MAX - (overload.SECONDS_MAX if overloads else 0.0)
        results, failures = _measure(chosen, servers, seeded, postmaster, options, give_up)
        # Last, because its floods leave tokens in the database on which the rows are measured.
        until = time.monotonic() + overload.SECONDS_MAX
        overloaded = overload.measure(dataclasses.replace(bench, give_up=until), overloads)
        broken = [line for result in overloaded for line in result.errors]
        beyond = overload_figures.figures(overloaded)
        wrong = _check(servers, seeded, keyring)
        page = None
        if options.only.lower() in "page":
            service = servers["native"].address
            page = console.measure(service, scratch, cores.load, quick=options.quick)
        flooded = {}
        if options.only.lower() in flood.TITLE:
            flooded = flood.measure(seeded["usual"].url, pepper_file, quick=options.quick)
    reached = [
        *report.targets(results, counts),
        *coherence.targets(figures),
        *coherence.targets(beyond),
    ]
    _say("", *coherence.lines(figures))
    _say("", *overload_figures.lines(overloaded))
    _say("", *flood.lines(flooded), *flood.problems(flooded))
    _say("", *report.as_table(chosen, results, reached), "", *(page.lines() if page else ()))
    about = {
        "slice_seconds": options.seconds,
        "run_seconds": round(time.monotonic() - began),
        "postgres_core": options.postgres_core,
        # CPU time taken by neighbours: about 0 on a dedicated machine.
        "load_average_before": round(load_before, 2),
        "tokens": {"usual": counts.usual, "small": counts.small, "large": counts.large},
    }
    OUTPUT.parent.mkdir(exist_ok=True)
    document = report.as_json(chosen, results, reached, failures, about)
    document["page"] = page.document() if page else None
    document["coherence"] = [figure.document() for figure in figures]
    document["flood"] = flood.document(flooded)
    document["overload"] = {
        "figures": [figure.document() for figure in beyond],
        "slices": overload_figures.document(overloaded),
        "not_measured": broken,
    }
    OUTPUT.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
    _say("", f"Written to {OUTPUT} after {about['run_seconds']} s.")
    wrong += [
        f"{_title(row)}: {failures[row.key]} of its answers" for row in chosen if failures[row.key]
    ]
    for line in wrong:
        _say(f"WRONG ANSWER: {line}")
    for line in broken:
        _say(f"NOT MEASURED: {line}")
    return 1 if wrong or broken else 0


def _compare_sizes(options: argparse.Namespace) -> int:
    with _scratch(options.scratch) as scratch:
        found = sizes.measure(options.sizes, scratch, options.postgres_core, asyncio.run)
    _say("", *sizes.lines(found, options.sizes))
    OUTPUT.parent.mkdir(exist_ok=True)
    output = OUTPUT.with_name("bench-sizes.json")
    document = {"tokens": options.sizes, "calls": [one.document() for one in found]}
    output.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    return 0


def _compare_peers(options: argparse.Namespace) -> int:
    rounds = QUICK_ROUNDS if options.quick else peers.ROUNDS
    with _scratch(options.scratch) as scratch:
        found, missing = peers.measure(
            *(scratch, options.postgres_core, asyncio.run, _say), rounds=rounds, only=options.only
        )
    _say("", *peers.lines(found, missing))
    peers.write(found, missing, OUTPUT.with_name("bench-peers.json"))
    return 0


def _measure_hosts(options: argparse.Namespace) -> int:
    with _scratch(options.scratch) as scratch:
        found = hosts.measure(
            *(scratch, options.postgres_core, asyncio.run),
            quick=options.quick,
            rounds=options.rounds,
            only=options.only,
        )
    _say("", *hosts.lines(found))
    OUTPUT.parent.mkdir(exist_ok=True)
    output = OUTPUT.with_name("bench-hosts.json")
    document = {"figures": [figure.document() for figure in found], "machine": report.machine()}
    output.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return 0


def _measure(
    chosen: Sequence[Row],
    servers: Mapping[str, processes.Server],
    seeded: Mapping[str, Seeded],
    postmaster: int,
    options: argparse.Namespace,
    give_up: float,
) -> tuple[dict[report.Key, list[report.Measured]], dict[report.Key, int]]:
    """Run the rounds; return each row's slices and its number of wrong answers."""
    results: dict[report.Key, list[report.Measured]] = defaultdict(list)
    failures: dict[report.Key, int] = defaultdict(int)
    order = random.Random(1)  # noqa: S311 - for order, not for secrets
    longest = 0.0
    for number in range(1, options.rounds + 1 if chosen else 1):
        began = time.monotonic()
        if began + 1.5 * longest > give_up:
            _say(f"Out of time: {number - 1} rounds instead of {options.rounds}")
            break
        for name in TRANSPORTS:
            if any(row.server == name for row in chosen):
                # The servers know these tokens, except for a verifier that was delayed and has
                # started over.
                remember(servers[name].address, seeded["usual"].secrets[:WARM_SECRETS])
        for row in _shuffled(chosen, order):
            server = servers[row.server]
            try:
                measured = load.run(
                    server.address,
                    [
                        load.Traffic(
                            row.path, row.requests, row.begins_with, in_flight_max=row.in_flight
                        )
                    ],
                    warm_up_seconds=WARM_UP_SECONDS,
                    seconds=options.seconds,
                    meter=processes.meter(server, postmaster),
                )
            except (load.LoadError, OSError) as error:
                raise SystemExit(f"{_title(row)}: {error}") from error
            outcome = measured.outcomes[0]
            if not outcome.ok:
                raise SystemExit(f"{_title(row)}: no call succeeded")
            failures[row.key] += outcome.failures
            failures[row.key] += sum(not row.is_right(*sample) for sample in outcome.samples)
            server_cpu, postgres_cpu = measured.metered
            results[row.key].append(
                report.Measured(
                    outcome.goodput,
                    outcome.percentile_us(0.50),
                    outcome.percentile_us(0.99),
                    *(
                        cpu / outcome.ok * 1e6
                        for cpu in (server_cpu, postgres_cpu, measured.cpu_seconds)
                    ),
                )
            )
        longest = max(longest, time.monotonic() - began)
        _say(f"Round {number} of {options.rounds}: {time.monotonic() - began:.0f} s")
    return results, failures


def _shuffled(chosen: Sequence[Row], order: random.Random) -> list[Row]:
    """Return the rows in a new order that keeps the rows of a group together."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in order.sample(chosen, len(chosen)):
        groups[row.group].append(row)
    return [row for group in groups.values() for row in group]


async def _seed(url: str, sizes: Sizes, keyring: Keyring, secrets_file: Path) -> dict[str, Seeded]:
    wanted = {
        "usual": sizes.usual,
        "small": sizes.small,
        "large": sizes.large,
        "deletes": coherence.DELETES_MAX,
    }
    return {
        name: await seed(url, name, tokens, keyring, secrets_file if name == "large" else None)
        for name, tokens in wanted.items()
    }


def _servers(
    stack: contextlib.ExitStack,
    scratch: Path,
    seeded: Mapping[str, Seeded],
    pepper_file: Path,
    core: int,
) -> dict[str, processes.Server]:
    """Start all servers: the two ceilings, the service on both transports, and one for each
    size."""

    def serve(
        name: str, database: str, transport: str, **more: str
    ) -> "contextlib.AbstractContextManager[processes.Server]":
        settings = {
            "DATABASE_URL": seeded[database].url,
            "PEPPER_FILE": str(pepper_file),
            "TRANSPORT": transport,
        }
        return processes.latchkey(scratch, name, settings | more, {core})

    servers = {}
    for transport in TRANSPORTS:
        name = f"ceiling-{transport}"
        servers[name] = stack.enter_context(processes.ceiling(scratch, transport, core))
    # With default settings, and without a cache.
    for name in TRANSPORTS:
        servers[name] = stack.enter_context(serve(name, "usual", name))
    for database, name in READING.items():
        servers[name] = stack.enter_context(serve(name, database, "native", CACHE="off"))
    return servers


def _check(
    servers: Mapping[str, processes.Server], seeded: Mapping[str, Seeded], keyring: Keyring
) -> list[str]:
    """Send every server a set of calls with a real client; return the wrong answers."""
    wrong = []
    databases = dict.fromkeys(TRANSPORTS, "usual") | {
        name: database for database, name in READING.items()
    }
    for name, server in servers.items():
        try:
            if name.startswith("ceiling"):
                found = check_ceiling(server.address)
            else:
                found = check_service(server.address, seeded[databases[name]], keyring)
        except grpc.RpcError as error:
            found = [str(error)]
        wrong += [f"{name}: {line}" for line in found]
    return wrong


@contextlib.contextmanager
def _scratch(folder: Path | None = None) -> Iterator[Path]:
    """Create a folder for this run that Postgres' account can enter, unlike root's other
    folders.
    """
    path = Path(tempfile.mkdtemp(prefix="latchkey-bench-", dir=folder))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line, or of these arguments."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute or so, with fewer tokens")
    parser.add_argument("--rounds", type=int, help=f"how many; {ROUNDS}")
    parser.add_argument("--seconds", type=float, help=f"of each slice; {SECONDS}")
    parser.add_argument("--only", default="", help="only rows and parts with this in their title")
    parser.add_argument(
        "--sizes",
        type=int,
        metavar="N",
        help="only whether calls take as long among N tokens as among 10,000",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="only beside other products, which are built from their Go modules first",
    )
    parser.add_argument(
        "--hosts",
        action="store_true",
        help="only what hosts cost Postgres, and deletions beside up to 1,000 workers",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        metavar="FOLDER",
        help="for the databases of --sizes, --peers and --hosts",
    )
    parser.add_argument(
        "--postgres-core",
        choices=("auto", "load", "server"),
        default="auto",
        help="where Postgres runs: a third core if there is one, else the load's (auto)",
    )
    options = parser.parse_args(arguments)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    if options.hosts:
        rounds = hosts.rounds_of(quick=options.quick)
    options.rounds = options.rounds or rounds
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    return options


def _title(row: Row) -> str:
    return f"{row.name} {row.transport} {row.in_flight}"


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

"""`make history`: looks for a verify that accepts a deleted token under injected faults.

Server processes, deleters and continuously verifying clients use a real Postgres, while a seeded
plan injects faults. Each call is recorded with its start and end. The run fails if a verify
returned VALID although it began after the token's Delete had returned. It also fails if it made too
few calls or faults to be conclusive. The scenarios of `scenarios.py` run first: each exposes the
absence of one coherence rule.

Only this checks the whole product, with its processes, sockets and clocks.

With `--failover` the run uses a pair of Postgres servers with synchronous replication, and the
faults are failovers. With `--patroni` Patroni runs the servers.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.databases import session
from tests.helpers.postgres_node import make_template
from tests.helpers.replicated_pair import pair
from tests.history import report
from tests.history.broken import VARIABLE, rule_to_break
from tests.history.checker import Findings
from tests.history.failover import (
    FAILOVER_SHORT,
    FAILOVER_SIZE,
    direct_failovers,
    run_failovers,
)
from tests.history.patroni import missing, patroni
from tests.history.patroni_run import NODES, PATRONI_SIZE, run_patroni
from tests.history.run import SHORT, Size, run
from tests.history.scenarios import SCENARIOS, play, staged

# Where the histories, logs and faults of a failed run are kept.
KEPT = Path("build/history")
DIRECTED_SECONDS_MAX = 180.0
# Not kept: databases, programs and peppers.
DATA = ("data", "unused", "peppers", "first", "second", "template", "bin-*", "backup-*", "node-?")


def main() -> int:
    """Run, print, and return the exit code: 1 for a late accept, or if the run is inconclusive."""
    options = _options()
    rule = rule_to_break()
    # Shut down cleanly, even if the shell ignores Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if options.patroni and (sentence := missing()) is not None:
        _say(sentence)
        return 2
    # Postgres' own account needs access.
    scratch = Path(tempfile.mkdtemp(prefix="latchkey-history-", dir="/tmp"))
    scratch.chmod(0o755)
    failed = True
    try:
        if options.failover:
            failed = asyncio.run(_fail_over(options, rule, scratch))
        elif options.patroni:
            failed = asyncio.run(_with_patroni(options, rule, scratch))
        else:
            failed = _break(options, rule, scratch)
    except KeyboardInterrupt:
        failed = False
        return 130
    finally:
        if failed or options.keep:
            shutil.rmtree(KEPT, ignore_errors=True)
            shutil.copytree(scratch, KEPT, ignore=shutil.ignore_patterns(*DATA))
            _say(f"The histories and logs are in {KEPT}.")
        shutil.rmtree(scratch, ignore_errors=True)
    return int(failed)


def _break(options: argparse.Namespace, rule: str | None, scratch: Path) -> bool:
    """Run on one server."""
    postgres = BreakablePostgres(scratch / "data")
    try:
        url = postgres.start()
        return asyncio.run(_main(options, rule, scratch, url, postgres))
    finally:
        postgres.close()


async def _fail_over(options: argparse.Namespace, rule: str | None, scratch: Path) -> bool:
    """Run on a pair of servers."""
    complaints: list[str] = []
    if rule is not None:
        _say(f"Without rule {rule} ({VARIABLE}): this run must fail.")
    template = await make_template(scratch)
    if options.only != "run":
        (scratch / "directed").mkdir()
        findings = Findings()
        count = 0
        async with (
            pair(scratch, template) as servers,
            contextlib.aclosing(direct_failovers(scratch / "directed", servers, rule)) as directed,
        ):
            async for name, found in directed:
                findings, count = found, count + 1
                if complaints := report.violations(findings):
                    _say(f"Scenario {name} failed.")
                    break
        _say(*report.scenarios(findings, count))
    if options.only != "scenarios" and not complaints:
        (scratch / "run").mkdir()
        # A new pair, because the hosts of the run have different peppers.
        async with pair(scratch, template) as servers:
            outcome = await run_failovers(scratch / "run", servers, options.size, rule)
        _say("", *report.table(outcome))
        complaints += report.complaints(outcome)
    for complaint in complaints:
        _say(f"FAILED: {complaint}")
    return bool(complaints)


async def _with_patroni(options: argparse.Namespace, rule: str | None, scratch: Path) -> bool:
    """Run on servers that Patroni runs."""
    (scratch / "run").mkdir()
    (scratch / "servers").mkdir()
    async with patroni(scratch / "servers", NODES) as servers:
        _say(servers.versions)
        outcome = await run_patroni(scratch / "run", servers, options.size, rule)
    _say(*report.table(outcome))
    complaints = report.complaints(outcome)
    for complaint in complaints:
        _say(f"FAILED: {complaint}")
    return bool(complaints)


async def _main(
    options: argparse.Namespace,
    rule: str | None,
    scratch: Path,
    url: str,
    postgres: BreakablePostgres,
) -> bool:
    complaints: list[str] = []
    if rule is not None:
        _say(f"Without rule {rule} ({VARIABLE}): this run must fail.")
    if options.only != "run":
        async with session(url) as connection:
            await connection.execute("CREATE DATABASE directed")
        directed = url.replace("/latchkey?", "/directed?")
        (scratch / "directed").mkdir()
        async with asyncio.timeout(DIRECTED_SECONDS_MAX):
            findings, scenarios = await _direct(scratch / "directed", directed, rule)
        _say(*report.scenarios(findings, scenarios))
        complaints += report.late_accepts(findings)
    if options.only != "scenarios" and not complaints:
        (scratch / "run").mkdir()
        outcome = await run(scratch / "run", url, postgres, options.size, rule)
        _say("", *report.table(outcome))
        complaints += report.complaints(outcome)
    for complaint in complaints:
        _say(f"FAILED: {complaint}")
    return bool(complaints)


async def _direct(folder: Path, url: str, rule: str | None) -> tuple[Findings, int]:
    """Play the scenarios: if a rule is removed, only those of that rule, otherwise all."""
    chosen = (
        list(SCENARIOS.get(rule, ()))
        if rule
        else [s for of_rule in SCENARIOS.values() for s in of_rule]
    )
    chosen = list(dict.fromkeys(chosen))
    async with staged(folder, url, rule) as stage:
        findings = stage.findings()
        for scenario in chosen:
            findings = await play(stage, scenario)
    return findings, len(chosen)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make history", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="what `make test-slow` runs")
    parser.add_argument("--seconds", type=float, help="default 60, with --patroni 600")
    parser.add_argument("--seed", type=int, help="seed of the faults, default 1")
    parser.add_argument(
        "--clients", type=int, help="client processes, default 20, with several servers 8"
    )
    parser.add_argument("--deleters", type=int, help="default 5")
    parser.add_argument("--lease-seconds", type=float, help="default 1, with --patroni 3")
    parser.add_argument(
        "--hosts",
        help="workers behind each address, default 2,1: 1 is a worker alone, more have a "
        "supervisor and share the address",
    )
    servers = parser.add_mutually_exclusive_group()
    servers.add_argument("--failover", action="store_true", help="on a pair of database servers")
    servers.add_argument("--patroni", action="store_true", help="on servers that Patroni runs")
    parser.add_argument("--only", choices=("run", "scenarios"), help="leave out the other part")
    parser.add_argument(
        "--keep", action="store_true", help="keep the histories of a successful run too"
    )
    options = parser.parse_args()
    given = {
        name: value
        for name in ("seconds", "seed", "clients", "deleters", "lease_seconds")
        if (value := getattr(options, name)) is not None
    }
    if options.hosts:
        counts = [int(count) for count in options.hosts.split(",")]
        given["hosts"] = tuple(None if count == 1 else count for count in counts)
    size = SHORT if options.short else Size()
    if options.failover:
        size = FAILOVER_SHORT if options.short else FAILOVER_SIZE
    if options.patroni:
        size = PATRONI_SIZE
    if os.environ.get(VARIABLE):
        # A supervisor starts only unmodified workers.
        given["hosts"] = (None,) * size.workers
    options.size = Size(**{**vars(size), **given})
    return options


def _say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)  # noqa: T201 - for a person


if __name__ == "__main__":
    sys.exit(main())

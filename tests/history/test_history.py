"""No deleted token is accepted in a short run; a build without a rule accepts one."""

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.child_processes import ROOT
from tests.helpers.databases import drop_database, session
from tests.helpers.scratch import SCRATCH
from tests.helpers.servers import with_database
from tests.history import report
from tests.history.broken import RULES, VARIABLE
from tests.history.checker import Findings
from tests.history.failover_scenarios import MISSED
from tests.history.records import ENDS, Kind
from tests.history.run import SHORT, run
from tests.history.scenarios import SCENARIOS, play, staged

pytestmark = [
    pytest.mark.slow("runs many hosts with faults"),
    pytest.mark.xdist_group("history"),
    pytest.mark.skipif(sys.platform != "linux", reason="its processes end with their parent"),
]

# A scenario without its rule usually shows the error at the first attempt. On a busy machine,
# several may be needed. Only a rule whose absence has no effect needs this many.
MISS_SECONDS_MAX = 60.0
# Each is two hosts and often a client. With more at once, answers would be late.
BUILDS_AT_ONCE = 4
KEPT = "kept"
# The kinds of changes that a rule is about, if not only Delete.
KINDS = {"8-changes": ENDS - {Kind.DELETE}}


async def test_short_run(postgres: BreakablePostgres, postgres_url: str) -> None:
    """No verify accepts a token after its Delete under any injected fault, and the run is
    conclusive.
    """
    async with _databases(postgres_url, "run") as (url,):
        with tempfile.TemporaryDirectory(prefix="latchkey-history-", dir=SCRATCH) as folder:
            outcome = await run(Path(folder), url, postgres, SHORT)
    print(*report.table(outcome), sep="\n")  # noqa: T201 - pytest shows it with a failure
    assert report.complaints(outcome) == []


async def test_each_rule_is_missed(postgres_url: str) -> None:
    """A build that lacks a rule accepts a deleted token in each scenario of that rule, and the
    shipped build in none.

    One test runs several builds at the same time, because most of it is waiting.
    """
    builds = [KEPT, *SCENARIOS]
    turns = asyncio.Semaphore(BUILDS_AT_ONCE)

    async def in_turn(folder: Path, url: str) -> list[Findings]:
        async with turns:
            return await _play(folder, url)

    async with _databases(postgres_url, *builds) as urls:
        with tempfile.TemporaryDirectory(prefix="latchkey-history-", dir=SCRATCH) as name:
            folders = [Path(name, build) for build in builds]
            for folder in folders:
                folder.mkdir()
            played = await asyncio.gather(*map(in_turn, folders, urls))
    (*before, kept), *broken = played
    assert kept.late == []
    # Each scenario has verified the tokens that it had deleted.
    assert len(kept.checked) >= len(before)
    # Each kind of change is caught, and not only some of them.
    by_rule = dict(zip(SCENARIOS, broken, strict=True))
    assert _late_kinds(by_rule["8-changes"][-1]) == KINDS["8-changes"]
    caught = {
        rule: [before.late_count < after.late_count for before, after in pairwise(findings)]
        for rule, findings in zip(SCENARIOS, broken, strict=True)
    }
    assert caught == {rule: [True] * len(scenarios) for rule, scenarios in SCENARIOS.items()}


@contextlib.asynccontextmanager
async def _databases(postgres_url: str, *names: str) -> AsyncIterator[list[str]]:
    """Creates databases and drops them afterwards; otherwise Postgres would write all of them to
    disk when it stops.
    """
    async with session(postgres_url) as connection:
        for name in names:
            await connection.execute(f'CREATE DATABASE "{name}"')
    try:
        yield [with_database(postgres_url, name) for name in names]
    finally:
        for name in names:
            await drop_database(postgres_url, name)


async def _play(folder: Path, database_url: str) -> list[Findings]:
    """Play a build's scenarios in order: once each, or until the missing rule has an effect.

    Returns the findings before the first one and after each.
    """
    rule = None if folder.name == KEPT else folder.name
    every = dict.fromkeys(scenario for several in SCENARIOS.values() for scenario in several)
    async with staged(folder, database_url, rule) as stage:
        findings = [stage.findings()]
        for scenario in SCENARIOS[rule] if rule else every:
            before = findings[-1]
            findings.append(await play(stage, scenario))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MISS_SECONDS_MAX):
                    while rule and not _is_caught(rule, before, findings[-1]):
                        findings[-1] = await play(stage, scenario)
        return findings


def _is_caught(rule: str, before: Findings, after: Findings) -> bool:
    """Return whether a scenario has shown that the rule is missing."""
    kinds = KINDS.get(rule, frozenset())
    return after.late_count > before.late_count and _late_kinds(after) >= kinds


def _late_kinds(findings: Findings) -> set[Kind]:
    """Return the kinds of changes after which a verify was answered VALID."""
    return {findings.ended_by[late.token] for late in findings.late}


def test_each_rule_has_a_scenario() -> None:
    """Each rule that can be removed has a scenario that exposes it, here or with failovers."""
    assert {*SCENARIOS, *MISSED} == set(RULES)


def test_no_setting_of_the_product() -> None:
    """No shipped code reads the variable that removes a rule."""
    for folder in ("service", "clients", "proto"):
        for path in Path(ROOT, folder).rglob("*.py"):
            assert VARIABLE not in path.read_text("utf-8"), path
    assert VARIABLE not in os.environ

"""No deleted token is accepted after failovers that give one number to two changes."""

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.history.checker import Findings
from tests.history.failover_scenarios import (
    MISSED,
    failover_staged,
    look_up_stays,
    number_is_used_again,
    perform,
)
from tests.history.report import violations
from tests.pair import pair
from tests.postgres_node import Template, make_template

# They share two cores with each other's Postgres and processes.
pytestmark = pytest.mark.xdist_group("failover")

SHORTEST = (number_is_used_again, look_up_stays)
# Only a rule that is not missed at all takes so long.
MISS_SECONDS_MAX = 60.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that Postgres' own account can enter."""
    with tempfile.TemporaryDirectory(prefix="latchkey-history-", dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


async def test_equal_numbers_of_two_histories(folder: Path) -> None:
    """No host and no client takes a revision of the new primary for one of the old primary.

    The old primary dies, or stays up with a host's look-ups, after it showed a Delete that it
    never replicated. The next Delete takes the same number on the new primary. A build that lacks
    part of rule 12 is caught accepting.

    One test, and all builds at once: most of it is waiting.
    """
    template = await make_template(folder)
    kept, *broken = await asyncio.gather(
        _play(folder, template, None), *(_play(folder, template, rule) for rule in MISSED)
    )
    assert violations(kept) == []
    # Each scenario verified what it had deleted.
    assert len(kept.checked) >= len(SHORTEST)
    caught = {rule: found.late_count > 0 for rule, found in zip(MISSED, broken, strict=True)}
    assert caught == dict.fromkeys(MISSED, True)


async def _play(folder: Path, template: Template, rule: str | None) -> Findings:
    """Play a build's scenarios, that of a missing rule until the rule is missed."""
    stage_folder = folder / (rule or "kept")
    stage_folder.mkdir()
    async with (
        pair(folder, template) as servers,
        failover_staged(stage_folder, servers, rule) as stage,
    ):
        findings = Findings()
        if rule is None:
            for scenario in SHORTEST:
                findings = await perform(stage, scenario)
            return findings
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MISS_SECONDS_MAX):
                while not findings.late_count:
                    findings = await perform(stage, MISSED[rule])
        return findings

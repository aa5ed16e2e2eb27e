"""No deleted token is accepted after failovers that give one revision number to two changes."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.helpers.postgres_node import Template, make_template
from tests.helpers.replicated_pair import pair
from tests.helpers.scratch import SCRATCH
from tests.history.checker import Findings
from tests.history.failover_scenarios import (
    MISSED,
    FailoverStage,
    failover_staged,
    look_up_stays,
    number_is_used_again,
    perform,
)
from tests.history.report import violations

# All builds, with their Postgres and processes, share two cores.
pytestmark = [pytest.mark.slow("runs many hosts with faults"), pytest.mark.xdist_group("failover")]

SHORTEST = (number_is_used_again, look_up_stays)
# Only a scenario that was cut short takes this long.
MISS_SECONDS_MAX = 45.0
MISS_ATTEMPTS_MAX = 4


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that Postgres' own account can enter."""
    with tempfile.TemporaryDirectory(prefix="latchkey-history-", dir=SCRATCH) as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


async def test_equal_numbers_of_two_histories(folder: Path) -> None:
    """Hosts and clients do not confuse the revisions of the new and the old primary.

    The old primary dies, or keeps serving a host's look-ups, after it showed a Delete that it never
    replicated. The next Delete takes the same number on the new primary. The test detects late
    accepts of builds that lack a part of rule 12. It runs all builds at the same time, because most
    of it is waiting.
    """
    template = await make_template(folder)
    async with asyncio.TaskGroup() as group:
        playing = group.create_task(_play(folder, template))
        missing = {rule: group.create_task(_miss(folder, template, rule)) for rule in MISSED}
    kept = playing.result()
    assert violations(kept) == []
    # Each scenario verified the tokens that it had deleted.
    assert len(kept.checked) >= len(SHORTEST)
    caught = {rule: task.result() for rule, task in missing.items()}
    assert caught == dict.fromkeys(MISSED, True)


async def _play(folder: Path, template: Template) -> Findings:
    """Play the scenarios on the shipping build."""
    async with _stage(folder, template, None) as stage:
        for scenario in SHORTEST:
            findings = await perform(stage, scenario)
    return findings


async def _miss(folder: Path, template: Template, rule: str) -> bool:
    """Play a rule's scenario on a build that lacks the rule; return whether the error shows.

    On a busy machine the build may escape, for example because its row was removed. Then the
    scenario is played again from the start.
    """
    for _ in range(MISS_ATTEMPTS_MAX):
        async with _stage(folder, template, rule) as stage:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MISS_SECONDS_MAX):
                    findings = await perform(stage, MISSED[rule])
                    if findings.late_count:
                        return True
    return False


@contextlib.asynccontextmanager
async def _stage(
    folder: Path, template: Template, rule: str | None
) -> AsyncIterator[FailoverStage]:
    stage_folder = Path(tempfile.mkdtemp(prefix="stage-", dir=folder))
    async with (
        pair(folder, template) as servers,
        failover_staged(stage_folder, servers, rule) as stage,
    ):
        yield stage

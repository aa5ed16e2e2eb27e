"""No deleted token is accepted after failovers that give one number to two changes."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.history.failover_scenarios import (
    failover_staged,
    look_up_stays,
    number_is_used_again,
    perform,
)
from tests.history.report import violations
from tests.pair import pair
from tests.postgres_node import make_template

# They share two cores with each other's Postgres and processes.
pytestmark = pytest.mark.xdist_group("failover")


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
    never replicated. The next Delete takes the same number on the new primary.
    """
    template = await make_template(folder)
    async with pair(folder, template) as servers:
        (folder / "stage").mkdir()
        async with failover_staged(folder / "stage", servers, None) as stage:
            for scenario in (number_is_used_again, look_up_stays):
                findings = await perform(stage, scenario)
                assert violations(findings) == [], scenario.__name__
    # Each scenario verified what it had deleted.
    assert len(findings.checked) >= 2

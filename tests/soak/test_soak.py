"""A short soak runs, gets right answers and ends cleanly; a leak planted in the workers is
found."""

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.child_processes import ROOT
from tests.helpers.scratch import SCRATCH
from tests.soak import report
from tests.soak.load import Tally
from tests.soak.run import run
from tests.soak.samples import Name
from tests.soak.slope import Slope, Trend
from tests.soak.worker import LEAK_VARIABLE, LEAKS

pytestmark = [
    pytest.mark.slow("loads a service for seconds"),
    pytest.mark.xdist_group("soak"),
    pytest.mark.skipif(sys.platform != "linux", reason="its processes end with their parent"),
]

SECONDS = 5.0
# Few, so that a busy machine keeps up: the test checks behaviour, not load.
SCALE = 0.5
KINDS = 22


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that Postgres' own account can enter."""
    path = Path(tempfile.mkdtemp(prefix="latchkey-soak-", dir=SCRATCH))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


async def test_short_soak(folder: Path) -> None:
    """Callers of each kind get right answers, leave no resources behind, and everything ends
    cleanly.
    """
    found = await run(folder, SECONDS, scale=SCALE)
    print(*report.table(found), sep="\n")  # noqa: T201 - pytest shows it with a failure
    # Such a short run shows nothing about growth, because caches are still filling.
    assert (found.wrong, found.unexpected, found.troubles, found.stayed) == ({}, {}, [], [])
    assert {
        "create to delete",
        "import to delete",
        "client process",
        "policy changes",
        "watch breaks",
    } <= set(found.done)
    assert len(found.done) == KINDS
    told = {name.what for name, trend in found.trends.items() if trend.slope is not None}
    assert {"memory of its own", "file descriptors", "tasks", "connections", "size"} <= told


async def test_planted_leaks_are_found(folder: Path) -> None:
    """Workers that leak memory, descriptors and tasks in each Create fail the soak for each of
    these reasons."""
    found = await run(folder, SECONDS, rest_seconds=0.0, leaks=list(LEAKS))
    print(*report.table(found), sep="\n")  # noqa: T201 - pytest shows it with a failure
    growing = {
        name.what
        for name, trend in found.trends.items()
        if trend.grows and name.whose.startswith("worker")
    }
    assert {"memory of its own", "file descriptors", "tasks"} <= growing
    stayed = "\n".join(found.stayed)
    assert "tasks at rest after the load" in stayed
    assert "file descriptors without callers at rest after the load" in stayed
    assert found.wrong == {}


def test_reasons_for_failure() -> None:
    """Growth, a wrong answer, an error, a leftover resource and a starved run each fail a soak. A
    few refusals because of load, after which the calls succeeded, do not."""
    trend = Trend(90e6, 900.0, 2e6, Slope(1e4, 9e3, 11e3), grows=True)
    tally = Tally()

    def found(**differs: object) -> report.Found:
        good: dict[str, object] = {
            "seconds": 1800.0,
            "trends": {},
            "done": tally.done,
            "left_out": tally.left_out,
            "wrong": tally.wrong,
            "unexpected": tally.unexpected,
            "refused": tally.refused,
            "stayed": [],
            "cores": 0.5,
            "load_cores": 0.3,
        }
        return report.Found(**(good | differs))  # type: ignore[arg-type]  # as above

    assert report.complaints(found()) == []
    assert report.complaints(found(done=Counter(a=20), refused=Counter(Import=2))) == []
    bad: dict[str, dict[str, Any]] = {
        "worker 1: memory grows by 36.00 an hour": {
            "trends": {Name("worker 1", "memory", "bytes"): trend}
        },
        "wrong answer: VALID (2 times)": {"wrong": Counter(VALID=2)},
        "unexpected: INTERNAL (1 times)": {"unexpected": Counter(INTERNAL=1)},
        "worker 1: more": {"stayed": ["worker 1: more"]},
        "in the log": {"troubles": ["in the log"]},
        "too busy to tell: 3 of 4 were not begun": {
            "done": Counter(a=1),
            "left_out": Counter(a=3),
        },
        "too busy to tell: 3 refusals of 20 operations": {
            "done": Counter(a=20),
            "refused": Counter(Import=3),
        },
    }
    for complaint, differs in bad.items():
        assert report.complaints(found(**differs)) == [complaint]
    assert report.document(found(**bad["in the log"]))["complaints"] == ["in the log"]


def test_no_setting_of_the_product() -> None:
    """No shipped code reads the variable that plants a leak."""
    for folder in ("service", "clients", "proto"):
        for path in Path(ROOT, folder).rglob("*.py"):
            assert LEAK_VARIABLE not in path.read_text("utf-8"), path
    assert LEAK_VARIABLE not in os.environ

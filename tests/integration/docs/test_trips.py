"""Real calls pass few files, and docs/architecture.md describes them correctly."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from tests.helpers.databases import drop_database
from tests.helpers.repository import ROOT
from tests.helpers.servers import with_database
from tests.trips import Trip, trace_all

pytestmark = pytest.mark.xdist_group("trips")

PAGE = (ROOT / "docs/architecture.md").read_text("utf-8")
# Maximum number of files that a call may pass in its own task, and outside it. Lower these when a
# trip gets shorter; raise them only with a reason. A cold Verify decides with the client library's
# code, and counts the use. Beside it, a task checks the row's seal, once for all calls that asked
# for the row. A Delete validates its request with the code that all changes share. A histogram
# counts how long each call takes. Outside its task, the Delete waits for its turn in a fair queue,
# and the renewer reads the log through a protocol, because workers may share a row.
CEILINGS = {
    "warm Verify": (4, 0),
    "warm Verify with a policy": (6, 0),
    "cold Verify": (9, 7),
    "cold Verify with a policy": (11, 7),
    "Delete": (15, 14),
    "Delete with a policy": (17, 14),
}


@pytest.fixture(scope="module")
async def trips(
    scratch: Path, postgres_url: str, template_url: str
) -> AsyncIterator[dict[str, Trip]]:
    """The trips, traced once for all tests of this module, on a separate database."""
    template = urlsplit(template_url).path.removeprefix("/")
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(f"CREATE DATABASE trips TEMPLATE {template}")
    await connection.close()
    yield await trace_all(scratch, with_database(postgres_url, "trips"))
    await drop_database(postgres_url, "trips")


def test_ceilings(trips: dict[str, Trip]) -> None:
    """No call passes more files than its ceiling."""
    assert trips.keys() == CEILINGS.keys()
    for kind, trip in trips.items():
        in_call, beside = CEILINGS[kind]
        assert len(trip.call) <= in_call, (kind, trip.call)
        assert len(trip.beside) <= beside, (kind, trip.beside)


@pytest.mark.parametrize("kind", ["warm Verify", "cold Verify", "Delete"])
def test_page(trips: dict[str, Trip], kind: str) -> None:
    """The page's steps name each file that the call passes, and no other."""
    match = re.search(rf"^### A {kind}$(.+?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    assert match is not None, kind
    named = set(
        re.findall(
            r"`([a-z_]+/[a-z_]+\.py|(?:fair_queue|histogram|loop_delay|queue_limit|secret_format)\.py)`",
            match[1],
        )
    )
    trip = trips[kind]
    passed = {*trip.call, *trip.beside}
    assert passed - named == set(), "not on the page"
    assert named - passed - trip.sometimes == set(), "on the page, and not passed"


def test_page_of_policies(trips: dict[str, Trip]) -> None:
    """The page names the files that a policy adds to each trip."""
    match = re.search(r"^### With a policy$(.+?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    assert match is not None
    named = set(re.findall(r"`([a-z_]+/[a-z_]+\.py)`", match[1]))
    for kind in ("warm Verify", "cold Verify", "Delete"):
        assert set(trips[f"{kind} with a policy"].call) - set(trips[kind].call) == named

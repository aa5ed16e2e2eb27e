"""Each metric is read by a test of the event that moves it."""

import re

import pytest
from latchkey_service.process.metric_families import FAMILIES

from tests.helpers.repository import ROOT

# The tests that cause events and read metrics.
FOLDERS = ("contract", "integration")
READ = set(
    re.findall(
        r'\.get\(\s*"(\w+?)(?:_total|_count|_sum|_bucket)?"',
        "".join(
            path.read_text("utf-8")
            for folder in FOLDERS
            for path in (ROOT / "tests" / folder).rglob("test_*.py")
        ),
    )
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_test_reads_the_metric(name: str) -> None:
    """A test that causes events reads the metric."""
    assert name in READ

"""docs/metrics.md lists every metric, with its type, labels and meaning."""

import re

from latchkey_service.process.metric_families import FAMILIES

from tests.helpers.repository import ROOT

METRICS = (ROOT / "docs/metrics.md").read_text("utf-8")


def test_table_of_metrics() -> None:
    """The table lists the metrics that the service exposes, in order, and no other."""
    rows = re.findall(
        r"^\| `((?:latchkey|grpc|process)_\w+)` \| (\w+) \| (.*?) \| (.+?) \| .*\|$",
        METRICS,
        re.MULTILINE,
    )
    expected = []
    for name, family in FAMILIES.items():
        labels = (*family.labels, *(("worker",) if family.of_process else ()))
        expected.append(
            (
                name + ("_total" if family.kind == "counter" else ""),
                family.kind,
                ", ".join(f"`{label}`" for label in labels),
                family.meaning,
            )
        )
    assert rows == expected


def test_queries_use_existing_metrics() -> None:
    """Each metric that a query or an advice names exists."""
    known = {name + suffix for name in FAMILIES for suffix in ("", "_total", "_bucket", "_count")}
    labels = {label for family in FAMILIES.values() for label in family.labels}
    assert set(re.findall(r"\b(?:latchkey|grpc|process)_[a-z_]+\b", METRICS)) <= known | labels

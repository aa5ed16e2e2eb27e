"""The alerts and the dashboard are valid, documented and tested, and use metrics that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from latchkey_service.process.metric_families import FAMILIES

from tests.helpers.programs import INSTALLS
from tests.helpers.prometheus import ALERTS, promtool
from tests.helpers.repository import ROOT

RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"] for rule in group["rules"]
]
NAMES = [rule["alert"] for rule in RULES]
TESTS_PATH = ALERTS.with_name("alerts_test.yml")
TESTS = yaml.safe_load(TESTS_PATH.read_text("utf-8"))["tests"]
DASHBOARD_TEXT = (ROOT / "deploy/grafana/latchkey.json").read_text("utf-8")
DASHBOARD = json.loads(DASHBOARD_TEXT)
RUNBOOK = (ROOT / "docs/runbook.md").read_text("utf-8")
PARTS = ["Meaning", "Look at", "Do"]
METRIC = re.compile(r"\b(?:latchkey|grpc|process)_[a-z_]+\b")
COMMAND = "latchkey"


def exposed() -> set[str]:
    """Return the names under which Prometheus stores the metrics."""
    names = set()
    for name, family in FAMILIES.items():
        suffixes = {
            "counter": ("_total",),
            "gauge": ("",),
            "histogram": ("_bucket", "_count", "_sum"),
        }
        names |= {name + suffix for suffix in suffixes[family.kind]}
    return names


def parts(rules: list[dict[str, Any]], folder: Path) -> list[str]:
    """Write the tests of each rule into a separate file, beside a file with this rule alone. Return
    the paths.

    promtool evaluates all rules of a file at each step of each test, which takes most of its time.
    """
    document = yaml.safe_load(TESTS_PATH.read_text("utf-8"))
    written = []
    for rule in rules:
        name = rule["alert"]
        own = [test for test in TESTS if alerts_of(test) == {name}]
        alone = {"groups": [{"name": name, "rules": [rule]}]}
        (folder / f"{name}.yml").write_text(json.dumps(alone))
        path = folder / f"{name}_test.yml"
        path.write_text(json.dumps(document | {"rule_files": [f"{name}.yml"], "tests": own}))
        written.append(str(path))
    return written


def alerts_of(test: dict[str, Any]) -> set[str]:
    return {one["alertname"] for one in test["alert_rule_test"]}


def test_each_test_has_one_alert() -> None:
    """Each test of an alert is about one alert that exists, and selects no other alert's state."""
    for test in TESTS:
        (name,) = alerts_of(test)
        assert name in NAMES
    assert not any("ALERTS" in rule["expr"] for rule in RULES)


@INSTALLS
def test_promtool_accepts_the_alerts() -> None:
    """The syntax of all rules is valid."""
    code, said = promtool("check", "rules", str(ALERTS))
    assert code == 0, said
    assert f"{len(NAMES)} rules found" in said


@INSTALLS
def test_alerts_fire_and_stay_quiet(tmp_path: Path) -> None:
    """Each alert fires in its test, with the labels and the text that people get, and not in a
    similar case without the fault."""
    code, said = promtool("test", "rules", *parts(RULES, tmp_path))
    assert code == 0, said


@INSTALLS
def test_promtool_notices_a_wrong_alert(tmp_path: Path) -> None:
    """The tests fail if an alert has another threshold."""
    (rule,) = (rule for rule in RULES if rule["alert"] == "LatchkeyCertificateExpiresSoon")
    assert rule["expr"].count("< 14 * 86400") == 1
    wrong = rule | {"expr": rule["expr"].replace("< 14 * 86400", "< 7 * 86400")}
    code, said = promtool("test", "rules", *parts([wrong], tmp_path))
    assert code != 0
    assert "LatchkeyCertificateExpiresSoon" in said


@pytest.mark.parametrize("name", NAMES)
def test_each_alert_has_both_tests(name: str) -> None:
    """Each alert has a test in which it fires, and one in which it does not."""
    fires = [
        {bool(one["exp_alerts"]) for one in test["alert_rule_test"]}
        for test in TESTS
        if all(one["alertname"] == name for one in test["alert_rule_test"])
    ]
    assert {True} in fires
    assert {False} in fires


def test_each_alert_has_a_section() -> None:
    """The runbook has a section for each alert, in the same order, with the same three parts."""
    sections = re.findall(r"^### (Latchkey\w+)\n(.*?)(?=^##|\Z)", RUNBOOK, re.MULTILINE | re.DOTALL)
    assert sorted(name for name, _ in sections) == sorted(NAMES)
    for name, text in sections:
        assert re.findall(r"^\*\*(.+?)\.\*\* \S", text, re.MULTILINE) == PARTS, name
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"page", "ticket"}


def test_the_runbook_names_events_of_the_log() -> None:
    """Each event that the runbook quotes from the log is one that the service logs."""
    source = "".join(
        path.read_text("utf-8") for path in (ROOT / "service/latchkey_service").rglob("*.py")
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    events = set()
    for quoted in re.findall(r"`([^`]+)`(?:,| and| in the log| for)", RUNBOOK):
        if re.fullmatch(r"[a-z]+( [A-Za-z]+){1,12}", quoted) and quoted.split()[0] != COMMAND:
            events.add(quoted)
    assert len(events) >= 10
    assert {event for event in events if event not in source} == set()


@pytest.mark.parametrize(
    "text",
    [ALERTS.read_text("utf-8"), DASHBOARD_TEXT, TESTS_PATH.read_text("utf-8")],
    ids=["alerts", "dashboard", "tests"],
)
def test_metrics_exist(text: str) -> None:
    """Rules, their tests and the dashboard use only metrics that the service exposes."""
    labels = {label for family in FAMILIES.values() for label in family.labels}
    found = set(METRIC.findall(text))
    assert len(found) > 10
    assert found <= exposed() | labels


def test_labels_exist() -> None:
    """Rules and the dashboard select only labels that the metric has."""
    expressions = [rule["expr"] for rule in RULES]
    expressions += [t["expr"] for panel in DASHBOARD["panels"] for t in panel.get("targets", ())]
    common = {"job", "instance", "alertname", "alertstate"}
    selections = 0
    for expression in expressions:
        for metric, selected in re.findall(r"(\w+)\{(.*?)\}", expression):
            if metric in {"up", "ALERTS"}:
                continue
            base = re.sub(r"_(total|bucket|count|sum)$", "", metric)
            family = FAMILIES.get(metric) or FAMILIES[base]
            names = set(re.findall(r"(\w+)=", selected))
            assert names <= common | {*family.labels, "worker"}, expression
            selections += 1
    assert selections > 50


def test_panels_have_unique_ids_and_a_description() -> None:
    """Each panel has a unique id, which Grafana needs, a place to itself, and a description."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own
        assert panel["type"] == "row" or panel["description"].endswith(".")

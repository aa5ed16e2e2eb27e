"""The Python client passes the conformance cases, and clients that break a rule fail them.

This is the only place that states what a client does with each message, in any language.
"""

from __future__ import annotations

import json
import re

import pytest

from tests.conformance.cases import DIRECTORY, SCHEMA, Case, Group, load, schema
from tests.conformance.mutants import MUTANTS, Mutant
from tests.conformance.player import play

CASES = load()
# Replacements for the client's random numbers: both extremes and a value between them.
SHARES = (0.0, 0.5, 1.0)
# The rules of docs/protocol.md that concern clients. The others concern only servers.
CLIENT_RULES = {4, 5, 6, 7, 12, 13}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_client_conforms(case: Case, share: float) -> None:
    """The Python client does what each case says, for all of its random choices."""
    play(case, share)


def fails(case: Case) -> bool:
    """Return whether a case fails for one of the random choices."""
    for share in SHARES:
        try:
            play(case, share)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_fault_is_detected(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that breaks one rule fails the case for that rule."""
    mutant.apply(monkeypatch)
    assert fails(CASES[mutant.case])


def test_each_case_detects_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case fails for at least one fault, so no case passes for every client."""
    passed = CASES
    for mutant in MUTANTS:
        with monkeypatch.context() as patch:
            mutant.apply(patch)
            passed = {name: case for name, case in passed.items() if not fails(case)}
    assert set(passed) == set()


def test_each_rule_has_a_case_and_a_fault() -> None:
    """Every rule that concerns clients has cases of level `must`, and faults."""
    must = {rule for case in CASES.values() if case.level == "must" for rule in case.rules}
    assert must == CLIENT_RULES
    assert {mutant.rule for mutant in MUTANTS} == CLIENT_RULES
    assert len(CASES) >= 30


def test_the_schema_is_current() -> None:
    """The schema file matches the models: `python -m tests.conformance.cases` writes it."""
    assert SCHEMA.read_text("utf-8") == schema()


@pytest.mark.parametrize(
    "change",
    [
        lambda case: case.update(steps=[]),
        lambda case: case.update(rules=[14]),
        lambda case: case["steps"][0].update(do="dance"),
        lambda case: case["steps"][0].update(streem="a"),
        lambda case: case["steps"][0].update(at="100"),
        lambda case: case["steps"][0]["sends"][0].update(applied="5"),
        lambda case: case["steps"][0]["sends"][0].pop("stream"),
    ],
)
def test_a_file_that_breaks_the_schema_is_rejected(change) -> None:
    """A case with a misspelled, missing or invalid part is rejected, and does not pass."""
    group = json.loads((DIRECTORY / "cases" / "grants.json").read_text("utf-8"))
    Group.model_validate_json(json.dumps(group), strict=True)
    change(group["cases"][0])
    with pytest.raises(ValueError, match=r"validation error"):
        Group.model_validate_json(json.dumps(group), strict=True)


def test_the_protocol_document_matches_the_cases() -> None:
    """docs/protocol.md contains the rules that the cases name, and lists the case files."""
    text = (DIRECTORY.parents[1] / "docs" / "protocol.md").read_text("utf-8")
    rules = {int(number) for number in re.findall(r"^### Rule (\d+)", text, re.MULTILINE)}
    assert rules == set(range(1, 14))
    for path in (DIRECTORY / "cases").glob("*.json"):
        assert path.name in text

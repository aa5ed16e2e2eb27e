"""The checker of histories, on histories made by hand, and what makes a run fail."""

import random
from pathlib import Path

import pytest

from tests.history import report
from tests.history.checker import Findings, check
from tests.history.faults import KINDS, Happened, plan
from tests.history.records import Kind, Outcome, Record, Recorder, read
from tests.history.run import Outcome as RunOutcome
from tests.history.run import Size

MS = 1_000_000


def verify(token: int, began: int, ended: int, outcome: Outcome = Outcome.VALID) -> Record:
    return Record(Kind.NOWAIT, outcome, token, began * MS, ended * MS)


def delete(token: int, began: int, ended: int, outcome: Outcome = Outcome.CONFIRMED) -> Record:
    return Record(Kind.DELETE, outcome, token, began * MS, ended * MS)


def judge(*records: Record) -> Findings:
    """Check a history of two processes, whose records come in no order of time."""
    shuffled = list(records)
    random.Random(len(records)).shuffle(shuffled)  # noqa: S311 - repeatable
    deletes = [record for record in shuffled if record.kind == Kind.DELETE]
    verifies = [record for record in shuffled if record.kind != Kind.DELETE]
    return check({"deleters": lambda: deletes, "client": lambda: verifies})


def test_late_accept() -> None:
    """A VALID of a verify that began after the Delete's answer is found, with how late it was."""
    findings = judge(delete(1, 10, 20), verify(1, 23, 24))
    assert findings.late_count == 1
    (late,) = findings.late
    assert (late.who, late.kind, late.token) == ("client", Kind.NOWAIT, 1)
    assert (late.deleted, late.began, late.late_ns) == (20 * MS, 23 * MS, 3 * MS)
    assert findings.checked == {1}


@pytest.mark.parametrize(
    ("began", "ended"),
    [
        pytest.param(1, 9, id="before"),
        pytest.param(9, 11, id="over its beginning"),
        pytest.param(12, 18, id="during it"),
        pytest.param(9, 30, id="around it"),
        pytest.param(19, 900, id="over its end, long"),
        pytest.param(20, 21, id="from its end on"),
    ],
)
def test_either_answer_is_right(began: int, ended: int) -> None:
    """A verify that began before the Delete had answered, or at that moment, may say VALID."""
    findings = judge(delete(1, 10, 20), verify(1, began, ended))
    assert findings.late_count == 0
    assert findings.checked == set()


def test_a_nanosecond_late() -> None:
    """What began at the nanosecond of the answer overlaps it; one later, it is late."""
    end = 20 * MS
    at = Record(Kind.DIRECT, Outcome.VALID, 1, end, end + 5)
    after = Record(Kind.DIRECT, Outcome.VALID, 1, end + 1, end + 5)
    assert judge(delete(1, 10, 20), at).late_count == 0
    assert judge(delete(1, 10, 20), at, after).late_count == 1


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.COMMITTED])
def test_unconfirmed(outcome: Outcome) -> None:
    """A Delete that failed, or did not wait, forbids nothing; one that is confirmed later does."""
    unconfirmed = delete(1, 10, 20, outcome)
    findings = judge(unconfirmed, verify(1, 30, 31))
    assert findings.late_count == 0
    assert findings.deleted == {}
    findings = judge(unconfirmed, verify(1, 30, 31), delete(1, 40, 50), verify(1, 60, 61))
    assert [late.began for late in findings.late] == [60 * MS]


def test_first_confirmation_counts() -> None:
    """Of two confirmed Deletes of a token the one that answered first forbids."""
    findings = judge(delete(1, 10, 90), delete(1, 15, 20), verify(1, 30, 31))
    assert findings.late_count == 1
    assert len(findings.deletes) == 2
    assert findings.deleted == {1: 20 * MS}


def test_other_answers_and_tokens() -> None:
    """Refusals, failures and other tokens' verifies are no late accepts."""
    findings = judge(
        delete(1, 10, 20),
        verify(1, 30, 31, Outcome.REFUSED),
        verify(1, 30, 31, Outcome.FAILED),
        verify(2, 30, 31),
    )
    assert findings.late_count == 0
    # A failure says nothing of what it would have answered.
    assert judge(delete(1, 10, 20), verify(1, 30, 31, Outcome.FAILED)).checked == set()
    assert findings.checked == {1}


def test_early_refusal() -> None:
    """A refusal that came before any Delete began is found, also if that Delete failed."""
    early = verify(1, 1, 2, Outcome.REFUSED)
    failed, confirmed = delete(1, 5, 8, Outcome.FAILED), delete(1, 10, 20)
    assert judge(early, failed, confirmed).refused_early == 1
    assert judge(verify(1, 1, 6, Outcome.REFUSED), failed, confirmed).refused_early == 0
    assert judge(early, verify(1, 3, 4), confirmed).refused_early == 1


def test_counts() -> None:
    """Hits and misses are a verifier's last word, added up over verifiers."""
    findings = check(
        {
            "client-00.0": lambda: [
                Record(Kind.COUNTS, Outcome.DONE, 0, 5, 2),
                Record(Kind.COUNTS, Outcome.DONE, 1, 1, 1),
                Record(Kind.COUNTS, Outcome.DONE, 0, 9, 3),
            ]
        }
    )
    assert findings.from_memory == {"client-00.0/0": 9, "client-00.0/1": 1}
    assert findings.from_service == 4
    assert findings.operations == 0


def test_records_survive_a_kill(tmp_path: Path) -> None:
    """What was flushed is read back as it was; half a record at the end is passed over."""
    recorder = Recorder(tmp_path / "records")
    written = [verify(number, number, number + 1) for number in range(1, 100)]
    for record in written:
        recorder.add(Kind(record.kind), Outcome(record.outcome), *record[2:])
    recorder.flush()
    with (tmp_path / "records").open("ab") as file:
        file.write(b"half a rec")
    assert list(read(tmp_path / "records")) == written
    recorder.close()


def test_a_run_that_saw_nothing_fails() -> None:
    """A run without late accepts fails if it has seen too little to tell."""
    empty = RunOutcome(Size(), Findings(), [], [], [])
    complaints = report.complaints(empty)
    assert all(complaint.startswith("too few") for complaint in complaints)
    assert len(complaints) == 6


def test_a_run_fails_for_one_late_accept() -> None:
    """One late accept fails a run that has seen enough, as does a process that ended by itself."""
    size = Size(seconds=10.0, clients=1, deleters=1)
    records = [delete(n, 10, 20) for n in range(10)]
    records += [verify(n % 10, 30, 31, Outcome.REFUSED) for n in range(1_000)]
    findings = judge(*records)
    findings.from_memory["client/0"] = 1_000
    faults = [Happened(kind, 0, 1) for kind in KINDS]
    outcome = RunOutcome(size, findings, faults, [], [])
    assert report.complaints(outcome) == []
    outcome.troubles.append("client-00.0 ended with 1")
    assert report.complaints(outcome) == ["client-00.0 ended with 1"]
    outcome.troubles.clear()
    outcome.findings = judge(*records, verify(3, 21, 22))
    outcome.findings.from_memory["client/0"] = 1_000
    (complaint,) = report.complaints(outcome)
    assert "token 3 VALID for client" in complaint


def test_plan() -> None:
    """A seed gives one plan, which is over in time and, in a minute, has each kind of fault."""
    planned = plan(7, 50.0, 1.0)
    assert planned == plan(7, 50.0, 1.0)
    assert planned != plan(8, 50.0, 1.0)
    assert {fault.kind for fault in planned} == set(KINDS)
    assert all(0 < fault.at < fault.at + fault.seconds <= 50 for fault in planned)
    assert [fault.at for fault in planned] == sorted(fault.at for fault in planned)

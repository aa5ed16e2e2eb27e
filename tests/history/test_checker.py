"""The checker on constructed histories, and the conditions under which a run fails."""

import random
from pathlib import Path

import pytest

from tests.history import report
from tests.history.checker import Findings, Restore, check
from tests.history.faults import KINDS, Happened
from tests.history.records import ENDS, Kind, Outcome, Record, Recorder, read
from tests.history.run import Outcome as RunOutcome
from tests.history.run import Size

MS = 1_000_000


def verify(token: int, began: int, ended: int, outcome: Outcome = Outcome.VALID) -> Record:
    return Record(Kind.NOWAIT, outcome, token, began * MS, ended * MS)


def delete(token: int, began: int, ended: int, outcome: Outcome = Outcome.CONFIRMED) -> Record:
    return Record(Kind.DELETE, outcome, token, began * MS, ended * MS)


def judge(*records: Record) -> Findings:
    """Check a history of two processes whose records are not in time order."""
    shuffled = list(records)
    random.Random(len(records)).shuffle(shuffled)  # noqa: S311 - repeatable
    deletes = [record for record in shuffled if record.kind in ENDS]
    verifies = [record for record in shuffled if record.kind not in ENDS]
    return check({"deleters": lambda: deletes, "client": lambda: verifies})


@pytest.mark.parametrize("kind", sorted(ENDS))
def test_every_change_that_ends_a_token_forbids_valid(kind: Kind) -> None:
    """VALID after any confirmed change that ends the token is a late accept."""
    ended = delete(1, 10, 20)._replace(kind=kind)
    findings = judge(ended, verify(1, 12, 13), verify(1, 23, 24))
    assert (findings.late_count, findings.ended_by) == (1, {1: kind})
    assert judge(ended._replace(outcome=Outcome.FAILED), verify(1, 23, 24)).late_count == 0


def test_late_accept() -> None:
    """VALID from a verify that began after the Delete had returned is found, with its delay."""
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
    """A verify that began before the Delete had returned, or at that moment, may return VALID."""
    findings = judge(delete(1, 10, 20), verify(1, began, ended))
    assert findings.late_count == 0
    assert findings.checked == set()


def test_a_nanosecond_late() -> None:
    """A verify that began in the nanosecond of the answer overlaps it; one nanosecond later it is
    late."""
    end = 20 * MS
    at = Record(Kind.DIRECT, Outcome.VALID, 1, end, end + 5)
    after = Record(Kind.DIRECT, Outcome.VALID, 1, end + 1, end + 5)
    assert judge(delete(1, 10, 20), at).late_count == 0
    assert judge(delete(1, 10, 20), at, after).late_count == 1


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.COMMITTED])
def test_unconfirmed_deletes_forbid_nothing(outcome: Outcome) -> None:
    """A Delete that failed, or did not wait, does not forbid VALID; a later confirmed one does."""
    unconfirmed = delete(1, 10, 20, outcome)
    findings = judge(unconfirmed, verify(1, 30, 31))
    assert findings.late_count == 0
    assert findings.deleted == {}
    findings = judge(unconfirmed, verify(1, 30, 31), delete(1, 40, 50), verify(1, 60, 61))
    assert [late.began for late in findings.late] == [60 * MS]


def test_first_confirmation_counts() -> None:
    """Of two confirmed Deletes of a token, VALID is forbidden from the first answer on."""
    findings = judge(delete(1, 10, 90), delete(1, 15, 20), verify(1, 30, 31))
    assert findings.late_count == 1
    assert len(findings.deletes) == 2
    assert findings.deleted == {1: 20 * MS}


def test_other_answers_and_tokens() -> None:
    """Refusals, failures and verifies of other tokens are not late accepts."""
    findings = judge(
        delete(1, 10, 20),
        verify(1, 30, 31, Outcome.REFUSED),
        verify(1, 30, 31, Outcome.FAILED),
        verify(2, 30, 31),
    )
    assert findings.late_count == 0
    # A failure does not show what the answer would have been.
    assert judge(delete(1, 10, 20), verify(1, 30, 31, Outcome.FAILED)).checked == set()
    assert findings.checked == {1}


def test_early_refusal() -> None:
    """A rejection before any Delete began is found, even if that Delete failed."""
    early = verify(1, 1, 2, Outcome.REFUSED)
    failed, confirmed = delete(1, 5, 8, Outcome.FAILED), delete(1, 10, 20)
    assert judge(early, failed, confirmed).refused_early == 1
    assert judge(verify(1, 1, 6, Outcome.REFUSED), failed, confirmed).refused_early == 0
    assert judge(early, verify(1, 3, 4), confirmed).refused_early == 1


def test_records_survive_a_kill(tmp_path: Path) -> None:
    """Flushed records are read back unchanged; an incomplete record at the end is ignored."""
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
    """A run without late accepts fails if it is inconclusive."""
    empty = RunOutcome(Size(), Findings(), [], [], [])
    complaints = report.complaints(empty)
    assert all(complaint.startswith("too few") for complaint in complaints)
    assert len(complaints) == 7


def test_a_run_fails_for_one_late_accept() -> None:
    """One late accept fails a run that is otherwise sufficient, and so does a process that ended
    unexpectedly.
    """
    size = Size(seconds=10.0, clients=1, deleters=1)
    records = [delete(n, 10, 20) for n in range(10)]
    records.append(Record(Kind.IMPORT, Outcome.DONE, 0, 1, 2))
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


def test_a_run_fails_for_one_lost_token() -> None:
    """A run fails if its service lost a token, or rejected one too early."""
    lost = judge(create(1, 1, 2), get(1, 10, 11))
    (complaint,) = report.violations(lost)
    assert "token 1 NOT_FOUND for client (GET)" in complaint
    refused = judge(verify(1, 1, 2, Outcome.REFUSED), delete(1, 10, 20))
    assert report.violations(refused) == ["1 rejections of tokens before any Delete"]


def create(token: int, began: int, ended: int, outcome: Outcome = Outcome.DONE) -> Record:
    return Record(Kind.CREATE, outcome, token, began * MS, ended * MS)


def get(token: int, began: int, ended: int, outcome: Outcome = Outcome.NOT_FOUND) -> Record:
    return Record(Kind.GET, outcome, token, began * MS, ended * MS)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(get(1, 10, 11), id="Get"),
        pytest.param(delete(1, 10, 11, Outcome.NOT_FOUND), id="Delete"),
    ],
)
def test_lost_token(answer: Record) -> None:
    """NOT_FOUND for a token whose Create returned OK is a loss if no Delete of the token was
    sent."""
    findings = judge(create(1, 1, 2), answer)
    assert [lost.record for lost in findings.lost] == [answer]
    assert findings.lost_count == 1


def test_not_found_is_right() -> None:
    """NOT_FOUND is correct if the Create failed or overlaps, or if a Get overlaps the token's
    Delete."""
    assert judge(create(1, 1, 2, Outcome.FAILED), get(1, 10, 11)).lost_count == 0
    assert judge(create(1, 1, 10), get(1, 9, 11)).lost_count == 0
    assert judge(create(1, 1, 2), delete(1, 10, 30, Outcome.FAILED), get(1, 9, 11)).lost_count == 0
    assert judge(create(1, 1, 2), delete(1, 10, 30), get(1, 40, 41)).lost_count == 0


def test_delete_of_a_deleted_token_finds_its_receipt() -> None:
    """NOT_FOUND from a Delete is a loss even after another Delete: its receipt is lost."""
    again = delete(1, 30, 31, Outcome.NOT_FOUND)
    assert judge(create(1, 1, 2), delete(1, 10, 20), again).lost_count == 1


def test_a_token_that_does_not_exist_is_not_valid() -> None:
    """VALID after a Delete returned NOT_FOUND is a late accept."""
    ghost = delete(1, 10, 20, Outcome.NOT_FOUND)
    assert judge(create(1, 1, 2), ghost, verify(1, 30, 31)).late_count == 1
    assert judge(create(1, 1, 2), ghost, verify(1, 19, 31)).late_count == 0


RESTORE = Restore(taken=100 * MS, began=200 * MS, settled=300 * MS)


def judge_restored(*records: Record) -> Findings:
    return check({"all": lambda: records}, [RESTORE])


def test_restore_undoes_later_deletes() -> None:
    """A Delete after the backup forbids VALID until the restore and again once repeated."""
    deleted = delete(1, 110, 120)
    assert judge_restored(deleted, verify(1, 130, 131)).late_count == 1
    assert judge_restored(deleted, verify(1, 230, 231)).late_count == 0
    again = delete(1, 240, 250)
    findings = judge_restored(deleted, again, verify(1, 230, 231), verify(1, 260, 261))
    assert [late.began for late in findings.late] == [260 * MS]


@pytest.mark.parametrize(("began", "ended"), [(80, 90), (210, 220), (310, 320)])
def test_restore_keeps_other_deletes(began: int, ended: int) -> None:
    """A Delete that the backup contains, or that follows the restore, forbids VALID for good."""
    assert judge_restored(delete(1, began, ended), verify(1, 400, 401)).late_count == 1


def test_restore_loses_later_tokens() -> None:
    """A token that the backup lacks may be missing after the restore, and no other token."""
    refused = verify(1, 210, 211, Outcome.REFUSED)
    deleted = delete(1, 400, 401, Outcome.NOT_FOUND)
    later = judge_restored(create(1, 110, 120), refused, deleted)
    assert (later.refused_early, later.lost_count) == (0, 0)
    before = judge_restored(create(1, 80, 90), refused, deleted)
    assert (before.refused_early, before.lost_count) == (1, 1)
    early = judge_restored(
        create(1, 110, 120), verify(1, 130, 131, Outcome.REFUSED), get(1, 140, 141), deleted
    )
    assert (early.refused_early, early.lost_count) == (1, 1)
    after = judge_restored(create(1, 202, 203), refused, deleted)
    assert (after.refused_early, after.lost_count) == (1, 1)


def test_ghosts_die_when_a_restore_is_settled() -> None:
    """After a settled restore, a lost token is not VALID once a Delete has returned NOT_FOUND."""
    created = create(1, 110, 120)
    while_restoring = delete(1, 220, 230, Outcome.NOT_FOUND)
    settled = delete(1, 310, 320, Outcome.NOT_FOUND)
    assert judge_restored(created, while_restoring, verify(1, 240, 241)).late_count == 0
    findings = judge_restored(created, while_restoring, settled, verify(1, 330, 331))
    assert findings.late_count == 1

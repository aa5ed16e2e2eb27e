"""What the audit log records, samples and holds back while its table rejects entries."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from latchkey_service.audit import audit_log
from latchkey_service.audit.audit_log import AuditContext, AuditLog
from latchkey_service.audit.audit_table import POLICY_IN_FORCE, NewEntry
from latchkey_service.audit.sampling import CHOSEN_MAX, FIRST_MAX, LOOKED_MAX, TARGETS_MAX
from latchkey_service.errors import StoreUnavailable

from tests.helpers.domain import audit_context
from tests.helpers.waiting import eventually

DENIED = 7


NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


TOKENS = "/latchkey.v1.TokenService/"


class Table:
    """A table that accepts or rejects entries, as the test decides."""

    def __init__(self) -> None:
        self.written: list[NewEntry] = []
        self.error: Exception | None = None

    async def insert(self, entries: Any) -> None:
        if self.error is not None:
            raise self.error
        self.written += entries


def log_on(table: Table, clock: list[float]) -> AuditLog:
    return AuditLog(table, lambda: clock[0], lambda: NOW)  # type: ignore[arg-type]  # a part of it


def delete(caller: str, token: int = 0) -> AuditContext:
    return AuditContext(caller, TOKENS + "Delete", "p", "r", "acme", f"tok_{token}")


async def written(log: AuditLog, table: Table) -> list[NewEntry]:
    """Return the entries of a minute, when it is over."""
    table.written.clear()
    await log.close()
    return table.written


@pytest.mark.parametrize(("code", "reason"), [("PERMISSION_DENIED", "METHOD_DENIED"), ("OK", "")])
async def test_repeated_calls_do_not_flood(code: str, reason: str) -> None:
    """A caller's first denials or reads of one kind get an entry each. Of the others, a few do, and
    one entry states the number of the rest. Other kinds and other callers are counted
    separately."""
    table, clock = Table(), [0.0]
    log = log_on(table, clock)
    told = [log.record(delete("shop"), code, reason) for _ in range(10_000)]
    assert told == [True] * FIRST_MAX + [False] * (10_000 - FIRST_MAX)
    assert log.record(delete("shop"), "PERMISSION_DENIED", "ACCOUNT_DENIED")
    assert log.record(delete("admin"), code, reason)
    writer = asyncio.create_task(log.run())
    at_once = FIRST_MAX + 2
    await eventually(lambda: len(table.written) == at_once, "the entries are in the table")
    clock[0] = 60.0
    everything = at_once + CHOSEN_MAX + 1
    await eventually(lambda: len(table.written) == everything, "the rest is counted")
    rest = table.written[-1]
    assert (rest.caller, rest.reason, rest.token_id) == ("shop", reason, "")
    assert rest.calls == 10_000 - FIRST_MAX - CHOSEN_MAX
    assert (rest.peer, rest.request_id, rest.call_id) == ("", "", "")
    # After a minute the count starts over.
    assert log.record(delete("shop"), code, reason)
    writer.cancel()
    await log.close()
    alike = [e for e in table.written if (e.caller, e.reason) == ("shop", reason)]
    assert sum(e.calls for e in alike) == 10_001


async def test_harmless_calls_hide_no_other_target() -> None:
    """However often a caller repeats calls about one token, its call about another one gets an
    entry. So do the first calls about many tokens."""
    table, clock = Table(), [0.0]
    log = log_on(table, clock)
    for _ in range(1_000):
        log.record(delete("shop"), "OK", "")
    for token in range(1, 2 * TARGETS_MAX):
        log.record(delete("shop", token), "OK", "")
    found = {entry.token_id for entry in await written(log, table)}
    assert found >= {f"tok_{token}" for token in range(TARGETS_MAX)}


async def test_among_too_many_targets_chance_decides() -> None:
    """Whoever calls about more tokens than get entries cannot choose which of them do, and the
    number of the others is recorded."""
    table, clock = Table(), [0.0]
    calls = TARGETS_MAX + 400
    hits = [0] * 4
    for _ in range(200):
        log = log_on(table, clock)
        for token in range(calls):
            log.record(delete("shop", token), "OK", "")
        entries = await written(log, table)
        assert sum(entry.calls for entry in entries) == calls
        assert len(entries) == TARGETS_MAX + CHOSEN_MAX + 1
        for entry in entries[TARGETS_MAX:-1]:
            # Which quarter of the calls without their own entry.
            number = int(entry.token_id.removeprefix("tok_")) - TARGETS_MAX
            hits[4 * number // (calls - TARGETS_MAX)] += 1
    # 500 are expected in each; a fair choice is outside of this once in a million runs.
    assert all(400 < number < 600 for number in hits), hits


def test_refused_calls_are_described_rarely() -> None:
    """Only a refused call that may get an entry is parsed, and each one is counted."""
    table, clock = Table(), [0.0]
    log = log_on(table, clock)
    described = 0
    for _ in range(100_000):
        if log.should_record("shop", TOKENS + "Delete", "PERMISSION_DENIED", "METHOD_DENIED"):
            described += 1
            log.record(delete("shop"), "PERMISSION_DENIED", "METHOD_DENIED")
    assert described < LOOKED_MAX + 200
    assert log.aggregated == 100_000 - FIRST_MAX


async def test_policies_in_force_are_recorded() -> None:
    """Each policy that a process puts in force has an entry with its hash and the process."""
    table, clock = Table(), [0.0]
    log = log_on(table, clock)
    for _ in range(FIRST_MAX + TARGETS_MAX):
        log.policy_in_force("ab" * 32, "host:1")
    entries = await written(log, table)
    assert len(entries) == FIRST_MAX + TARGETS_MAX
    assert (entries[0].method, entries[0].peer) == (POLICY_IN_FORCE, "host:1")
    assert entries[0].reason == "sha256:" + "ab" * 32


async def test_entries_wait_for_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the database is down entries wait, up to a bound; entries beyond it are counted. All of
    them are recorded in the end. An entry that the database always rejects does not block the
    others."""
    monkeypatch.setattr(audit_log, "WAITING_MAX", 50)
    table, clock = Table(), [0.0]
    log = log_on(table, clock)
    table.error = StoreUnavailable("away")
    for token in range(80):
        log.record(delete("shop", token), "OK", "")
    await log.close()
    assert table.written == []
    table.error = ValueError("never")
    await log.close()
    assert table.written == []
    table.error = None
    for token in range(60):
        log.record(delete("shop", token), "OK", "")
    await log.close()
    assert [e.calls for e in table.written] == [1] * 50 + [10]


async def test_waiting_entries_are_bounded_in_a_long_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In an outage of hours with failures of many kinds, the number of waiting entries stays within
    the bound, and each failure is counted once the database is back."""
    monkeypatch.setattr(audit_log, "WAITING_MAX", 50)
    table, clock = Table(), [0.0]
    log = log_on(table, clock)
    table.error = StoreUnavailable("away")
    noted = 0
    for _ in range(20):
        for kind in range(20):
            for _ in range(FIRST_MAX + 1):
                log.record(audit_context("Get"), "NOT_FOUND", f"KIND_{kind}")
                noted += 1
        clock[0] += 2 * audit_log.SAMPLE_SECONDS
        await log.close()
        assert len(log._waiting) <= 50
    table.error = None
    await log.close()
    assert sum(e.calls for e in table.written) == noted


async def test_an_entry_that_is_refused_loses_no_other() -> None:
    """If the table refuses one entry of a batch, all others are written. If it becomes unavailable
    meanwhile, the rest waits."""

    class Choosy(Table):
        async def insert(self, entries: Any) -> None:
            if any(entry.token_id == "tok_2" for entry in entries):
                raise ValueError
            if len(entries) == 1 and entries[0].token_id == "tok_4" and self.error is not None:
                raise self.error
            self.written += entries

    table = Choosy()
    log = log_on(table, [0.0])
    for number in range(6):
        log.record(delete("shop", number), "OK", "")
    table.error = StoreUnavailable("later")
    await log._flush()
    assert [entry.token_id for entry in table.written] == ["tok_0", "tok_1", "tok_3"]
    assert log.waiting == 2
    table.error = None
    await log._flush()
    assert sorted(entry.token_id for entry in table.written) == [
        f"tok_{number}" for number in (0, 1, 3, 4, 5)
    ]
    assert (log.written, log.lost) == (5, 1)

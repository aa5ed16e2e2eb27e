"""What the audit log records, samples and holds back while its table rejects entries."""

import asyncio
import os
from datetime import UTC, datetime
from typing import Any

import pytest
from latchkey_service.access.credentials import mint
from latchkey_service.audit import audit_log
from latchkey_service.audit.audit_log import SAMPLE_MAX, AuditContext, AuditLog
from latchkey_service.audit.audit_table import NewEntry
from latchkey_service.errors import StoreUnavailable
from latchkey_service.secret_format import Keyring, Pepper

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


async def test_denials_do_not_flood() -> None:
    """A caller's first denials of one kind get an entry each, and one entry a minute has the number
    of the rest. Other kinds and other callers are counted separately. Completed changes always get
    an entry."""
    table, clock = Table(), [0.0]
    log = log_on(table, clock)
    shop, admin = (
        AuditContext(name, TOKENS + "Delete", "p", "r", "", "") for name in ("shop", "admin")
    )
    told = [log.record(shop, "PERMISSION_DENIED", "METHOD_DENIED") for _ in range(10_000)]
    assert told == [True] * SAMPLE_MAX + [False] * (10_000 - SAMPLE_MAX)
    assert log.record(shop, "PERMISSION_DENIED", "ACCOUNT_DENIED")
    assert log.record(admin, "PERMISSION_DENIED", "METHOD_DENIED")
    assert all(log.record(admin, "OK", "") for _ in range(100))
    writer = asyncio.create_task(log.run())
    await eventually(lambda: len(table.written) == SAMPLE_MAX + 102, "the entries are in the table")
    clock[0] = 60.0
    await eventually(lambda: len(table.written) == SAMPLE_MAX + 103, "the rest is counted")
    rest = table.written[-1]
    assert (rest.caller, rest.code, rest.calls) == ("shop", DENIED, 10_000 - SAMPLE_MAX)
    assert (rest.peer, rest.request_id, rest.token_id) == ("", "", "")
    # After a minute the count starts over.
    assert log.record(shop, "PERMISSION_DENIED", "METHOD_DENIED")
    writer.cancel()
    await log.close()
    denied = [e for e in table.written if e.reason == "METHOD_DENIED" and e.caller == "shop"]
    assert sum(e.calls for e in denied) == 10_001


async def test_entries_wait_for_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the database is down entries wait, up to a bound; entries beyond it are counted. All of
    them are recorded in the end. An entry that the database always rejects does not block the
    others."""
    monkeypatch.setattr(audit_log, "WAITING_MAX", 50)
    table, clock = Table(), [0.0]
    log = log_on(table, clock)
    by = audit_context("Get")
    table.error = StoreUnavailable("away")
    for _ in range(80):
        log.record(by, "OK", "")
    await log.close()
    assert table.written == []
    table.error = ValueError("never")
    await log.close()
    assert table.written == []
    table.error = None
    for _ in range(60):
        log.record(by, "OK", "")
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
            for _ in range(SAMPLE_MAX + 1):
                log.record(audit_context("Get"), "NOT_FOUND", f"KIND_{kind}")
                noted += 1
        clock[0] += 2 * audit_log.SAMPLE_SECONDS
        await log.close()
        assert len(log._waiting) <= 50
    table.error = None
    await log.close()
    assert sum(e.calls for e in table.written) == noted


def test_nothing_secret_is_recorded() -> None:
    """Of the data that a caller sends, an entry keeps only values that have the form of an account
    ID or a token ID."""
    secret = Keyring([Pepper(bytes(32))]).mint("lk", os.urandom).secret.reveal()
    for account, token in (
        (secret, secret),
        # The caller's own credential, sent by mistake. It has the form of an account ID.
        (mint(os.urandom).reveal(), ""),
        ("x" * 129, "tok_short"),
        ("a b", "tok_" + "A" * 26),
        ("a\n", ""),
        ("", "x" * 10_000),
    ):
        found = AuditContext.of("a", "m", "p" * 1_000, "r", account, token)
        assert (found.account_id, found.token_id) == ("", "")
        assert len(found.peer) == 200
    kept = AuditContext.of("a", "m", "p", "r", "acme", "tok_" + "0" * 26)
    assert (kept.account_id, kept.token_id) == ("acme", "tok_" + "0" * 26)

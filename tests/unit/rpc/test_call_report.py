"""Reports of finished calls: each call is counted, and no caller can flood the log."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog
from latchkey_service.access.credentials import mint
from latchkey_service.access.policy import ANONYMOUS
from latchkey_service.audit.audit_log import AuditContext, AuditLog
from latchkey_service.audit.sampling import FIRST_MAX
from latchkey_service.errors import (
    FieldViolation,
    InvalidArgument,
    LatchkeyError,
    NotFound,
    Overloaded,
    PermissionDenied,
    StoreUnavailable,
    WatchRefused,
)
from latchkey_service.rpc.call_report import CallReporter, describe_call
from latchkey_service.rpc.counters import Counts
from latchkey_service.secret_format import Keyring, Pepper

WATCH = "/latchkey.v1.TokenService/Watch"
DELETE = "/latchkey.v1.TokenService/Delete"
Lines = list[Any]


class Context:
    """A call without metadata or a deadline."""

    def invocation_metadata(self) -> None:
        return None

    def auth_context(self) -> None:
        return None

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> None:
        return None

    def set_code(self, code: object) -> None:
        raise NotImplementedError

    def set_details(self, details: str) -> None:
        raise NotImplementedError

    def set_trailing_metadata(self, trailing_metadata: object) -> None:
        raise NotImplementedError


@pytest.fixture
def lines() -> Iterator[Lines]:
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def reporter() -> CallReporter:
    audit = AuditLog(None, lambda: 0.0, lambda: datetime.now(UTC))  # type: ignore[arg-type]  # it writes nothing
    return CallReporter(Counts(), audit, lambda: 0.0)


@pytest.mark.parametrize(
    "error",
    [
        NotFound("x"),
        InvalidArgument(FieldViolation("", "x")),
        WatchRefused("x"),
        PermissionDenied("x", "METHOD_DENIED"),
        StoreUnavailable("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_expected_errors_do_not_fill_the_log(
    lines: Lines, reporter: CallReporter, error: LatchkeyError
) -> None:
    """Of a thousand calls that fail alike, only a few are logged."""
    for _ in range(1_000):
        reporter.failed(WATCH, Context(), 0.0, error)
    assert len(lines) == FIRST_MAX


def test_committed_change_keeps_its_entry(lines: Lines) -> None:
    """A call may fail or be cancelled after its change was committed with an audit entry. The
    outcome is logged, but no second entry or counter reports a failure."""
    noted: list[Any] = []

    class NoLog:
        def should_record(self, *_: Any) -> bool:
            noted.append("should_record")
            return True

        def record(self, *_: Any) -> bool:
            noted.append("record")
            return True

    reporter = CallReporter(Counts(), NoLog(), lambda: 0.0)  # type: ignore[arg-type]  # a partial fake
    audit_context = AuditContext("shop", DELETE, "", "id", "acme", "")
    reporter.failed(
        DELETE,
        Context(),
        0.0,
        StoreUnavailable("x"),
        ANONYMOUS,
        lambda _: audit_context,
        audit_context,
    )
    reporter.cancelled(DELETE, Context(), 0.0, ANONYMOUS, audit_context, audit_context)
    assert not noted
    assert [(line["code"], line["account_id"]) for line in lines] == [
        ("UNAVAILABLE", "acme"),
        ("CANCELLED", "acme"),
    ]
    reporter.failed(
        DELETE,
        Context(),
        0.0,
        StoreUnavailable("x"),
        ANONYMOUS,
        lambda _: audit_context,
    )
    reporter.cancelled(DELETE, Context(), 0.0, ANONYMOUS, audit_context)
    assert noted == ["should_record", "record", "record"]


def test_all_internal_errors_are_logged(lines: Lines, reporter: CallReporter) -> None:
    """Unforeseen exceptions are logged without sampling."""
    for _ in range(2 * FIRST_MAX):
        reporter.failed(WATCH, Context(), 0.0, RuntimeError())
    assert len(lines) == 2 * FIRST_MAX


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (NotFound("x"), "info"),
        (InvalidArgument(FieldViolation("", "x")), "info"),
        (PermissionDenied("x", "METHOD_DENIED"), "warning"),
        (Overloaded("x"), "warning"),
        (TimeoutError(), "warning"),
        (StoreUnavailable("x"), "error"),
        (KeyError("x"), "error"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_alerts_on_errors_mean_failures_of_the_service(
    lines: Lines, reporter: CallReporter, error: Exception, level: str
) -> None:
    """A failed call is an error in the log if the service failed, a warning if it refused, and
    ordinary if its caller was mistaken."""
    reporter.failed(DELETE, Context(), 0.0, error)
    assert [line["log_level"] for line in lines] == [level]


def test_nothing_secret_describes_a_call() -> None:
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
        found = describe_call("a", "m", "p" * 1_000, "r", account, token)
        assert (found.account_id, found.token_id) == ("", "")
        assert len(found.peer) == 200
    kept = describe_call("a", "m", "p", "r", "acme", "tok_" + "0" * 26)
    assert (kept.account_id, kept.token_id) == ("acme", "tok_" + "0" * 26)

"""What is told of calls that have ended: each is counted, and none can flood the log."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog
from latchkey_service.access.policy import ANYONE
from latchkey_service.audit import SAMPLE_MAX, AuditLog, Origin
from latchkey_service.errors import (
    FieldViolation,
    InvalidArgument,
    LatchkeyError,
    NotFound,
    PermissionDenied,
    StoreUnavailable,
    WatchRefused,
)
from latchkey_service.log import Counts
from latchkey_service.outcomes import Outcomes

WATCH = "/latchkey.v1.TokenService/Watch"
DELETE = "/latchkey.v1.TokenService/Delete"
Lines = list[Any]


class Context:
    """A call's, as far as this concerns it."""

    def invocation_metadata(self) -> None:
        return None

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


@pytest.fixture
def lines() -> Iterator[Lines]:
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def outcomes() -> Outcomes:
    audit = AuditLog(None, lambda: 0.0, lambda: datetime.now(UTC))  # type: ignore[arg-type]  # it writes nothing
    return Outcomes(Counts(), audit, lambda: 0.0)


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
def test_what_anybody_can_cause_does_not_fill_the_log(
    lines: Lines, outcomes: Outcomes, error: LatchkeyError
) -> None:
    """Of a thousand calls that fail alike a few have a line each."""
    for _ in range(1_000):
        outcomes.fail(WATCH, Context(), 0.0, error)
    assert len(lines) == SAMPLE_MAX


def test_a_change_that_stands_has_the_entry_that_was_written_with_it(lines: Lines) -> None:
    """However the call ends after its change, once or a thousand times: it is told in the log, and
    no second entry or count says that it failed."""
    noted: list[Any] = []

    class NoLog:
        def writes(self, *_: Any) -> bool:
            noted.append("writes")
            return True

        def note(self, *_: Any) -> bool:
            noted.append("note")
            return True

    outcomes = Outcomes(Counts(), NoLog(), lambda: 0.0)  # type: ignore[arg-type]  # a part of it
    origin = Origin("shop", DELETE, "", "id", "acme", "", recorded=True)
    outcomes.fail(DELETE, Context(), 0.0, StoreUnavailable("x"), ANYONE, origin, lambda _: origin)
    outcomes.end(DELETE, Context(), 0.0, "CANCELLED", ANYONE, origin)
    assert not noted
    assert [(line["code"], line["account_id"]) for line in lines] == [
        ("UNAVAILABLE", "acme"),
        ("CANCELLED", "acme"),
    ]
    origin.recorded = False
    outcomes.fail(DELETE, Context(), 0.0, StoreUnavailable("x"), ANYONE, origin, lambda _: origin)
    outcomes.end(DELETE, Context(), 0.0, "CANCELLED", ANYONE, origin)
    assert noted == ["writes", "note", "note"]


def test_faults_of_ours_are_all_told(lines: Lines, outcomes: Outcomes) -> None:
    """What nobody foresaw is never left out."""
    for _ in range(2 * SAMPLE_MAX):
        outcomes.fail(WATCH, Context(), 0.0, RuntimeError())
    assert len(lines) == 2 * SAMPLE_MAX

"""What is told of calls that have ended: each is counted, and none can flood the log."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog
from latchkey_service.audit import SAMPLE_MAX, AuditLog
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


def test_faults_of_ours_are_all_told(lines: Lines, outcomes: Outcomes) -> None:
    """What nobody foresaw is never left out."""
    for _ in range(2 * SAMPLE_MAX):
        outcomes.fail(WATCH, Context(), 0.0, RuntimeError())
    assert len(lines) == 2 * SAMPLE_MAX

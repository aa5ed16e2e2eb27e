"""What the log keeps of errors that libraries report."""

import logging

import pytest
from latchkey_service.settings import logs

HEADER = b"lk_\xff secret"


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def clock() -> list[float]:
    return [100.0]


@pytest.fixture
def grpcio(clock: list[float]) -> tuple[logging.Logger, Kept]:
    """The logger of grpcio, with the filters that `configure` adds, and what it passes on."""
    kept = Kept()
    # Not the logger of the process.
    logger = logging.Logger(logs.GRPCIO)  # noqa: LOG001 - see above
    for each in (logs._InvalidText(lambda: clock[0]), logs._without_values):
        logger.addFilter(each)
    logger.addHandler(kept)
    return logger, kept


def report_header(logger: logging.Logger) -> None:
    """Log as grpcio does for a header that is not UTF-8."""
    try:
        HEADER.decode()
    except UnicodeDecodeError:
        logger.exception("Invalid encoding on %s", HEADER)


def test_headers_that_are_not_text_are_one_line(
    grpcio: tuple[logging.Logger, Kept], clock: list[float]
) -> None:
    """A peer that sends a thousand headers that are not UTF-8 causes one line a minute, without a
    traceback and without the header. The next line states the number of the others."""
    logger, kept = grpcio
    for _ in range(1_000):
        report_header(logger)
    clock[0] += logs.SAMPLE_SECONDS
    report_header(logger)
    first, second = kept.records
    assert [record.getMessage() for record in (first, second)] == ["Invalid encoding on"] * 2
    assert (first.levelname, first.exc_info) == ("WARNING", None)
    assert (vars(first)["skipped"], vars(second)["skipped"]) == (0, 999)


def test_other_errors_keep_their_tracebacks(grpcio: tuple[logging.Logger, Kept]) -> None:
    """All other errors of grpcio are logged each time, with a traceback, without quoted values."""
    logger, kept = grpcio
    for _ in range(3):
        try:
            raise KeyError(HEADER)
        except KeyError:
            logger.exception("Unexpected [%s] raised", HEADER)
    assert len(kept.records) == 3
    for record in kept.records:
        assert record.getMessage() == "Unexpected"
        assert record.exc_info is not None
        assert str(record.exc_info[1]) == "builtins.KeyError"

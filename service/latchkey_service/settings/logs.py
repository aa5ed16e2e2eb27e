"""Structured logs.

Management calls and failed calls get a line each. Successful verifies are only counted, because a
line costs more than the call; a sample of them is logged on request. No line has a field for
anything that a caller presented, so a secret in a wrong field cannot end up in the log.

Lines go to stderr, and only log lines do: in the JSON format, each line of stderr is JSON. What a
person reads goes to stdout. Neither can stop the service (`stream_writer.py`).
"""

import logging
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import structlog

from latchkey_service import tracing
from latchkey_service.settings.stream_writer import StreamWriter

__all__ = [
    "Format",
    "configure",
    "fail",
    "flush",
    "format_of",
    "lines_dropped",
    "logger",
    "say",
    "start",
]

STDOUT, STDERR = 1, 2
GRPCIO = "grpc._cython.cygrpc"
# Pause between two log lines about metadata that is not text.
SAMPLE_SECONDS = 60.0

Format = Literal["json", "console"]


def logger(**initial: Any) -> structlog.stdlib.BoundLogger:
    """Return a logger whose lines all have the fields in `initial`."""
    return structlog.stdlib.get_logger(**initial)


def format_of(setting: Literal["json", "console", "auto"]) -> Format:
    """Return the format of log lines: `console` on a terminal, `json` elsewhere."""
    if setting != "auto":
        return setting
    return "console" if sys.stderr.isatty() else "json"


def start() -> None:
    """Start to write log lines. Until then they wait, because this starts a thread."""
    _stderr.on_dropped = _report_dropped
    _stderr.start()


def say(text: str) -> None:
    """Print text for people on stdout. Neither a full disk nor a reader that hangs matters."""
    _stdout.put(text.encode(errors="replace"))
    _stdout.start()


def fail(event: str, reason: str, format_: Format) -> None:
    """Report why the process ends: as a log line, or as a sentence for a person at a terminal."""
    if format_ == "json":
        logger().critical(event, reason=reason)
    else:
        _stderr.put(f"latchkey: {event}: {reason}\n".encode(errors="replace"))


def flush() -> None:
    """Write what has not been written yet, for a bounded time: the process is about to end."""
    _stdout.stop()
    _stderr.stop()


def lines_dropped() -> int:
    """Return how many log lines of this process were dropped."""
    return _stderr.dropped


def configure(format_: Format, level: str) -> None:
    """Send all log lines of the process, including those of libraries, to stderr.

    They are written once `start` or `flush` is called.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        _add_trace_id,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # The plain format: the rich one prints local variables, which may hold a secret.
        structlog.processors.format_exc_info,
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if format_ == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    handler = _Handler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    grpcio = logging.getLogger(GRPCIO)
    grpcio.filters[:] = [_InvalidText(time.monotonic), _without_values]
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _add_trace_id(_logger: Any, _method: str, fields: Any) -> Any:
    """Add the id of the call's trace to each line of the call."""
    span = tracing.of_task()
    if span is not None and not span.ended:
        fields.setdefault("trace_id", span.trace_id)
    return fields


_stdout = StreamWriter(STDOUT)
_stderr = StreamWriter(STDERR)


def _report_dropped(lines: int) -> None:
    logger().warning("log lines dropped", lines=lines)


class _Handler(logging.Handler):
    """Queues formatted lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line. What cannot be formatted is lost, and counted."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - a log line must not fail its caller
            _stderr.dropped += 1
        else:
            _stderr.put(f"{line}\n".encode(errors="replace"))


class _InvalidText(logging.Filter):
    """Logs metadata that is not UTF-8 as one line without a traceback, and not each time.

    grpcio logs such a header of any peer as an error, before the caller is known. The next line
    after the pause states the number of those that were not logged.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        super().__init__()
        self._monotonic = monotonic
        self._due = -math.inf
        self._skipped = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log the record."""
        if not (record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError)):
            return True
        now = self._monotonic()
        if now < self._due:
            self._skipped += 1
            return False
        self._due = now + SAMPLE_SECONDS
        record.exc_info = None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.skipped = self._skipped
        self._skipped = 0
        return True


def _without_values(record: logging.LogRecord) -> bool:
    """Remove callers' data from a log line of grpcio, but keep what happened and where.

    grpcio quotes metadata and paths that are not UTF-8 before any of our handlers run. That may
    include a credential with a stray byte.
    """
    # The values follow a placeholder ("Invalid encoding on %s") or are already in brackets.
    record.msg = re.split(r"[\[%]", str(record.msg))[0].strip()
    record.args = None
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        bare = RuntimeError(f"{type(error).__module__}.{type(error).__qualname__}")
        record.exc_info = (type(bare), bare, error.__traceback__)
    return True

"""What is told of calls: structured log lines, and counts where a line each would cost too much.

A management call and a failed call get a line each. A successful verify is counted, and a share of
them, off by default, gets a line: writing one costs more than the call. No line has a field for
anything that a caller presented: a secret cannot be logged by mistake of a caller who puts it in
the wrong field either.
"""

import logging
import re
import sys
from collections import Counter
from typing import Any, Literal

import structlog

from latchkey_service.verdict import Verdict

__all__ = ["Counts", "Form", "configure", "form", "logger"]

GRPCIO = "grpc._cython.cygrpc"

Form = Literal["json", "console"]


def logger(**initial: Any) -> structlog.stdlib.BoundLogger:
    """Return a logger, with fields that each of its lines has."""
    return structlog.stdlib.get_logger(**initial)


class Counts:
    """Counts since the last summary. Belongs to the event loop."""

    def __init__(self) -> None:
        self.verdicts: Counter[Verdict] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()

    def take(self) -> dict[str, int]:
        """Return the counts by name and start anew."""
        summary = {f"verdict.{v.name}": n for v, n in sorted(self.verdicts.items())}
        summary |= {f"{method}.{code}": n for (method, code), n in sorted(self.calls.items())}
        self.verdicts.clear()
        self.calls.clear()
        return summary


def form(setting: Literal["json", "console", "auto"]) -> Form:
    """Return the form of log lines: for people on a terminal, for programs elsewhere."""
    if setting != "auto":
        return setting
    return "console" if sys.stderr.isatty() else "json"


def configure(form_: Form, level: str) -> None:
    """Send all of the process's log lines, those of libraries included, to standard error."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # The plain form: the rich one prints local variables, and those may hold a secret.
        structlog.processors.format_exc_info,
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if form_ == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.getLogger(GRPCIO).addFilter(_without_values)
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


def _without_values(record: logging.LogRecord) -> bool:
    """Take what callers sent out of a line of grpcio's; what happened, and where, stays.

    It quotes metadata and paths that are not UTF-8, before any handler of ours is asked: also a
    credential that has come with a stray byte.
    """
    # They are yet to be filled in, as in "Invalid encoding on %s", or were, between brackets.
    record.msg = re.split(r"[\[%]", str(record.msg))[0].strip()
    record.args = None
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        bare = RuntimeError(f"{type(error).__module__}.{type(error).__qualname__}")
        record.exc_info = (type(bare), bare, error.__traceback__)
    return True

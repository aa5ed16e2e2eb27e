"""Log lines of one object, without those of the servers that share the event loop, and everything
that the process logs."""

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

from latchkey_service.settings import logs

__all__ = ["Lines", "everything_logged"]


class Lines(list[dict[str, Any]]):
    """Takes the place of an object's logger, and keeps what is logged."""

    def _keep(self, level: str, event: str, fields: dict[str, Any]) -> None:
        self.append({"log_level": level, "event": event, **fields})

    def info(self, event: str, **fields: Any) -> None:
        self._keep("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._keep("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._keep("error", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        self._keep("error", event, fields)


@contextlib.contextmanager
def everything_logged(format_: logs.Format, level: str) -> Iterator[io.StringIO]:
    """Yield what the process logs meanwhile, in this format and from this level on."""
    root = logging.getLogger()
    handlers, before = root.handlers[:], root.level
    logs.configure(format_, level)
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(root.handlers[0].formatter)
    root.handlers[:] = [handler]
    try:
        yield written
    finally:
        root.handlers[:] = handlers
        root.setLevel(before)

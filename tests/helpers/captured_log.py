"""Log lines of one object, without those of the servers that share the event loop."""

from typing import Any

__all__ = ["Lines"]


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

"""Builds a worker's tracing from the settings: which calls it records, their export, and counts of
spans.

Without traces, a worker records nothing and does not load the libraries.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from latchkey_service.postgres.connections import PlainConnection
from latchkey_service.postgres.traced_connection import TracedConnection
from latchkey_service.process.metric_families import Families
from latchkey_service.rpc.traced_calls import CallTracing
from latchkey_service.settings.settings import Settings

if TYPE_CHECKING:
    from latchkey_service.process.trace_export import TraceExport

__all__ = ["Traces"]


class Traces:
    """The parts of one worker. Event loop only."""

    def __init__(
        self, settings: Settings, instance_id: str, monotonic: Callable[[], float]
    ) -> None:
        self.calls: CallTracing | None = None
        self.connection_class: type[PlainConnection] = PlainConnection
        self.export: TraceExport | None = None
        if settings.traces == "on":
            from latchkey_service.process import trace_export  # noqa: PLC0415 - loads the libraries

            self.export = trace_export.TraceExport(instance_id)
            self.calls = CallTracing(
                self.export.start,
                settings.traces_verify_share,
                settings.traces_managed_share,
                settings.traces_per_second,
                monotonic,
            )
            self.connection_class = TracedConnection

    def add_metrics(self, found: Families) -> None:
        """Add the metrics of spans, and of calls that were not recorded."""
        if self.export is None or self.calls is None:
            return
        found.add("latchkey_trace_spans", self.export.exported, "exported")
        found.add("latchkey_trace_spans", self.export.dropped, "dropped")
        found.add("latchkey_trace_spans", self.export.failed, "failed")
        found.add("latchkey_trace_calls_limited", self.calls.limited)

    async def close(self) -> None:
        """Send the last spans, for a bounded time."""
        if self.export is not None:
            await self.export.close()

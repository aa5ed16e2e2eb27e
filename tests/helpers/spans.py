"""The spans that a server in this process records, in place of a collector."""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from latchkey_service.process import trace_export
from latchkey_service.process.server import Server
from latchkey_service.settings.settings import Settings
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.helpers.servers import serving_as
from tests.helpers.waiting import eventually

__all__ = ["PARENT", "TRACE", "Recorded", "attributes", "recording", "trace_of", "traceparent"]

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def traceparent(flags: str = "01", trace: str = TRACE) -> tuple[tuple[str, str], ...]:
    """Metadata of a caller with a trace, which records its part unless `flags` differ."""
    return (("traceparent", f"00-{trace}-{PARENT}-{flags}"),)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


@dataclass
class Recorded:
    """A server that records traces."""

    server: Server
    memory: InMemorySpanExporter

    @property
    def address(self) -> str:
        return self.server.address

    def spans(self) -> list[ReadableSpan]:
        """All spans that have ended, those that ended first come first."""
        export = self.server.metrics.traces.export
        assert export is not None
        export._queue.force_flush()
        return list(self.memory.get_finished_spans())

    async def all(self, fits: Callable[[list[ReadableSpan]], bool]) -> list[ReadableSpan]:
        """Wait until the spans match: the answer may arrive before the span ends."""
        await eventually(lambda: fits(self.spans()), "the spans")
        return self.spans()

    async def named(self, name: str, count: int = 1) -> list[ReadableSpan]:
        """Wait for spans with this name."""
        found = await self.all(lambda spans: sum(s.name == name for s in spans) >= count)
        return [span for span in found if span.name == name]

    def children(self, parent: ReadableSpan) -> list[ReadableSpan]:
        assert parent.context is not None
        wanted = parent.context.span_id
        return [s for s in self.spans() if s.parent is not None and s.parent.span_id == wanted]


@contextlib.asynccontextmanager
async def recording(settings: Settings, **changed: Any) -> AsyncIterator[Recorded]:
    """Run a server with traces, which go to memory."""
    memory = InMemorySpanExporter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_export, "OTLPSpanExporter", lambda **_: memory)
        settings = settings.model_copy(update={"traces": "on", **changed})
        async with serving_as(settings) as server:
            yield Recorded(server, memory)

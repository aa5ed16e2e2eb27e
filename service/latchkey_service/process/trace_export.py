"""Exports the spans of a worker by OTLP, from a separate thread.

Nothing waits for the collector: spans that find the queue full are dropped and counted, and so are
those that the collector does not accept. Imported only if traces are on, because it loads the
libraries of the extra `tracing`.

The exporter reads the standard variables (OTEL_EXPORTER_OTLP_…, OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES). docs/tracing.md lists them.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Sequence
from typing import Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider, sampling
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace import Span as OtelSpan

from latchkey_service import tracing
from latchkey_service.process.trace_requests import Requests
from latchkey_service.release import release
from latchkey_service.settings.logs import logger

__all__ = ["TraceExport"]

# Spans that wait to be sent: about 1.5 kB each, so 3 MB. At the default limit of calls, a collector
# may be unavailable for a few seconds.
QUEUE_MAX: Final = 2_048
BATCH_MAX: Final = 512
# The longest time until a span is sent, if the collector answers.
DELAY_SECONDS: Final = 1.0
# Time limit for the last spans when the worker stops. After it, the worker abandons the request to
# a collector that hangs.
CLOSE_SECONDS: Final = 2.0


class TraceExport:
    """Makes spans and exports them. Event loop only. `exporter` replaces OTLP, for tests.

    `exported`, `dropped` and `failed` count spans: accepted by the collector; not queued, because
    the queue was full; and not accepted. They only increase.
    """

    def __init__(self, instance_id: str, exporter: SpanExporter | None = None) -> None:
        # The library would log every failed request. This class logs when that begins.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self.exported = self.dropped = self.failed = 0
        self._requests = Requests()
        if exporter is None:
            exporter = OTLPSpanExporter(session=self._requests.session)
        self._exporter = exporter
        # Spans in the queue: counted by the event loop, and by the thread that takes them out.
        self._queued = self._taken = 0
        self._failing = False
        # Set when the rest of the spans has been counted as failed.
        self._abandoned = False
        self._log = logger()
        ours = {
            "service.name": "latchkey",
            "service.version": release(),
            "service.instance.id": instance_id,
        }
        self._queue = BatchSpanProcessor(
            _Sender(self),
            max_queue_size=QUEUE_MAX,
            schedule_delay_millis=DELAY_SECONDS * 1_000,
            max_export_batch_size=BATCH_MAX,
        )
        provider = TracerProvider(
            # `CallTracing` decides what is recorded.
            sampler=sampling.ALWAYS_ON,
            resource=Resource(ours).merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(_Queue(self))
        self._tracer = provider.get_tracer("latchkey_service", release())

    def start(
        self, name: str, parent: tracing.Parent | None, attributes: tracing.Attributes
    ) -> tracing.Span:
        """Begin the span of a call."""
        context = Context()
        if parent is not None:
            remote = SpanContext(
                int(parent.trace_id, 16),
                int(parent.span_id, 16),
                is_remote=True,
                trace_flags=TraceFlags(TraceFlags.SAMPLED),
            )
            context = set_span_in_context(NonRecordingSpan(remote), context)
        span = self._tracer.start_span(name, context, SpanKind.SERVER, attributes)
        return _Span(self._tracer, span)

    async def close(self) -> None:
        """Send the last spans, for a bounded time."""
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def close() -> None:
            self._queue.shutdown()  # type: ignore[no-untyped-call]  # has no annotations
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(closed.set)

        # Not in the loop's executor: the process waits for its threads when it ends.
        threading.Thread(target=close, name="close traces", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await closed.wait()
        except TimeoutError:
            # Ends the pause before a retry.
            self._exporter.shutdown()
        self._abandoned = True
        if left := self._queued - self.exported - self.failed:
            self.failed += left
            self._log.warning("spans not exported", spans=left)

    def enqueue(self, span: ReadableSpan) -> None:
        """Queue an ended span, or drop it."""
        if self._queued - self._taken >= QUEUE_MAX:
            self.dropped += 1
            return
        self._queued += 1
        self._queue.on_end(span)

    def send(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans. Runs in the thread of the queue, one batch at a time."""
        self._taken += len(spans)
        try:
            result = self._exporter.export(spans)
        except Exception:  # noqa: BLE001 - the thread must go on
            result = SpanExportResult.FAILURE
        if self._abandoned:
            return result
        accepted = result is SpanExportResult.SUCCESS
        if accepted:
            self.exported += len(spans)
        else:
            self.failed += len(spans)
        if accepted is self._failing:
            self._failing = not accepted
            if accepted:
                self._log.info("the collector accepts traces again")
            else:
                self._log.warning(
                    "the collector does not accept traces",
                    cause=self._requests.cause or "unknown",
                    spans=len(spans),
                )
        return result

    def end_sending(self) -> None:
        """Close the exporter."""
        self._exporter.shutdown()


class _Queue(SpanProcessor):
    """Receives ended spans. In front of the library's queue, which drops without counting."""

    def __init__(self, export: TraceExport) -> None:
        self._export = export

    def on_end(self, span: ReadableSpan) -> None:
        self._export.enqueue(span)


class _Sender(SpanExporter):
    """Counts what the exporter does."""

    def __init__(self, export: TraceExport) -> None:
        self._export = export

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._export.send(spans)

    def shutdown(self) -> None:
        self._export.end_sending()


class _Span:
    """A span of the library, with the interface that the rooms use."""

    def __init__(self, tracer: Tracer, span: OtelSpan) -> None:
        self._tracer = tracer
        self._span = span
        self.code = ""
        self.ended = False

    @property
    def trace_id(self) -> str:
        return format_trace_id(self._span.get_span_context().trace_id)

    def child(
        self, name: str, attributes: tracing.Attributes, links: Sequence[tracing.Span] = ()
    ) -> tracing.Span:
        context = set_span_in_context(self._span, Context())
        found = [Link(each.context) for each in links if isinstance(each, _Span)]
        kind = SpanKind.CLIENT if "db.system.name" in attributes else SpanKind.INTERNAL
        span = self._tracer.start_span(name, context, kind, attributes, found)
        return _Span(self._tracer, span)

    @property
    def context(self) -> SpanContext:
        """The ids of the span."""
        return self._span.get_span_context()

    def link(self, other: tracing.Span) -> None:
        if isinstance(other, _Span):
            self._span.add_link(other.context)

    def set(self, attributes: tracing.Attributes) -> None:
        self._span.set_attributes(attributes)

    def end(self, error: str = "") -> None:
        self.ended = True
        if error:
            # Without a description, which could only repeat the reason.
            self._span.set_status(StatusCode.ERROR)
            self._span.set_attribute("error.type", error)
        self._span.end()

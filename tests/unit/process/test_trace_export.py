"""The queue of spans, and what becomes of those that the collector does not accept."""

import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from latchkey_service.process import trace_export
from latchkey_service.process.trace_export import QUEUE_MAX, TraceExport
from latchkey_service.tracing import Parent
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from tests.helpers.captured_log import Lines
from tests.helpers.waiting import eventually


class Exporter(SpanExporter):
    """Answers with `result`, or raises it, once `gate` is open."""

    def __init__(self) -> None:
        self.result: SpanExportResult | Exception = SpanExportResult.SUCCESS
        self.spans: list[ReadableSpan] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.closed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.entered.set()
        self.gate.wait()
        if isinstance(self.result, Exception):
            raise self.result
        self.spans += spans
        return self.result

    def shutdown(self) -> None:
        self.closed = True


@pytest.fixture
def exporter() -> Exporter:
    return Exporter()


@pytest.fixture
async def export(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TraceExport]:
    monkeypatch.setattr(trace_export, "DELAY_SECONDS", 0.01)
    export: Any = TraceExport("ver_1", exporter)
    export._log = Lines()
    yield export
    exporter.gate.set()
    await export.close()


def record(export: TraceExport, count: int) -> None:
    for _ in range(count):
        export.start("call", None, {}).end()


async def test_a_full_queue_drops_spans(export: TraceExport, exporter: Exporter) -> None:
    """While the collector hangs, the queue has a limit, and the spans beyond it are counted."""
    exporter.gate.clear()
    record(export, 1)
    await eventually(exporter.entered.is_set, "the exporter waits")
    record(export, QUEUE_MAX + 7)
    assert export.dropped == 7
    exporter.gate.set()
    await eventually(lambda: export.exported == QUEUE_MAX + 1, "the rest is sent")
    assert len(exporter.spans) == QUEUE_MAX + 1
    record(export, 1)
    assert export.dropped == 7


async def test_failures_are_counted_and_logged_once(
    export: TraceExport, exporter: Exporter
) -> None:
    """The log contains one line when failures begin, and one when they end. An exception does not
    end the thread.
    """
    for result in (SpanExportResult.FAILURE, ValueError("canary"), SpanExportResult.FAILURE):
        exporter.result, before = result, export.failed
        record(export, 3)
        await eventually(lambda b=before: export.failed == b + 3, "they are counted")  # type: ignore[misc]
    exporter.result = SpanExportResult.SUCCESS
    record(export, 2)
    await eventually(lambda: export.exported == 2, "they are sent")
    log: Any = export._log
    assert [line["event"] for line in log] == [
        "the collector does not accept traces",
        "the collector accepts traces again",
    ]
    assert "canary" not in str(log)


async def test_a_collector_that_hangs_does_not_hold_up_the_end(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the collector hangs at the end, the last spans are lost and counted."""
    monkeypatch.setattr(trace_export, "CLOSE_SECONDS", 0.05)
    export: Any = TraceExport("ver_1", exporter)
    export._log = Lines()
    exporter.gate.clear()
    record(export, 4)
    await export.close()
    assert export.failed == 4
    assert exporter.closed
    assert [line["event"] for line in export._log] == ["spans not exported"]
    exporter.gate.set()


async def test_a_span_without_end_is_not_sent(export: TraceExport, exporter: Exporter) -> None:
    """A span that never ends, such as that of an unknown caller, is not sent."""
    export.start("lost", None, {})
    parent = Parent("1" * 32, "2" * 16, sampled=True)
    export.start("call", parent, {}).end("UNAVAILABLE")
    await eventually(lambda: export.exported == 1, "the other is sent")
    (span,) = exporter.spans
    assert span.name == "call"
    assert span.resource.attributes["service.name"] == "latchkey"
    assert span.resource.attributes["service.instance.id"] == "ver_1"


async def test_the_environment_names_the_service(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES come before our own names."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "tokens")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.namespace=shop,service.name=other")
    export = TraceExport("ver_1", exporter)
    record(export, 1)
    await export.close()
    (span,) = exporter.spans
    assert span.resource.attributes["service.name"] == "tokens"
    assert span.resource.attributes["service.namespace"] == "shop"

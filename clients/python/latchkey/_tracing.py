"""Continues the application's trace in calls of the service, if it uses OpenTelemetry.

Owns the spans of calls, the metadata `traceparent`, and the event of an answer from the cache. It
needs the OpenTelemetry API (the extra `tracing`), and records nothing until the application sets up
an SDK. Attributes never contain a secret or the text of an error.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from latchkey._version import __version__
from latchkey.errors import LatchkeyError
from latchkey.models import Verification

try:
    from opentelemetry import context as contexts
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    _installed = False
else:
    _installed = True
    # Not the propagator that the application has chosen: the service reads W3C's format only, and
    # baggage is not for it.
    _propagator: Final = TraceContextTextMapPropagator()
    _tracer: Final = trace.get_tracer("latchkey", __version__)

if TYPE_CHECKING:
    from opentelemetry.trace import Link, Span

__all__ = ["active", "call", "continued", "current", "metadata", "note", "serving"]

_OTHER_METHODS: Final = {
    "GetStatus": "latchkey.v1.StatusService/GetStatus",
    "AuditService.List": "latchkey.v1.AuditService/List",
    "InvalidateAll": "latchkey.v1.MaintenanceService/InvalidateAll",
}

# Links to other spans that a call serves.
_links: ContextVar[tuple["Link", ...]] = ContextVar("latchkey_links", default=())

active = False
"""Whether the application has set up an SDK, as far as calls have noticed.

Asking OpenTelemetry costs as much as a tenth of a verify that the cache answers.
"""


def current() -> "Span | None":
    """Return the application's current span if it is recorded."""
    if not active:
        return None
    span = trace.get_current_span()
    return span if span.is_recording() else None


def note(answer: Verification) -> None:
    """Add the event of an answer from the cache to the application's current span."""
    if (span := current()) is not None:
        attributes = {"latchkey.verdict": answer.verdict.name, "latchkey.answered_by": "cache"}
        span.add_event("latchkey.verify", attributes)


@contextlib.contextmanager
def serving(spans: Iterable["Span | None"]) -> Iterator[None]:
    """Let the call in this block continue the first of these traces, and link to the others."""
    found = [span for span in spans if span is not None]
    if not found:
        yield
        return
    token = _links.set(tuple(trace.Link(span.get_span_context()) for span in found[1:]))
    try:
        with trace.use_span(found[0], record_exception=False, set_status_on_exception=False):
            yield
    finally:
        _links.reset(token)


@contextlib.contextmanager
def call(rpc: str) -> Iterator[None]:
    """Record a call of the service, with all of its attempts."""
    if not _is_active():
        yield
        return
    name = _OTHER_METHODS.get(rpc, f"latchkey.v1.TokenService/{rpc}")
    attributes = {"rpc.system.name": "grpc", "rpc.method": name}
    links = _links.get()
    span = _tracer.start_span(name, kind=trace.SpanKind.CLIENT, attributes=attributes, links=links)
    code, reason = "OK", None
    try:
        # OpenTelemetry's own handling of exceptions would copy their texts.
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            yield
    except LatchkeyError as error:
        code, reason = error.code.name, error.reason
        raise
    except BaseException:
        code = "CANCELLED"
        raise
    finally:
        span.set_attribute("rpc.response.status_code", code)
        if reason:
            span.set_attribute("latchkey.reason", reason)
        if code != "OK":
            span.set_attribute("error.type", code)
            span.set_status(trace.StatusCode.ERROR)
        span.end()


def metadata() -> tuple[tuple[str, str], ...]:
    """Return the metadata that name the current span."""
    if not _installed:
        return ()
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return tuple(carrier.items())


@contextlib.contextmanager
def continued(traceparent: Sequence[str]) -> Iterator[None]:
    """Continue the trace of a request, unless the application itself does.

    `traceparent` contains the values of the request's header.
    """
    if (
        not _installed
        or len(traceparent) != 1
        or trace.get_current_span().get_span_context().is_valid
    ):
        yield
        return
    token = contexts.attach(_propagator.extract({"traceparent": traceparent[0]}))
    try:
        yield
    finally:
        contexts.detach(token)


def _is_active() -> bool:
    """Return whether the application has set up an SDK."""
    global active  # noqa: PLW0603 - a cache of OpenTelemetry's own global
    if not active and _installed:
        active = not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    return active

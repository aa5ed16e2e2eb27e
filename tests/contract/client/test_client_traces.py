"""The client library and the guards continue the application's trace."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import latchkey
import pytest
from latchkey import _tracing
from latchkey.guards import asgi
from latchkey_service.settings.settings import Settings
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, Tracer

from tests.helpers.servers import make_settings
from tests.helpers.spans import PARENT, TRACE, Recorded, attributes, recording, trace_of

SERVICE = "latchkey.v1.TokenService"


class Application:
    """An application with an SDK, whose spans go to memory."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._memory))
        self.tracer: Tracer = provider.get_tracer("application")

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._memory.get_finished_spans() if span.name == name]


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Application:
    # The global provider of a process can be set only once.
    application = Application()
    monkeypatch.setattr(_tracing, "_tracer", application.tracer)
    monkeypatch.setattr(_tracing, "active", True)
    return application


@pytest.fixture
async def recorded(database_url: str, pepper_file: Path) -> AsyncIterator[Recorded]:
    settings: Settings = make_settings(database_url, pepper_file, "native")
    async with recording(settings, traces_managed_share=0.0) as found:
        yield found


@pytest.fixture
async def secret(recorded: Recorded) -> str:
    async with latchkey.Client(recorded.address) as client:
        created = await client.create("acme", "one", latchkey.Scope.READ)
        return created.secret.reveal()


async def test_one_trace_from_the_application_to_postgres(
    app: Application, recorded: Recorded, secret: str
) -> None:
    """The call's span is a child of the application's, and the parent of the service's."""
    async with latchkey.Verifier(recorded.address) as verifier:
        with app.tracer.start_as_current_span("request") as request:
            assert (await verifier.verify(secret)).allowed
    (call,) = app.spans(f"{SERVICE}/Verify")
    assert call.kind is SpanKind.CLIENT
    assert call.parent == request.get_span_context()
    assert attributes(call) == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{SERVICE}/Verify",
        "rpc.response.status_code": "OK",
    }
    (served,) = await recorded.named(f"{SERVICE}/Verify")
    assert served.parent is not None
    assert call.context is not None
    assert served.parent.span_id == call.context.span_id
    (query,) = recorded.children(served)
    assert query.name == "SELECT token"
    assert trace_of(query) == trace_of(served) == trace_of(call)


async def test_an_answer_from_the_cache_is_an_event(
    app: Application, recorded: Recorded, secret: str
) -> None:
    """The application's span has the verdict, and no secret; the service is not called."""
    async with latchkey.Verifier(recorded.address) as verifier:
        while not verifier.stats().watching:
            await verifier.verify(secret)
        await verifier.verify(secret)
        calls = len(app.spans(f"{SERVICE}/Verify"))
        with app.tracer.start_as_current_span("request"):
            await verifier.verify(secret)
            await verifier.verify("lk_typo")
        await verifier.verify(secret)
    assert len(app.spans(f"{SERVICE}/Verify")) == calls
    (request,) = app.spans("request")
    assert [(event.name, dict(event.attributes or {})) for event in request.events] == [
        ("latchkey.verify", {"latchkey.verdict": verdict, "latchkey.answered_by": "cache"})
        for verdict in ("VALID", "MALFORMED")
    ]
    assert secret not in request.to_json()


async def test_verifies_that_share_a_call_are_linked(
    app: Application, recorded: Recorded, secret: str
) -> None:
    """The shared call belongs to the first trace, and links to the others."""

    async def request(name: str, presented: str) -> None:
        with app.tracer.start_as_current_span(name):
            await verifier.verify(presented)

    async with latchkey.Verifier(recorded.address, cache_entries=0) as verifier:
        async with latchkey.Client(recorded.address) as client:
            other = (await client.create("acme", "two", latchkey.Scope.READ)).secret.reveal()
        await asyncio.gather(request("first", secret), request("second", other))
    (call,) = app.spans(f"{SERVICE}/BatchVerify")
    (first,), (second,) = app.spans("first"), app.spans("second")
    assert call.parent == first.context
    assert [link.context for link in call.links] == [second.context]


async def test_errors_have_their_status(
    app: Application, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a client, every status except OK is an error. No text of an error is recorded."""
    async with latchkey.Client(recorded.address) as client:
        with pytest.raises(latchkey.NotFound):
            await client.get("acme", "tok_" + "0" * 20)
        with pytest.raises(latchkey.InvalidArgument):
            await client.create("acme", "canary" * 100, latchkey.Scope.READ)
    (get,), (create,) = app.spans(f"{SERVICE}/Get"), app.spans(f"{SERVICE}/Create")
    for span, code, reason in (
        (get, "NOT_FOUND", "TOKEN_NOT_FOUND"),
        (create, "INVALID_ARGUMENT", "INVALID_ARGUMENT"),
    ):
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description is None
        assert attributes(span)["rpc.response.status_code"] == code
        assert attributes(span)["error.type"] == code
        assert attributes(span)["latchkey.reason"] == reason
        assert span.events == ()
        assert "canary" not in span.to_json()


async def test_other_services_have_their_names(app: Application, recorded: Recorded) -> None:
    """The full names of methods are those of the contract."""
    async with latchkey.Client(recorded.address) as client:
        await client.status()
        await client.audit_page()
        await client.invalidate_all()
    for name in (
        "StatusService/GetStatus",
        "AuditService/List",
        "MaintenanceService/InvalidateAll",
    ):
        assert len(app.spans(f"latchkey.v1.{name}")) == 1
        await recorded.named(f"latchkey.v1.{name}")


async def test_a_guard_continues_the_requests_trace(
    app: Application, recorded: Recorded, secret: str
) -> None:
    """A guard continues it even in an application that records nothing itself. If the application
    has a span, the guard uses that one.
    """
    incoming = f"00-{TRACE}-{PARENT}-01"
    async with latchkey.Verifier(recorded.address, cache_entries=0) as verifier:
        guard = asgi.GuardMiddleware(_served, verifier)
        await _request(guard, secret, incoming)
        with app.tracer.start_as_current_span("request") as own:
            await _request(guard, secret, incoming)
        await _request(guard, secret, "00-malformed")
    of_request, of_application, of_none = await recorded.named(f"{SERVICE}/Verify", 3)
    assert trace_of(of_request) == TRACE
    assert trace_of(of_application) == f"{own.get_span_context().trace_id:032x}"
    assert trace_of(of_none) not in {TRACE, trace_of(of_application)}
    assert not trace.get_current_span().get_span_context().is_valid


async def test_without_an_sdk_nothing_is_sent(
    recorded: Recorded, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an SDK or the library, no trace is sent, and the guard works all the same."""
    for installed in (True, False):
        monkeypatch.setattr(_tracing, "_installed", installed)
        async with latchkey.Verifier(recorded.address, cache_entries=0) as verifier:
            answer = await verifier.verify(secret)
            assert answer.allowed
            await _request(asgi.GuardMiddleware(_served, verifier), secret, "00-x")
        assert not _tracing.active
    assert recorded.spans() == []


async def _served(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def _request(guard: Any, secret: str, traceparent: str) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [
        (b"authorization", f"Bearer {secret}".encode()),
        (b"traceparent", traceparent.encode()),
    ]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    await guard(scope, None, send)
    assert sent[0]["status"] == 200

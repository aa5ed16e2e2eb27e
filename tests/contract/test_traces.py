"""Calls are recorded as traces, from the caller's span to the statements in Postgres."""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service import tracing
from latchkey_service.settings.settings import Settings
from opentelemetry.trace import SpanKind, StatusCode

from tests.helpers.callers import credential, policy_text
from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.captured_log import everything_logged
from tests.helpers.metrics import read
from tests.helpers.spans import (
    PARENT,
    TRACE,
    Recorded,
    attributes,
    recording,
    trace_of,
    traceparent,
)
from tests.helpers.waiting import eventually
from tests.helpers.watch_client import watching

SERVICE = "latchkey.v1.TokenService"
VERIFY = f"{SERVICE}/Verify"


@pytest.fixture
async def recorded(settings: Settings) -> AsyncIterator[Recorded]:
    """A server that records calls whose callers do, and no others."""
    async with recording(settings, traces_managed_share=0.0) as found:
        yield found


@pytest.fixture
async def channel(recorded: Recorded) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(recorded.address, options=CHANNEL_OPTIONS) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.TokenServiceStub(channel)


async def create(stub: Any, name: str = "one", **options: Any) -> pb.CreateResponse:
    request = pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ)
    created: pb.CreateResponse = await stub.Create(request, timeout=5, **options)
    return created


async def test_a_verify_continues_the_callers_trace(recorded: Recorded, stub: Any) -> None:
    """A cold Verify is a child of the caller's span, and its query a child of the Verify."""
    created = await create(stub)
    request = pb.VerifyRequest(secret=created.secret)
    for _ in range(2):
        await stub.Verify(request, timeout=5, metadata=traceparent())
    cold, warm = await recorded.named(VERIFY, 2)
    for span in (cold, warm):
        assert trace_of(span) == TRACE
        assert span.parent is not None
        assert f"{span.parent.span_id:016x}" == PARENT
        assert span.kind is SpanKind.SERVER
        assert span.status.status_code is StatusCode.UNSET
        assert attributes(span) == {
            "rpc.system.name": "grpc",
            "rpc.method": VERIFY,
            "rpc.response.status_code": "OK",
            "latchkey.verdict": "VALID",
        }
    (query,) = recorded.children(cold)
    assert trace_of(query) == TRACE
    assert (query.name, query.kind) == ("SELECT token", SpanKind.CLIENT)
    assert attributes(query) == {
        "db.system.name": "postgresql",
        "db.operation.name": "SELECT",
        "db.collection.name": "token",
        "db.query.summary": "SELECT token",
    }
    assert recorded.children(warm) == []


async def test_a_batch_has_its_verdicts(settings: Settings, tmp_path: Path) -> None:
    """The span of a BatchVerify counts the verdicts as its caller gets them: for a caller that the
    policy limits to one account, tokens of others are UNKNOWN. It has no attribute for a verdict
    that no answer has, and a batch that is rejected has no verdicts."""
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text())

    def of(caller: str) -> tuple[tuple[str, str], ...]:
        return (*traceparent(), ("authorization", f"Bearer {credential(caller)}"))

    async with (
        recording(settings, policy=policy) as recorded,
        grpc.aio.insecure_channel(recorded.address, options=CHANNEL_OPTIONS) as channel,
    ):
        stub: Any = pb_grpc.TokenServiceStub(channel)
        secret = (await create(stub, metadata=of("manager"))).secret
        other = pb.CreateRequest(account_id="globex", name="one", scope=pb.SCOPE_READ)
        others = (await stub.Create(other, timeout=5, metadata=of("manager"))).secret
        asked = [
            *([(secret, pb.SCOPE_READ)] * 2),
            (secret, pb.SCOPE_WRITE),
            (others, pb.SCOPE_UNSPECIFIED),
            ("x", pb.SCOPE_UNSPECIFIED),
        ]
        requests = [pb.VerifyRequest(secret=s, required_scope=scope) for s, scope in asked]
        batch = pb.BatchVerifyRequest(requests=requests)
        for caller in ("verifier", "acmes-verifier"):
            await stub.BatchVerify(batch, timeout=5, metadata=of(caller))
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.BatchVerify(pb.BatchVerifyRequest(), timeout=5, metadata=of("verifier"))
        spans = await recorded.named(f"{SERVICE}/BatchVerify", 3)
    prefix = "latchkey.verdicts."
    assert [
        {k.removeprefix(prefix): n for k, n in attributes(span).items() if k.startswith(prefix)}
        for span in spans
    ] == [
        {"valid": 3, "insufficient_scope": 1, "malformed": 1},
        {"valid": 2, "insufficient_scope": 1, "unknown": 1, "malformed": 1},
        {},
    ]


async def test_a_delete_shows_its_statements_and_its_wait(settings: Settings) -> None:
    """The wait for verifiers is a span that counts acknowledgements and expired leases."""
    async with (
        recording(settings, traces_managed_share=0.0, lease_seconds=2.0) as recorded,
        grpc.aio.insecure_channel(recorded.address, options=CHANNEL_OPTIONS) as channel,
        watching(recorded.address) as client,
    ):
        stub: Any = pb_grpc.TokenServiceStub(channel)
        created = await create(stub)
        await client.granted()
        # On a busy machine, the Delete may begin after the end of this lease.
        holding = asyncio.create_task(client.hold())
        request = pb.DeleteRequest(account_id="acme", id=created.token.id)
        await stub.Delete(request, timeout=10, metadata=traceparent())
        await holding
        (call,) = await recorded.named(f"{SERVICE}/Delete")
        children = recorded.children(call)
    assert {trace_of(span) for span in children} == {TRACE}
    (wait,) = (span for span in children if span.name == "wait for verifiers")
    assert wait.kind is SpanKind.INTERNAL
    # The client did not confirm, so its lease had to expire.
    assert attributes(wait) == {
        "latchkey.verifiers.acknowledged": 1,
        "latchkey.verifiers.outwaited": 0,
        "latchkey.verifiers.clients_acknowledged": 0,
        "latchkey.verifiers.clients_outwaited": 1,
    }
    (delete,) = (span for span in children if span.name == "UPDATE token")
    assert "INSERT deletion" in attributes(delete)["db.query.summary"]
    assert recorded.children(wait) == []


async def test_one_query_for_several_verifies_links_to_them(recorded: Recorded, stub: Any) -> None:
    """The query belongs to the trace of the first Verify, and links with the others."""
    secrets = [(await create(stub, f"token {number}")).secret for number in range(1, 4)]
    lookup = recorded.server.metrics.lookup
    connects, release = asyncio.Event(), asyncio.Event()
    dedicated = lookup._lookup_connection._connection
    connect = dedicated._connect

    async def held() -> Any:
        connects.set()
        await release.wait()
        return await connect()

    def verify(secret: str, metadata: Any = ()) -> "asyncio.Future[Any]":
        request = pb.VerifyRequest(secret=secret)
        return asyncio.ensure_future(stub.Verify(request, timeout=10, metadata=metadata))

    dedicated._connect = held
    calls: list[asyncio.Future[Any]] = []

    async def connecting() -> bool:
        """Make a query wait for a connection. One that was on its way before may answer it."""
        lookup.reconnect()
        call = verify((await create(stub, f"early {len(calls)}")).secret)
        calls.append(call)
        await asyncio.wait(
            (call, asyncio.ensure_future(connects.wait())), return_when=asyncio.FIRST_COMPLETED
        )
        return connects.is_set()

    # It may also be the query of a health check. A query that was sent before the reconnect would
    # end, and the next one would take the calls below one by one.
    await eventually(connecting, "a query waits for a connection")
    traces = [str(number) * 32 for number in range(1, 4)]
    for number, trace in enumerate(traces, start=1):
        calls.append(verify(secrets[number - 1], traceparent(trace=trace)))

        def queued(wanted: int = number) -> bool:
            return sum(waiter.span is not None for waiter in lookup._waiting) == wanted

        await eventually(queued, "the call waits")
    release.set()
    # The early ones may have failed with their connection.
    await asyncio.gather(*calls, return_exceptions=True)
    verifies = {trace_of(span): span for span in await recorded.named(VERIFY, 3)}
    (query,) = await recorded.named("SELECT token")
    first, *others = (verifies[trace] for trace in traces)
    assert query.parent == first.context
    assert [link.context for link in query.links] == [span.context for span in others]
    assert [[link.context for link in span.links] for span in others] == [[query.context]] * 2


NOBODYS = pb.GetRequest(account_id="acme", id="tok_" + "0" * 20).SerializeToString()
FAILURES: list[tuple[bytes, str, str, str, bool]] = [
    (NOBODYS, "", "NOT_FOUND", "TOKEN_NOT_FOUND", False),
    (b"", "", "INVALID_ARGUMENT", "INVALID_ARGUMENT", False),
    (b"\xff", "", "INVALID_ARGUMENT", "REQUEST_NOT_PARSED", False),
    (NOBODYS, "away", "UNAVAILABLE", "DATABASE_UNAVAILABLE", True),
    (NOBODYS, "bug", "INTERNAL", "INTERNAL", True),
    (NOBODYS, "late", "CANCELLED", "CANCELLED", False),
]


async def test_failures_have_their_status(recorded: Recorded, channel: grpc.aio.Channel) -> None:
    """A call that fails has its gRPC status and reason, and never the text of an exception."""
    pool, method = recorded.server.metrics.pool, f"{SERVICE}/Get"
    get: Any = channel.unary_unary(f"/{method}")
    acquire = pool._acquire
    for number, (data, fault, code, reason, is_error) in enumerate(FAILURES, start=1):
        started = asyncio.Event()

        async def fail() -> Any:
            # Background tasks, such as the comparison of peppers, use the pool too.
            if tracing.current() is None:
                return await acquire()
            started.set()  # noqa: B023 - called before the next round
            if fault == "late":  # noqa: B023
                await asyncio.Event().wait()
            raise OSError("canary") if fault == "away" else KeyError("canary")  # noqa: B023

        pool._acquire = fail if fault else acquire  # type: ignore[method-assign]
        call: Any = get(data, timeout=5, metadata=traceparent())
        if fault == "late":
            await started.wait()
            call.cancel()
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await call
        span = (await recorded.named(method, number))[-1]
        found = attributes(span)
        assert found["rpc.response.status_code"] == code
        assert found["latchkey.reason"] == reason
        assert found["latchkey.request_id"]
        assert found.get("error.type") == (code if is_error else None)
        assert (span.status.status_code is StatusCode.ERROR) is is_error
        assert span.status.description is None
        assert span.events == ()
    assert "canary" not in str([each.to_json() for each in recorded.spans()])


async def test_a_failing_statement_has_its_sqlstate(recorded: Recorded) -> None:
    """The span of a statement that Postgres refuses has the SQLSTATE, and not the message."""
    parts = recorded.server.metrics
    assert parts.traces.export is not None
    call = parts.traces.export.start("call", None, {})
    with tracing.within(call), pytest.raises(asyncpg.UndefinedColumnError):
        async with parts.pool.session() as session:
            await session.fetch("SELECT canary")
    statement = (await recorded.named("SELECT"))[-1]
    assert attributes(statement)["db.response.status_code"] == "42703"
    assert attributes(statement)["error.type"] == "UndefinedColumnError"
    assert statement.status.status_code is StatusCode.ERROR
    assert "canary" not in str(statement.to_json())


async def test_calls_that_their_callers_do_not_record(recorded: Recorded, stub: Any) -> None:
    """A malformed traceparent, or one without the flag, does not disturb the call."""
    request = pb.VerifyRequest(secret="x")
    for metadata in ((("traceparent", "00-x"),), traceparent("00")):
        await stub.Verify(request, timeout=5, metadata=metadata)
    await stub.Verify(request, timeout=5, metadata=traceparent(trace="1" * 32))
    await recorded.named(VERIFY)
    assert [trace_of(span) for span in recorded.spans()] == ["1" * 32]


async def test_callers_cannot_force_recording(settings: Settings) -> None:
    """Of a flood of calls with traces, as many are recorded as the setting allows, and the rest
    are counted."""
    async with (
        recording(settings, traces_per_second=5.0) as recorded,
        grpc.aio.insecure_channel(recorded.address, options=CHANNEL_OPTIONS) as channel,
    ):
        # The clock does not advance, so nothing is added to the first five.
        calls = recorded.server.metrics.traces.calls
        assert calls is not None
        now = calls._monotonic()
        calls._monotonic = lambda: now
        stub: Any = pb_grpc.TokenServiceStub(channel)
        request = pb.VerifyRequest(secret="x")
        for _ in range(40):
            await stub.Verify(request, timeout=5, metadata=traceparent())
        await recorded.named(VERIFY, 5)
        found = read(recorded.server)
        assert found.get("latchkey_trace_calls_limited_total") == 35
        assert found.get("latchkey_trace_spans_total", result="exported") == 5


async def test_shares_without_a_parent(settings: Settings) -> None:
    """By default, managed calls without a trace are recorded in a new one, and verifies are
    not."""
    async with (
        recording(settings) as recorded,
        grpc.aio.insecure_channel(recorded.address, options=CHANNEL_OPTIONS) as channel,
    ):
        stub: Any = pb_grpc.TokenServiceStub(channel)
        await stub.Verify(pb.VerifyRequest(secret="x"), timeout=5)
        created = await create(stub)
        await stub.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError):
            await create(stub, metadata=traceparent("00"))
        (call,) = await recorded.named(f"{SERVICE}/Create")
        assert call.parent is None
        assert {span.name for span in recorded.spans()} >= {f"{SERVICE}/Create", "INSERT token"}
        assert {trace_of(span) for span in recorded.spans()} == {trace_of(call)}


async def test_log_lines_and_audit_entries_name_the_trace(
    recorded: Recorded, stub: Any, channel: grpc.aio.Channel
) -> None:
    """Log lines and audit entries name the caller's trace, even for calls that are not recorded."""
    with everything_logged("json", "info") as written:
        created = await create(stub, metadata=traceparent())
        request = pb.GetRequest(account_id="acme", id=created.token.id)
        await stub.Get(request, timeout=5, metadata=traceparent("00", "2" * 32))
        await stub.Get(request, timeout=5)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.BatchVerify(
                pb.BatchVerifyRequest(), timeout=5, metadata=traceparent(trace="3" * 32)
            )
        audit: Any = audit_pb_grpc.AuditServiceStub(channel)
        wanted = audit_pb.AuditServiceListRequest(token_id=created.token.id)
        found: dict[str, list[str]] = {}

        async def complete() -> bool:
            found.clear()
            for entry in (await audit.List(wanted, timeout=5)).entries:
                method = entry.method.rpartition("/")[2]
                found.setdefault(method, []).append(entry.trace_id)
            return len(found.get("Get", ())) == 2

        await eventually(complete, "the entries of all calls")
    assert found["Create"] == [TRACE]
    assert found["Get"] == ["", "2" * 32]
    for trace in (TRACE, "2" * 32, "3" * 32):
        assert f'"trace_id": "{trace}"' in written.getvalue()


async def test_waiting_refusals_do_not_use_up_the_limit(settings: Settings, tmp_path: Path) -> None:
    """While anonymous calls with a trace wait for their refusal, a known caller is recorded."""
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text())
    async with (
        recording(settings, policy=policy, traces_per_second=1.0) as recorded,
        grpc.aio.insecure_channel(recorded.address, options=CHANNEL_OPTIONS) as channel,
    ):
        server = recorded.server
        calls = server.metrics.traces.calls
        assert calls is not None
        now = calls._monotonic()
        calls._monotonic = lambda: now
        server.refused._pacer._due = math.inf
        stub: Any = pb_grpc.TokenServiceStub(channel)
        request = pb.VerifyRequest(secret="x")
        anonymous: Any = stub.Verify(request, timeout=30, metadata=traceparent(trace="1" * 32))

        def waits() -> bool:
            return server.refused.open == 1

        await eventually(waits, "the anonymous call waits")
        presented = ("authorization", f"Bearer {credential('verifier')}")
        await stub.Verify(request, timeout=5, metadata=(*traceparent(), presented))
        assert not anonymous.done()
        await recorded.named(VERIFY)
        assert [trace_of(span) for span in recorded.spans()] == [TRACE]
        anonymous.cancel()


async def test_unknown_callers_are_not_recorded(settings: Settings, tmp_path: Path) -> None:
    """Calls of unknown callers are not recorded, and do not use up the limit. Calls of known
    callers that lack permission are recorded.
    """
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text())
    async with (
        recording(settings, policy=policy, traces_per_second=1.0) as recorded,
        grpc.aio.insecure_channel(recorded.address, options=CHANNEL_OPTIONS) as channel,
    ):
        stub: Any = pb_grpc.TokenServiceStub(channel)
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Verify(pb.VerifyRequest(secret="x"), timeout=5, metadata=traceparent())
        presented = ("authorization", f"Bearer {credential('verifier')}")
        metadata = (*traceparent(), presented)
        with pytest.raises(grpc.aio.AioRpcError):
            await create(stub, metadata=metadata)
        (span,) = await recorded.named(f"{SERVICE}/Create")
        assert attributes(span)["rpc.response.status_code"] == "PERMISSION_DENIED"
        assert {each.name for each in recorded.spans()} == {span.name}

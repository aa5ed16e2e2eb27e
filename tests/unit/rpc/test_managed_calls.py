"""The path of managed calls, with a servicer and a transport that the tests replace."""

import asyncio
import gc
import time
import weakref
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.audit.audit_log import AuditLog
from latchkey_service.errors import StoreUnavailable
from latchkey_service.rpc.call_report import CallReporter
from latchkey_service.rpc.counters import Counts
from latchkey_service.rpc.managed_calls import ManagedCalls, current_call

from tests.helpers.labels import create_with_labels

CREATE = "/latchkey.v1.TokenService/Create"
DELETE = "/latchkey.v1.TokenService/Delete"


class Context:
    """A call without metadata or a deadline. Keeps the status that it is given."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None

    def invocation_metadata(self) -> None:
        return None

    def auth_context(self) -> None:
        return None

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> None:
        return None

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        pass

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        pass


@pytest.fixture
def audit() -> AuditLog:
    return AuditLog(None, time.monotonic, lambda: datetime.now(UTC))  # type: ignore[arg-type]  # it writes nothing


@pytest.fixture
def calls(audit: AuditLog) -> ManagedCalls:
    counts = Counts()
    reporter = CallReporter(counts, audit, time.monotonic)
    return ManagedCalls(counts, audit, reporter, time.monotonic, time.monotonic)


async def create(request: Any, context: Any) -> pb.CreateResponse:
    raise AssertionError("the request must not get here")


async def test_many_labels_take_milliseconds(calls: ManagedCalls) -> None:
    """A Create with 590,000 labels takes milliseconds of the event loop's time. Parsing it would
    take a second, and longer than that a lease may be late."""
    handler = calls.handler(CREATE, create, pb.CreateRequest.FromString, None)
    data = create_with_labels(590_000)
    took = []
    for _ in range(5):
        context = Context()
        began = time.thread_time()
        await handler(data, context)
        took.append(time.thread_time() - began)
        assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert min(took) < 0.005


class Request:
    """Stands in for a parsed request that is large."""

    account_id = "acme"
    id = ""


async def test_nothing_of_a_refused_call_outlives_it(calls: ManagedCalls) -> None:
    """When a call has failed, its request is freed at once, without a garbage collection, although
    the transport still holds the call's context."""
    requests = []

    def parse(_: bytes) -> Request:
        request = Request()
        requests.append(weakref.ref(request))
        return request

    async def fail(request: Any, _: Any) -> pb.DeleteResponse:
        await asyncio.sleep(0)
        raise StoreUnavailable("away")

    handler = calls.handler(DELETE, fail, parse, None)
    context = Context()
    gc.collect()
    gc.disable()
    try:
        await asyncio.create_task(handler(b"", context))  # type: ignore[arg-type]  # a coroutine
        assert context.code is grpc.StatusCode.UNAVAILABLE
        assert [request() for request in requests] == [None] * len(requests)
    finally:
        gc.enable()
    assert requests


@pytest.mark.parametrize("committed", [False, True])
async def test_a_committed_change_has_one_entry(
    calls: ManagedCalls, audit: AuditLog, committed: bool
) -> None:
    """If a call fails after its change was committed, the entry that was committed with it is the
    only one. If it fails before that, its failure gets an entry."""

    async def fail(_request: Any, _context: Any) -> pb.DeleteResponse:
        if committed:
            current_call.get().committed()
        raise StoreUnavailable("away")

    handler = calls.handler(DELETE, fail, pb.DeleteRequest.FromString, None)
    request = pb.DeleteRequest(account_id="acme", id="tok_" + "0" * 26)
    await handler(request.SerializeToString(), Context())
    entries = [(entry.account_id, entry.reason) for entry in audit._waiting]
    assert entries == ([] if committed else [("acme", "DATABASE_UNAVAILABLE")])

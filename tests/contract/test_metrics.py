"""Each metric of a worker moves when its event happens."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.access.methods import MANAGER
from latchkey_service.audit.sampling import FIRST_MAX
from latchkey_service.coherence.rows import PostgresRows
from latchkey_service.process.server import Server
from latchkey_service.settings.settings import Settings

from tests.helpers.callers import policy_text, write_server_files
from tests.helpers.calls import CHANNEL_OPTIONS
from tests.helpers.metrics import Reading, read
from tests.helpers.servers import serving_as
from tests.helpers.waiting import eventually
from tests.helpers.watch_client import watching

SERVICE = "latchkey.v1.TokenService"
# A Delete has to commit within it, on a busy machine, for the deletion to wait for a client.
LEASE_SECONDS = 1.5


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[Server]:
    """A server whose counters only this test moves. It caches one verdict."""
    settings = settings.model_copy(update={"cache_entries": 1, "lease_seconds": LEASE_SECONDS})
    async with serving_as(settings) as server:
        yield server


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        yield pb_grpc.TokenServiceStub(channel)


async def create(stub: Any, name: str) -> pb.CreateResponse:
    request = pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ)
    created: pb.CreateResponse = await stub.Create(request, timeout=5)
    return created


async def test_calls_and_verdicts(server: Server, stub: Any) -> None:
    """Calls are counted by method and code, verdicts by kind and by where they came from."""
    first, second = await create(stub, "first"), await create(stub, "second")
    for secret in (first.secret, first.secret, second.secret, "lk_typo", "x" * 20_000):
        await stub.Verify(pb.VerifyRequest(secret=secret), timeout=5)
    batch = [pb.VerifyRequest(secret=secret) for secret in (second.secret, "", first.secret)]
    await stub.BatchVerify(pb.BatchVerifyRequest(requests=batch), timeout=5)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Get(pb.GetRequest(account_id="acme", id="nothing"), timeout=5)
    now = read(server)
    for method, code, number in (("Create", "OK", 2), ("Verify", "OK", 5), ("Get", "NOT_FOUND", 1)):
        labels = {"grpc_type": "unary", "grpc_service": SERVICE, "grpc_method": method}
        assert now.get("grpc_server_started_total", **labels) == number
        assert now.get("grpc_server_handled_total", grpc_code=code, **labels) == number
        assert now.get("grpc_server_handling_seconds_count", **labels) == number
        assert now.get("grpc_server_handling_seconds_sum", **labels) > 0
    assert now.get("latchkey_failures_total", reason="TOKEN_NOT_FOUND") == 1
    assert now.get("latchkey_verdicts_total", verdict="VALID") == 5
    assert now.get("latchkey_verdicts_total", verdict="MALFORMED") == 3
    assert now.get("latchkey_answers_total", source="form") == 3
    assert now.get("latchkey_answers_total", source="cache") == 2
    assert now.get("latchkey_answers_total", source="read") == 3
    assert now.get("latchkey_cache_entries") == now.get("latchkey_cache_entries_max") == 1
    assert now.get("latchkey_cache_evictions_total") == 2
    assert now.get("latchkey_lookup_batch_digests_count") >= 3
    assert now.get("latchkey_lookup_seconds_sum") > 0
    assert now.get("latchkey_pool_connections", state="idle") >= 1
    assert now.get("latchkey_event_loop_tasks") > 1
    assert 0 <= now.get("latchkey_event_loop_delay_seconds") < 60
    assert now.get("process_resident_memory_bytes") > 0


async def test_exemplars_name_requests(server: Server, stub: Any) -> None:
    """The buckets of a management call carry the request id that its caller received."""
    call = stub.List(pb.ListRequest(account_id="acme"), timeout=5)
    await call
    request_id = str((await call.trailing_metadata())["x-request-id"])
    (histogram,) = (m for m in read(server).metrics if m.name == "grpc_server_handling_seconds")
    found = [sample.exemplar.labels for sample in histogram.samples if sample.exemplar]
    assert found == [{"request_id": request_id}]


async def test_unknown_paths_share_one_label(server: Server) -> None:
    """No path that a caller makes up becomes a label."""
    made_up = "/evil.Service/x1y2z3"
    server.metrics.managed._reporter.rejected(made_up, None)
    now = read(server)
    assert now.get("grpc_server_handled_total", grpc_method="unknown") == 1
    assert "x1y2z3" not in str(now.metrics)


async def test_deletions_and_the_lease(server: Server, stub: Any) -> None:
    """A Delete raises the revisions, and its wait is measured; the lease is renewed meanwhile."""
    created = await create(stub, "first")

    def leased() -> Reading | None:
        # On a busy machine, a renewal of this short lease may come late.
        now = read(server)
        return now if now.get("latchkey_lease_remaining_seconds") > 0 else None

    before: Reading = await eventually(leased, "a lease")
    assert before.get("latchkey_lease_remaining_seconds") <= LEASE_SECONDS
    assert before.get("latchkey_log_age_seconds") < LEASE_SECONDS
    assert before.get("latchkey_registrations_total") == 1
    await stub.Delete(pb.DeleteRequest(account_id="acme", id=created.token.id), timeout=5)
    now = read(server)
    assert now.get("latchkey_revision") == before.get("latchkey_revision") + 1
    assert now.get("latchkey_acknowledged_revision") == now.get("latchkey_revision")
    assert now.get("latchkey_delete_wait_seconds_count", result="acknowledged") == 1
    assert now.get("latchkey_deletes_waiting") == 0
    assert now.get("latchkey_database_info", timeline="00000001") == 1

    def moved() -> bool:
        renewed = read(server).get("latchkey_lease_renewals_total", result="renewed")
        arrives = read(server).get("latchkey_notifications", state="arrive")
        return renewed > before.get("latchkey_lease_renewals_total", result="renewed") and bool(
            arrives
        )

    await eventually(moved, "a renewal and a notification")


async def test_watchers(server: Server, stub: Any) -> None:
    """A client that does not confirm a deletion is counted as behind, and then as outwaited."""
    created = await create(stub, "first")
    async with watching(server.address) as client:
        await client.granted()
        assert read(server).get("latchkey_watch_streams") == 1
        # On a busy machine, the Delete may begin after the end of this lease.
        holding = asyncio.create_task(client.hold())
        request = pb.DeleteRequest(account_id="acme", id=created.token.id)
        deleting = asyncio.ensure_future(stub.Delete(request, timeout=10))

        def behind() -> bool:
            now = read(server)
            return (
                now.get("latchkey_watch_clients_behind") == 1
                and now.get("latchkey_watch_waiting_seconds") > 0
                and now.get("latchkey_deletes_waiting") == 1
            )

        await eventually(behind, "the client is behind")
        await deleting
        await holding
        now = read(server)
        assert now.get("latchkey_watch_clients_outwaited_total") == 1
        assert now.get("latchkey_delete_wait_seconds_count", result="outwaited") == 1
        labels = {"grpc_type": "bidi_stream", "grpc_method": "Watch"}
        assert now.get("grpc_server_started_total", **labels) == 1
    await eventually(
        lambda: read(server).get("grpc_server_handled_total", **labels) == 1, "the stream ended"
    )


async def test_an_unreachable_database(server: Server) -> None:
    """Failed renewals and look-ups are counted, the circuit opens, and the lease ends."""
    parts = server.metrics

    async def away(*_: object, **__: object) -> Any:
        raise OSError("away")

    parts.connector._hosts.connect = away  # type: ignore[method-assign]  # the network fails
    parts.lookup.reconnect()
    # Health looks up a secret continually.
    await eventually(lambda: read(server).get("latchkey_lookup_failures_total") > 0, "it fails")
    rows = parts.renewer._rows
    assert isinstance(rows, PostgresRows)
    rows.drop()

    def broken() -> bool:
        now = read(server)
        return (
            now.get("latchkey_lease_renewals_total", result="failed") > 0
            and now.get("latchkey_lease_remaining_seconds") == 0
            and now.get("latchkey_database_circuit", state="open") == 1
            and now.get("latchkey_database_circuit", state="closed") == 0
        )

    await eventually(broken, "everything that needs the database fails")


async def test_problems_of_the_database(server: Server) -> None:
    """Each problem that the log and `latchkey status` name has a metric."""
    primary = server.metrics.primary
    for problem in ("standby_missing", "second_primary"):
        assert read(server).get("latchkey_database_problem", problem=problem) == 0
    primary._standby_missing, primary._others = True, ("old:5432",)
    for problem in ("standby_missing", "second_primary"):
        assert read(server).get("latchkey_database_problem", problem=problem) == 1


async def test_capacity_in_use(server: Server) -> None:
    """Slots, the queue for them, and pooled connections are counted while they are in use."""
    limiter = server.metrics.managed.limiters[MANAGER]
    slots = [limiter.slot(5.0) for _ in range(9)]
    entering = [asyncio.create_task(slot.__aenter__()) for slot in slots]
    async with server.metrics.pool.session():
        await eventually(
            lambda: read(server).get("latchkey_slots_queued", role=MANAGER) == 1, "one call waits"
        )
        now = read(server)
        assert now.get("latchkey_slots_used", role=MANAGER) == 8
        assert now.get("latchkey_pool_connections", state="used") >= 1
    for slot in slots[:8]:
        await slot.__aexit__(None, None, None)
    await asyncio.gather(*entering)
    await slots[8].__aexit__(None, None, None)
    assert read(server).get("latchkey_slots_used", role=MANAGER) == 0


async def test_audit_entries(server: Server, stub: Any) -> None:
    """Entries are counted when they are written, and so are calls without an entry, and losses."""
    for _ in range(FIRST_MAX + 2):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Get(pb.GetRequest(account_id="acme", id="nothing"), timeout=5)
    assert read(server).get("latchkey_audit_entries_total", result="aggregated") == 2
    written = {"result": "written"}
    await eventually(
        lambda: read(server).get("latchkey_audit_entries_total", **written) == FIRST_MAX,
        "the entries are written",
    )

    seen = asyncio.Event()

    async def lose(_: object) -> None:
        await seen.wait()
        raise ValueError("not a batch")

    server.metrics.audit._table.insert = lose  # type: ignore[assignment, method-assign]  # a fault
    await stub.List(pb.ListRequest(account_id="acme"), timeout=5)
    assert read(server).get("latchkey_audit_waiting") == 1
    seen.set()
    await eventually(
        lambda: read(server).get("latchkey_audit_entries_total", result="lost") == 1, "it is lost"
    )


async def test_connections(server: Server, stub: Any) -> None:
    """Connections are counted, and those that the guard ends."""
    guard = server.guard
    await stub.Verify(pb.VerifyRequest(secret=""), timeout=5)
    guard.inspect()
    assert read(server).get("latchkey_connections") >= 1
    guard._limits = dataclasses.replace(guard._limits, connections_max=0)
    guard.inspect()
    assert read(server).get("latchkey_connections_ended_total", reason="too_many") >= 1


@pytest.mark.parametrize("transport", ["grpcio"])
async def test_policy_and_certificate(settings: Settings, tmp_path: Any) -> None:
    """The policy's callers and age are known, and when the certificate expires."""
    files = write_server_files(tmp_path)
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text(["verifier", "manager"]))
    changed = {"policy": policy, "tls_listen": "127.0.0.1:0", **files}
    async with serving_as(settings.model_copy(update=changed)) as server:
        now = read(server)
        assert now.get("latchkey_policy_callers") == 2
        assert 0 <= now.get("latchkey_policy_age_seconds") < 60
        assert now.get("latchkey_certificate_expiry_seconds") > timedelta(days=1).total_seconds()
        await server.replace_policy(policy_text(["verifier"]))
        assert read(server).get("latchkey_policy_callers") == 1

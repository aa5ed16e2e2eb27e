"""Postgres stopped, killed, frozen, and restarted: the effect on callers, on both transports."""

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres.connections import POOL_SIZE_MAX
from latchkey_service.tokens import pepper_file as pepper_files

from tests.helpers.breakable_postgres import BreakablePostgres
from tests.helpers.calls import CHANNEL_OPTIONS, Outcome, is_serving, outcome, server_only_deadline
from tests.helpers.databases import backends, session
from tests.helpers.service_process import service
from tests.helpers.waiting import RESUME_SECONDS, eventually

if TYPE_CHECKING:
    from latchkey_proto.v1.token_service_pb2_grpc import TokenServiceAsyncStub

    from tests.helpers.servers import Create

pytestmark = [
    # The tests take turns to break one Postgres.
    pytest.mark.xdist_group("faults"),
    # A test restarts Postgres while the server under test has threads; its child only execs.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
FAULTS = ("stopped", "killed", "frozen")
METHODS = ("Verify", "Create", "List", "Delete")
# The status code shows that the server answered first; this margin is for measurement on a busy
# event loop.
SLACK_SECONDS = 0.3
# A probe's interval and time-out, plus a margin.
HEALTH_SECONDS = 2.0
LEASE_SECONDS = 3.0
# Without a deadline: one wait for a connection and two statements, plus a margin.
ANSWER_SECONDS_MAX = 6.0
# The management pool, and one each for Verify, health, the lease, notifications, and waiting
# Deletes.
CONNECTIONS_MAX = POOL_SIZE_MAX + 5
_names = itertools.count(1)

Call = Callable[[str, "float | None"], Awaitable[Any]]


@pytest.fixture
async def token(create: "Create") -> pb.CreateResponse:
    """A live token of account acme."""
    return await create()


@pytest.fixture
def unknown(pepper_file: Path) -> str:
    """A secret that only the database can identify as unknown, so it is never cached."""
    keyring = pepper_files.load_or_create(pepper_file, create=False)
    return keyring.mint("lk", os.urandom).secret.reveal()


@pytest.fixture
def call(stub: "TokenServiceAsyncStub", unknown: str) -> Call:
    """Call a method by name, with or without a deadline. Each method needs the database."""
    return calling(stub, unknown, lambda timeout: {"timeout": timeout})


def calling(stub: Any, unknown: str, within: Callable[["float | None"], dict[str, Any]]) -> Call:
    """Return a function that calls a method; gRPC turns `within` into a deadline."""

    async def call(method: str, timeout: float | None) -> Any:  # noqa: ASYNC109 - the call's
        how = within(timeout)
        if method == "Verify":
            return await stub.Verify(pb.VerifyRequest(secret=unknown), **how)
        if method == "List":
            return await stub.List(pb.ListRequest(account_id="acme"), **how)
        if method == "Delete":
            gone = pb.DeleteRequest(account_id="gone", id="tok_1")
            try:
                return await stub.Delete(gone, **how)
            except grpc.aio.AioRpcError as error:
                # Postgres was queried, which is enough here, and the token stays for the verifies.
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return error
                raise
        name = f"outage {next(_names)}"
        request = pb.CreateRequest(account_id="acme", name=name, scope=pb.SCOPE_READ)
        return await stub.Create(request, **how)

    return call


async def is_down(channel: grpc.aio.Channel) -> bool:
    return not await is_serving(channel)


async def all_work(call: Call) -> bool:
    """Return whether each method is answered; raise the error of one that fails."""
    await asyncio.gather(*(call(method, 1.0) for method in METHODS))
    return True


@pytest.mark.parametrize("fault", FAULTS)
async def test_an_outage_is_reported_in_time_and_ends_by_itself(
    fault: str,
    postgres: BreakablePostgres,
    database_url: str,
    channel: grpc.aio.Channel,
    call: Call,
) -> None:
    """During an outage each call is UNAVAILABLE with RetryInfo within its deadline, or soon without
    one, and health reports NOT_SERVING. Everything works within two seconds of Postgres' return."""
    await eventually(lambda: is_serving(channel), "health is up")
    # With open connections as well as without.
    await asyncio.gather(*(call(method, 5) for method in METHODS * 3))
    deadlines: list[tuple[float | None, ...]] = [(1.5, 3.0, None), (0.5,)]
    async with postgres.broken_by(fault) as bring_back:
        for some in deadlines:
            calls = list(itertools.product(METHODS, some))
            ends = await asyncio.gather(*(outcome(call(*c)) for c in calls))
            for (method, timeout), end in zip(calls, ends, strict=True):
                told = (fault, method, timeout, end.code, end.seconds)
                assert end.code is UNAVAILABLE, told
                assert end.retry_info, told
                assert end.seconds < (timeout or ANSWER_SECONDS_MAX) + SLACK_SECONDS, told
        await eventually(lambda: is_down(channel), "health is down", HEALTH_SECONDS)
        bring_back()
        await eventually(lambda: all_work(call), "all calls work", RESUME_SECONDS)
        await eventually(lambda: is_serving(channel), "health is up", RESUME_SECONDS)
        # More than once.
        for _ in range(3):
            await all_work(call)
        assert len(await backends(database_url)) <= CONNECTIONS_MAX


@pytest.mark.parametrize("fault", FAULTS)
async def test_known_tokens_verify_while_the_lease_lasts(
    fault: str, postgres: BreakablePostgres, token: pb.CreateResponse, stub: "TokenServiceAsyncStub"
) -> None:
    """For the length of the lease an outage does not affect cached tokens. After that no safe
    answer exists, and every verify fails at once until Postgres is back."""
    question = pb.VerifyRequest(secret=token.secret)
    assert (await stub.Verify(question, timeout=5)).verdict == pb.VERDICT_VALID

    late: list[float] = []

    async def silent() -> bool:
        began = time.monotonic() - broken
        end = await outcome(stub.Verify(question, timeout=2))
        assert end.ok or (end.code is UNAVAILABLE and end.retry_info)
        # No renewal has begun since the outage, and a verify begins before the server judges it. So
        # this holds on a busy machine too.
        if end.ok and began > LEASE_SECONDS:
            late.append(began)
        return not end.ok

    async with postgres.broken_by(fault) as bring_back:
        broken = time.monotonic()
        assert (await stub.Verify(question, timeout=2)).verdict == pb.VERDICT_VALID
        await eventually(silent, "the lease has run out")
        assert not late
        ends = await asyncio.gather(*(outcome(stub.Verify(question)) for _ in range(100)))
        assert {(end.code, end.retry_info) for end in ends} == {(UNAVAILABLE, True)}
        assert max(end.seconds for end in ends) < ANSWER_SECONDS_MAX
        bring_back()

        async def back() -> bool:
            answer = await stub.Verify(question, timeout=1)
            return bool(answer.verdict == pb.VERDICT_VALID)

        await eventually(back, "it is known again", RESUME_SECONDS)


async def test_a_restart_of_postgres_fails_only_the_calls_meanwhile(
    postgres: BreakablePostgres, call: Call
) -> None:
    """Under steady calls, calls during a restart are UNAVAILABLE and nothing else, and later calls
    succeed."""
    await all_work(call)
    ends = []
    stop = asyncio.Event()

    async def steady(method: str) -> None:
        while not stop.is_set():
            ends.append(await outcome(call(method, 2.0)))
            await asyncio.sleep(0.005)

    clients = [asyncio.create_task(steady(method)) for method in METHODS * 2]
    await eventually(lambda: len(ends) > 50, "calls are under way")
    async with postgres.broken_by("stopped"):
        await eventually(lambda: not ends[-1].ok, "the outage is seen")
    await eventually(lambda: all_work(call), "all calls work", RESUME_SECONDS)
    stop.set()
    await asyncio.gather(*clients)
    bad = [end for end in ends if not end.ok]
    assert bad
    assert {(end.code, end.retry_info) for end in bad} == {(UNAVAILABLE, True)}


async def test_a_pile_up_during_a_freeze_is_answered_in_time(
    postgres: BreakablePostgres,
    database_url: str,
    transport: str,
    pepper_file: Path,
    unknown: str,
    tmp_path: Path,
) -> None:
    """With 200 verifies and 100 management calls at once during a freeze, each is refused within
    its deadline, with the time to retry, and they leave no excess connections behind."""
    settings: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "database_url": database_url,
        "transport": transport,
        "pepper_file": pepper_file,
        "data_dir": tmp_path / "unused",
        "grace_seconds": 1,
        "log_format": "json",
    }
    # In a separate process, because three hundred callers in the server's own process would delay
    # it. They start within one second, so that a busy machine can accept them, and stay until the
    # deadlines of two hundred of them pass within the next second.
    calls: list[tuple[float, str, float | None]] = []
    for n in range(100):
        begins = n / 125
        method = METHODS[1 + n % 3]
        within = 1.8 + n / 100 - begins
        calls += [(begins, "Verify", within), (begins, "Verify", None), (begins, method, within)]
    with service(tmp_path / "service", **settings) as running:
        address = await running.welcome()
        running.favour()
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            call = calling(pb_grpc.TokenServiceStub(channel), unknown, server_only_deadline)
            await eventually(lambda: all_work(call), "all calls work")

            async def later(begins: float, method: str, timeout: float | None) -> Outcome:  # noqa: ASYNC109 - the call's
                await asyncio.sleep(begins)
                return await outcome(call(method, timeout))

            async with postgres.broken_by("frozen") as bring_back:
                ends = await asyncio.gather(*(later(*c) for c in calls))
                for (_, method, timeout), end in zip(calls, ends, strict=True):
                    told = (method, timeout, end.code, end.seconds)
                    # On a slow machine, too many may wait for a slot at once.
                    assert end.code in {UNAVAILABLE, RESOURCE_EXHAUSTED}, told
                    assert end.retry_info, told
                    assert end.seconds < ANSWER_SECONDS_MAX, told
                bring_back()
                await eventually(lambda: all_work(call), "all calls work", RESUME_SECONDS)

            async def bounded() -> bool:
                return len(await backends(database_url)) <= CONNECTIONS_MAX

            await eventually(bounded, "no more connections than the bound")


async def test_a_caller_past_its_deadline_affects_no_other(
    postgres: BreakablePostgres, unknown: str, stub: "TokenServiceAsyncStub"
) -> None:
    """Verifies that share a query with one whose deadline passes still get their answers."""
    question = pb.VerifyRequest(secret=unknown)
    await stub.Verify(question, timeout=5)
    async with postgres.broken_by("frozen") as bring_back:
        # The first is sent alone, the others together in the next query.
        early = asyncio.create_task(outcome(stub.Verify(question, timeout=0.3)))
        patient = [asyncio.create_task(outcome(stub.Verify(question))) for _ in range(20)]
        left = stub.Verify(question)
        await asyncio.sleep(0.1)
        left.cancel()
        # Callers and server share this process, so on a busy machine the caller's own deadline may
        # pass first.
        assert (await early).code in {UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
        bring_back()
        for end in await asyncio.gather(*patient):
            assert end.code is grpc.StatusCode.OK
            assert end.response.verdict == pb.VERDICT_UNKNOWN


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_killed_backends_fail_at_most_the_calls_in_flight(
    busy: bool, database_url: str, call: Call
) -> None:
    """After Postgres has ended all connections, the next calls succeed at the first attempt."""
    await asyncio.gather(*(call(method, 5) for method in METHODS * 5))
    in_flight = []
    if busy:
        in_flight = [asyncio.create_task(outcome(call(m, 5))) for m in METHODS * 25]
    before = {row["pid"] for row in await backends(database_url)}
    assert before
    async with session(database_url) as connection:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) pid", before
        )

    async def gone() -> bool:
        return before.isdisjoint(row["pid"] for row in await backends(database_url))

    for end in await asyncio.gather(*in_flight):
        # So many slow calls at once may exceed the admission limit.
        assert end.ok or (end.code in {UNAVAILABLE, RESOURCE_EXHAUSTED} and end.retry_info), end
    await eventually(gone, "the connections are gone")
    for end in await asyncio.gather(*(outcome(call(m, 5)) for m in METHODS * 5)):
        assert end.ok, end
    assert len(await backends(database_url)) <= CONNECTIONS_MAX


async def test_confirmed_creates_survive_a_crash(
    postgres: BreakablePostgres, database_url: str, stub: "TokenServiceAsyncStub"
) -> None:
    """A crash of Postgres interrupts Creates. After recovery, each Create that was answered is
    listed and verifies VALID, and none is incomplete."""
    answered: list[pb.CreateResponse] = []

    async def creates(number: int) -> None:
        for n in itertools.count():
            request = pb.CreateRequest(
                account_id="crash", name=f"{number}-{n}", scope=pb.SCOPE_WRITE
            )
            end = await outcome(stub.Create(request, timeout=3))
            if not end.ok:
                assert end.code is UNAVAILABLE
                return
            answered.append(end.response)

    # As many as may wait for a long time, so that none is rejected for their number.
    clients = [asyncio.create_task(creates(number)) for number in range(12)]
    await eventually(lambda: len(answered) > 60, "creates are under way")
    assert not any(client.done() for client in clients)
    async with postgres.broken_by("killed"):
        await asyncio.gather(*clients)
    async with session(database_url) as connection:
        kept = {row["id"] for row in await connection.fetch("SELECT id FROM token")}
        halves = await connection.fetchval(
            "SELECT count(*) FROM token t FULL JOIN secret s ON s.token_id = t.id"
            " WHERE t.id IS NULL OR s.token_id IS NULL"
        )
    assert halves == 0
    assert {a.token.id for a in answered} <= kept
    # Unanswered ones may exist too: each client had one in flight.
    assert len(kept) <= len(answered) + len(clients)

    async def verified() -> Any:
        requests = [pb.VerifyRequest(secret=a.secret) for a in answered]
        return await stub.BatchVerify(pb.BatchVerifyRequest(requests=requests[:1000]), timeout=2)

    answers = await eventually(verified, "verifies work", RESUME_SECONDS)
    assert {r.verdict for r in answers.responses} == {pb.VERDICT_VALID}
    listed: set[str] = set()
    page = pb.ListRequest(account_id="crash", page_size=500)

    async def read() -> pb.ListResponse:
        # Look-ups use a separate connection, which may work earlier than the pool.
        return await stub.List(page, timeout=5)

    while True:
        answer = await eventually(read, "lists work", RESUME_SECONDS)
        listed |= {token.id for token in answer.tokens}
        if not answer.next_page_token:
            break
        page.page_token = answer.next_page_token
    assert listed == kept

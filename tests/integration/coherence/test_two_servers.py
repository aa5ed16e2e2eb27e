"""Two servers on one database: a deleted token is dead on both when Delete returns.

Here and in `tests/contract`, the parts that are proved one by one elsewhere work together, on a
real Postgres without faults. Of the quick tests, only these run the SQL and the messages that the
classes rely on. `tests/history` and `tests/faults` add the faults.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import asyncpg
import grpc
import pytest
from google.rpc import error_details_pb2
from latchkey_proto.v1 import status_service_pb2 as status_pb
from latchkey_proto.v1 import status_service_pb2_grpc as status_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service import queue_limit
from latchkey_service.coherence.notify_listener import Notifications, NotifyListener
from latchkey_service.coherence.verifier_table import Identity, OwnRow, VerifierTable
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.rpc import admission
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens import pepper_file as pepper_files
from latchkey_service.tokens.batched_lookup import Lookup
from latchkey_service.tokens.verifier import ABSENT_DIGEST

from tests.helpers.calls import CHANNEL_OPTIONS, outcome, server_only_deadline
from tests.helpers.databases import session
from tests.helpers.servers import make_settings, serving
from tests.helpers.waiting import WAIT_SECONDS, eventually

if TYPE_CHECKING:
    from pathlib import Path

    from latchkey_service.settings.settings import Settings

# Long, so that a process that stalls for a while is not outwaited.
LEASE_SECONDS = 5.0
# For tests in which a lease is renewed, or found expired, after a third of it.
MEDIUM_LEASE_SECONDS = 3.0
# For tests that wait until a lease ends.
SHORT_LEASE_SECONDS = 0.9


class Servers:
    """Two servers, A and B, each called over a separate connection."""

    def __init__(self, a: Any, b: Any, channels: list[grpc.aio.Channel]) -> None:
        self.a, self.b = a, b
        self.channels = channels
        self.count = 0

    async def create(self, stub: Any | None = None) -> pb.CreateResponse:
        self.count += 1
        request = pb.CreateRequest(account_id="acme", name=f"t{self.count}", scope=pb.SCOPE_READ)
        response: pb.CreateResponse = await (stub or self.a).Create(request, timeout=5)
        return response

    async def verdicts(self, secret: str) -> list[str]:
        """The verdicts of A and B, each twice: from a read and from the cache."""
        request = pb.VerifyRequest(secret=secret)
        answers = [await s.Verify(request, timeout=5) for s in (self.a, self.b, self.a, self.b)]
        return [pb.Verdict.Name(answer.verdict).removeprefix("VERDICT_") for answer in answers]


async def delete(stub: Any, token: pb.Token, timeout: float = 8, **fields: Any) -> pb.Receipt:  # noqa: ASYNC109 - the call's
    request = pb.DeleteRequest(account_id="acme", id=token.id, **fields)
    receipt: pb.Receipt = (await stub.Delete(request, timeout=timeout)).receipt
    return receipt


Start = Callable[..., contextlib.AbstractAsyncContextManager[Servers]]


@pytest.fixture
def settings(database_url: str, pepper_file: "Path") -> "Settings":
    """The protocol is the same on both transports; test_watch covers the differences."""
    settings = make_settings(database_url, pepper_file, "native")
    return settings.model_copy(update={"lease_seconds": LEASE_SECONDS})


@pytest.fixture(autouse=True)
def nobody_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off overload rejection: on a busy machine a burst of Deletes counts as overload, which
    these tests do not cover."""
    monkeypatch.setattr(queue_limit, "STANDING_SECONDS", WAIT_SECONDS)
    monkeypatch.setattr(admission, "QUEUE_SECONDS_MAX", WAIT_SECONDS)


@pytest.fixture
def start(settings: "Settings") -> Start:
    """Start both servers, with some settings changed."""

    @contextlib.asynccontextmanager
    async def start(**changes: Any) -> AsyncIterator[Servers]:
        async with contextlib.AsyncExitStack() as stack:
            channels = []
            for _ in range(2):
                address = await stack.enter_async_context(
                    serving(settings.model_copy(update=changes))
                )
                channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
                channels.append(await stack.enter_async_context(channel))
            a, b = (pb_grpc.TokenServiceStub(channel) for channel in channels)
            servers = Servers(a, b, channels)
            await eventually(lambda: both_registered(servers), "both are registered")
            yield servers

    return start


async def both_registered(servers: Servers) -> bool:
    status = await get_status(servers)
    return len(status.verifiers) == 2 and all(
        verifier.lease_remaining.ToTimedelta() for verifier in status.verifiers
    )


async def get_status(servers: Servers) -> status_pb.GetStatusResponse:
    stub = status_pb_grpc.StatusServiceStub(servers.channels[0])
    response: status_pb.GetStatusResponse = await stub.GetStatus(
        status_pb.GetStatusRequest(), timeout=5
    )
    return response


@pytest.mark.parametrize(
    ("notify", "lease_seconds", "rounds"),
    # Without notifications each Delete waits for the next renewal; there are three in a lease.
    [("on", LEASE_SECONDS, 3), ("off", MEDIUM_LEASE_SECONDS, 1)],
    ids=["on", "off"],
)
async def test_dead_on_both_when_delete_returns(
    start: Start, notify: str, lease_seconds: float, rounds: int
) -> None:
    """Both servers have cached a token. When one of them has deleted it, it is dead on the other,
    with or without notifications, and without waiting for a lease to expire."""
    async with start(notify=notify, lease_seconds=lease_seconds) as servers:
        for deleter in (servers.a, servers.b) * rounds:
            created = await servers.create()
            assert await servers.verdicts(created.secret) == ["VALID"] * 4
            began = time.monotonic()
            receipt = await delete(deleter, created.token)
            took = time.monotonic() - began
            assert await servers.verdicts(created.secret) == ["DELETED"] * 4
            assert (receipt.verifiers_acknowledged, receipt.verifiers_outwaited) == (2, 0)
            assert took < lease_seconds


async def test_a_new_token_is_known_at_once(start: Start) -> None:
    """A token created through one server is VALID on the other, whatever verdicts were cached
    before."""
    async with start() as servers:
        for stub, other in ((servers.a, servers.b), (servers.b, servers.a)) * 10:
            created = await servers.create(stub)
            answer = await other.Verify(pb.VerifyRequest(secret=created.secret), timeout=5)
            assert answer.verdict == pb.VERDICT_VALID


async def test_what_the_cache_keeps(
    start: Start, settings: "Settings", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known token is read once, an unknown secret each time, and a secret with a wrong tag
    never."""
    asked: list[int] = []
    find_all = Lookup.find_all

    async def count(self: Lookup, digests: Any, deadline: float) -> Any:
        # Health checks look up an absent digest continuously.
        asked.append(sum(digest != ABSENT_DIGEST for digest in digests))
        return await find_all(self, digests, deadline)

    monkeypatch.setattr(Lookup, "find_all", count)
    keyring = pepper_files.load_or_create(settings.pepper_path, create=False)
    unknown = keyring.mint("lk", os.urandom).secret.reveal()
    made_up = Keyring([Pepper(os.urandom(32))]).mint("lk", os.urandom).secret.reveal()
    async with start() as servers:
        created = await servers.create()

        async def reads(secret: str, times: int) -> int:
            asked.clear()
            question = pb.VerifyRequest(secret=secret)
            for _ in range(times):
                await servers.a.Verify(question, timeout=5)
                batch = pb.BatchVerifyRequest(requests=[question] * 2)
                await servers.a.BatchVerify(batch, timeout=5)
            return sum(asked)

        assert await reads(created.secret, 3) == 1
        assert await reads(unknown, 2) == 6
        assert await reads(made_up, 2) == 0
        await delete(servers.a, created.token)
        assert await reads(created.secret, 3) == 1


async def test_without_a_lease_nothing_is_answered(start: Start, database_url: str) -> None:
    """A server that cannot renew its lease stops answering when the lease expires, although it
    could answer from its cache and read the database. It answers again once it can renew."""
    async with start(lease_seconds=SHORT_LEASE_SECONDS) as servers:
        created = await servers.create()
        assert await servers.verdicts(created.secret) == ["VALID"] * 4
        question = pb.VerifyRequest(secret=created.secret)

        async def silent() -> bool:
            end = await outcome(servers.a.Verify(question, timeout=1))
            assert end.ok or (end.code is grpc.StatusCode.UNAVAILABLE and end.retry_info)
            return not end.ok

        async with session(database_url) as connection, connection.transaction():
            await connection.execute("SELECT FROM verifier FOR UPDATE")
            await eventually(silent, "the lease has run out")
        await eventually(lambda: both_registered(servers), "the leases are renewed")
        assert await servers.verdicts(created.secret) == ["VALID"] * 4


async def test_a_dead_server_is_waited_out_and_removed(start: Start, database_url: str) -> None:
    """The row of a killed process delays Deletes by one lease, once, and is then removed."""
    async with start(lease_seconds=MEDIUM_LEASE_SECONDS) as servers:
        connection = await Connector(database_url).connect()
        created = await servers.create()
        # Right before the Delete, because the servers remove the row as soon as they know that the
        # process is dead.
        dead = Identity("ver_dead", "elsewhere", 1, "0", SHORT_LEASE_SECONDS)
        await OwnRow(connection, dead).register(1, acknowledge=True)
        began = time.monotonic()
        receipt = await delete(servers.a, created.token)
        # Nor did the call last until its deadline, at which the caller would not get the receipt.
        assert time.monotonic() - began < SHORT_LEASE_SECONDS + 4.0
        assert receipt.verifiers_outwaited == 1
        assert receipt.verifiers_acknowledged == 2
        connection.terminate()
        await eventually(lambda: both_registered(servers), "the dead row is gone")
        receipt = await delete(servers.b, (await servers.create()).token)
        assert (receipt.verifiers_acknowledged, receipt.verifiers_outwaited) == (2, 0)


async def test_a_server_without_its_row_starts_over(start: Start, database_url: str) -> None:
    """A server whose row was removed registers again with an empty cache, and Deletes wait for it
    as before."""
    async with start(lease_seconds=MEDIUM_LEASE_SECONDS) as servers:
        created = await servers.create()
        assert await servers.verdicts(created.secret) == ["VALID"] * 4
        async with session(database_url) as connection:
            await connection.execute("DELETE FROM verifier")
        await eventually(lambda: both_registered(servers), "both are registered again")
        receipt = await delete(servers.a, created.token)
        assert receipt.verifiers_acknowledged == 2
        assert await servers.verdicts(created.secret) == ["DELETED"] * 4


async def test_a_deadline_that_is_too_short(start: Start, database_url: str) -> None:
    """The error says that the token is deleted, but the deletion is not confirmed. Each retry
    returns the receipt."""
    async with start() as servers:
        connection = await Connector(database_url).connect()
        slow = Identity("ver_slow", "elsewhere", 1, "0", 5.0)
        row = OwnRow(connection, slow)
        await row.register(1, acknowledge=True)
        token = (await servers.create()).token
        request = pb.DeleteRequest(account_id="acme", id=token.id)
        # Long enough to commit, and shorter than the lease.
        end = await outcome(servers.a.Delete(request, **server_only_deadline(2.0)))
        assert end.code is grpc.StatusCode.UNAVAILABLE
        info = error_details_pb2.ErrorInfo()
        end.details[0].Unpack(info)
        assert info.reason == "DELETION_NOT_CONFIRMED"
        await row.remove(1)
        connection.terminate()
        receipt = await delete(servers.b, token)
        assert receipt.HasField("effective_time")
        assert await delete(servers.a, token) == receipt


async def test_no_wait(start: Start, database_url: str) -> None:
    """A Delete with `no_wait` returns once the deletion is committed, without an effective time. A
    later Delete confirms the same deletion."""
    async with start() as servers:
        token = (await servers.create()).token
        connection = await Connector(database_url).connect()
        row = OwnRow(connection, Identity("ver_slow", "x", 1, "0", 5.0))
        await row.register(1, acknowledge=True)
        began = time.monotonic()
        unconfirmed = await delete(servers.a, token, no_wait=True)
        assert time.monotonic() - began < 4.0
        assert not unconfirmed.HasField("effective_time")
        await row.remove(1)
        connection.terminate()
        confirmed = await delete(servers.b, token)
        assert confirmed.HasField("effective_time")
        assert confirmed.revision == unconfirmed.revision
        assert confirmed.commit_time == unconfirmed.commit_time


async def test_serializable(start: Start, database_url: str, postgres_url: str) -> None:
    """Everything works where every transaction is SERIALIZABLE and conflicts end in 40001."""
    name = database_url.partition("?")[0].rpartition("/")[2]
    async with session(postgres_url) as connection:
        await connection.execute(
            f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'"
        )
    async with start() as servers:
        created = [await servers.create() for _ in range(24)]
        for one in created[:4]:
            assert await servers.verdicts(one.secret) == ["VALID"] * 4
        await asyncio.gather(
            *(delete((servers.a, servers.b)[n % 2], one.token) for n, one in enumerate(created)),
            *(servers.create() for _ in range(10)),
        )
        for one in created[:4]:
            assert await servers.verdicts(one.secret) == ["DELETED"] * 4


async def test_status(start: Start) -> None:
    """The status contains the head revision and, for each process, its identity, its applied
    revision and the rest of its lease."""
    # Short, because a renewal records whether notifications arrive.
    async with start(lease_seconds=SHORT_LEASE_SECONDS) as servers:
        await delete(servers.a, (await servers.create()).token)

        async def told() -> status_pb.GetStatusResponse:
            status = await get_status(servers)
            arrive = status_pb.NOTIFICATIONS_ARRIVE
            # Long enough for a verifier that a busy machine has delayed to return.
            assert len(status.verifiers) == 2
            for verifier in status.verifiers:
                assert verifier.notifications == arrive
                assert (verifier.acknowledged_revision, verifier.lag) == (1, 0)
            return status

        status = await eventually(told, "both are level, and notifications arrive")
        assert status.head_revision == 1
        assert sum(verifier.answering for verifier in status.verifiers) == 1
        for verifier in status.verifiers:
            assert verifier.process_id == os.getpid()
            assert verifier.lease_duration.ToTimedelta().total_seconds() == SHORT_LEASE_SECONDS
            assert verifier.version
            assert verifier.host


class Deaf(asyncpg.Connection):
    """Behaves like a pooler that discards LISTEN."""

    async def add_listener(self, channel: str, callback: Any) -> None:
        """Do nothing, without an error."""


class Refusing(asyncpg.Connection):
    """Behaves like an engine without LISTEN."""

    async def add_listener(self, channel: str, callback: Any) -> None:
        raise asyncpg.FeatureNotSupportedError("LISTEN is not supported")


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (asyncpg.Connection, Notifications.ARRIVE),
        (Deaf, Notifications.SILENT),
        (Refusing, Notifications.OFF),
    ],
)
async def test_missing_notifications_are_noticed(
    kind: type, state: Notifications, database_url: str
) -> None:
    """The listener tests the notifications and notices when they are rejected or silently lost."""
    pool = await Pool.open(Connector(database_url))
    table = VerifierTable(pool)

    async def connection() -> Any:
        return await asyncpg.connect(database_url, connection_class=kind)

    woken = asyncio.Event()
    listener = NotifyListener("test", connection, table.notify, woken.set, 0.6, enabled=True)
    kept = await listener.connect()
    task = asyncio.create_task(listener.run())
    await eventually(lambda: listener.state is state, f"notifications are {state.name}")
    if state is Notifications.ARRIVE:
        woken.clear()
        await table.notify(7)
        await eventually(woken.is_set, "the renewer is woken")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    kept.terminate()
    await pool.close()

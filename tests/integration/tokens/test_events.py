"""Events: written with their change or not at all, and delivered at least once."""

from __future__ import annotations

import asyncio
import math
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import httpx2
import pytest
from google.protobuf import duration_pb2, field_mask_pb2
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.process.webhook import CONCURRENCY, EVENTS_MAX, Deliverer
from latchkey_service.settings.settings import Settings
from latchkey_service.tokens.event_store import EventStore, ExpiryCursor
from latchkey_service.tokens.event_table import EVENT_TYPES, Outbox
from pydantic import SecretStr

from tests.helpers.databases import session
from tests.helpers.metrics import read
from tests.helpers.servers import make_settings, serving, serving_as
from tests.helpers.waiting import eventually
from tests.helpers.webhook_receiver import SECRET, Receiver, receiving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ALL = Outbox(frozenset(EVENT_TYPES))
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


@pytest.fixture
def settings(database_url: str, pepper_file: Path, tmp_path: Path, receiver: Receiver) -> Settings:
    path = tmp_path / "webhook.secret"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    settings = make_settings(database_url, pepper_file, "native")
    return settings.model_copy(
        update={"webhook_url": SecretStr(receiver.url), "webhook_secret_file": path}
    )


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[EventStore]:
    pool = await Pool.open(Connector(database_url))
    yield EventStore(pool)
    await pool.close()


async def create(stub: Any, name: str, **fields: Any) -> pb.CreateResponse:
    request: dict[str, Any] = {"account_id": "acme", "name": name, "scope": pb.SCOPE_READ} | fields
    response: pb.CreateResponse = await stub.Create(pb.CreateRequest(**request), timeout=9)
    return response


async def rows(database_url: str) -> list[tuple[str, str]]:
    async with session(database_url) as connection:
        found = await connection.fetch("SELECT type, name FROM webhook_event ORDER BY id")
    return [tuple(row) for row in found]


async def change_in_every_way(stub: Any) -> list[tuple[str, str]]:
    """Make each kind of change; return the types of their events with the names of the tokens."""
    one = await create(stub, "one", expire_time=datetime(2099, 1, 1, tzinfo=UTC))
    named: dict[str, Any] = {"account_id": "acme", "id": one.token.id}
    mask = field_mask_pb2.FieldMask(paths=["name"])
    await stub.Update(
        pb.UpdateRequest(**named, token=pb.Token(name="uno"), update_mask=mask), timeout=9
    )
    await stub.Rotate(
        pb.RotateRequest(**named, grace=duration_pb2.Duration(seconds=3600)), timeout=9
    )
    await stub.RetireSecrets(pb.RetireSecretsRequest(**named), timeout=9)
    await stub.Disable(pb.DisableRequest(**named), timeout=9)
    await stub.Enable(pb.EnableRequest(**named), timeout=9)
    # The second answer of Create is a new secret of the same token.
    request_id = str(uuid.uuid4())
    two = await create(stub, "two", request_id=request_id)
    two = await create(stub, "two", request_id=request_id)
    await stub.ReportSecret(pb.ReportSecretRequest(secrets=[two.secret, "x"]), timeout=9)
    await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=[two.secret]), timeout=9)
    await stub.Delete(pb.DeleteRequest(**named), timeout=9)
    await stub.DeleteAll(pb.DeleteAllRequest(account_id="acme"), timeout=9)
    return [
        *(("created", "one"), ("updated", "uno"), ("rotated", "uno"), ("retired", "uno")),
        *(("disabled", "uno"), ("enabled", "uno"), ("created", "two"), ("rotated", "two")),
        *(("leaked", "two"), ("revoked", "two"), ("deleted", "uno"), ("deleted", "two")),
    ]


async def test_each_change_is_delivered(
    settings: Settings, receiver: Receiver, database_url: str
) -> None:
    """Each change arrives once, signed, with the token as it was then, and no row remains. Repeated
    and failed calls, which change nothing, send nothing."""
    async with serving(settings) as address, grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.TokenServiceStub(channel)
        expected = await change_in_every_way(stub)
        await eventually(lambda: len(receiver.events) >= len(expected), "the events arrive")
        await create(stub, "taken")
        with pytest.raises(grpc.aio.AioRpcError):
            await create(stub, "taken")
        token = (await stub.List(pb.ListRequest(account_id="acme"), timeout=9)).tokens[0]
        named: dict[str, Any] = {"account_id": "acme", "id": token.id}
        await stub.Enable(pb.EnableRequest(**named), timeout=9)
        await stub.RetireSecrets(pb.RetireSecretsRequest(**named), timeout=9)
        await stub.RevokeSecret(pb.RevokeSecretRequest(secrets=["x"]), timeout=9)
        for _ in range(2):
            await stub.Delete(pb.DeleteRequest(**named), timeout=9)
        expected += [("created", "taken"), ("deleted", "taken")]
        await eventually(lambda: len(receiver.events) >= len(expected), "the events arrive")

        async def none_left() -> bool:
            return not await rows(database_url)

        await eventually(none_left, "the delivered events are removed")
    found = [
        (event["type"].removeprefix("token."), event["data"]["name"])
        for event in sorted(receiver.events, key=lambda event: event["timestamp"])
    ]
    assert sorted(found) == sorted(expected)
    assert len({event["id"] for event in receiver.events}) == len(expected)
    first = next(event for event in receiver.events if event["type"] == "token.created")
    assert first["data"].keys() == {"account_id", "token_id", "name", "expire_time", "caller"}
    assert first["data"]["account_id"] == "acme"
    assert first["data"]["token_id"].startswith("tok_")
    assert first["data"]["expire_time"] == "2099-01-01T00:00:00.000000Z"


async def test_only_wanted_events_are_recorded(
    settings: Settings, receiver: Receiver, database_url: str
) -> None:
    """Other types leave no row, and without a webhook there is none at all."""
    receiver.status = 500
    some = settings.model_copy(update={"webhook_events": "deleted, leaked"})
    off = settings.model_copy(update={"webhook_url": None, "webhook_secret_file": None})
    for chosen, wanted in ((off, ()), (some, ("deleted", "leaked"))):
        async with serving(chosen) as address, grpc.aio.insecure_channel(address) as channel:
            expected = await change_in_every_way(pb_grpc.TokenServiceStub(channel))
        assert await rows(database_url) == [pair for pair in expected if pair[0] in wanted]


async def test_metrics(settings: Settings, receiver: Receiver, database_url: str) -> None:
    """The metrics show deliveries, events that wait, and the tokens that expire soon. Without a
    webhook and without metrics, nothing is counted."""
    day = timedelta(days=1)
    await insert_tokens(database_url, soon=(NOW, datetime.now(UTC) + 3 * day))
    await insert_events(database_url, 2)
    metered = settings.model_copy(update={"metrics_listen": "127.0.0.1:0"})
    off = settings.model_copy(update={"webhook_url": None, "webhook_secret_file": None})
    async with serving_as(metered) as server:
        await eventually(lambda: len(receiver.events) == 2, "the events arrive")

        def values() -> bool:
            found = read(server)
            assert found.get("latchkey_webhook_deliveries_total", result="delivered") == 2
            assert found.get("latchkey_webhook_deliveries_total", result="failed") == 0
            assert found.get("latchkey_webhook_events") >= 0
            assert found.get("latchkey_webhook_oldest_event_seconds") >= 0
            counts = [found.get("latchkey_tokens_expiring", within=d) for d in ("1d", "7d", "30d")]
            return counts == [0, 1, 1]

        await eventually(values, "the counts are there")
    async with serving_as(off) as server:
        assert math.isnan(read(server).get("latchkey_tokens_expiring"))
        assert math.isnan(read(server).get("latchkey_webhook_events"))


async def test_failed_deliveries_are_repeated(
    settings: Settings, receiver: Receiver, store: EventStore, database_url: str
) -> None:
    """An event that the receiver refuses stays, is tried again later under the same id, and is
    removed when it is accepted. After the retry days, it is given up."""
    receiver.status = 503
    deliverer = Deliverer(store, receiver.url, [SECRET], 3)
    async with serving(settings) as address, grpc.aio.insecure_channel(address) as channel:
        await create(pb_grpc.TokenServiceStub(channel), "one")
        await create(pb_grpc.TokenServiceStub(channel), "two")
        await eventually(lambda: receiver.requests >= 2, "both are tried")
    async with session(database_url) as connection:

        async def attempts() -> list[int]:
            return [
                row[0]
                for row in await connection.fetch("SELECT attempts FROM webhook_event ORDER BY id")
            ]

        due = "UPDATE webhook_event SET next_time = clock_timestamp()"
        before = receiver.requests
        assert await attempts() == [1, 1]
        # Not due yet.
        assert not await deliverer.deliver_once()
        assert receiver.requests == before
        await connection.execute(due)
        await deliverer.deliver_once()
        assert (await attempts(), deliverer.failed) == ([2, 2], 2)
        await connection.execute(
            "UPDATE webhook_event SET time = time - interval '4 days' WHERE name = 'one'"
        )
        assert (await store.backlog()).events == 2
        assert (await store.backlog()).oldest_seconds > 4 * 86_400
        await connection.execute(due)
        await deliverer.deliver_once()
        assert (await attempts(), deliverer.abandoned) == ([3], 1)
        receiver.status = 200
        await connection.execute(due)
        await deliverer.deliver_once()
        assert (await attempts(), deliverer.delivered) == ([], 1)
    assert [event["data"]["name"] for event in receiver.events] == ["two"]
    assert await store.backlog() == (0, 0.0)
    await deliverer.close()


async def test_a_dead_receiver_loses_nothing(store: EventStore, database_url: str) -> None:
    """A connection that is refused or reset is a failed attempt like any other."""
    await insert_events(database_url, 3)
    for error in (httpx2.ConnectError("no"), httpx2.ReadError("reset"), TimeoutError()):

        def fail(_: httpx2.Request, error: Exception = error) -> httpx2.Response:
            raise error

        client = httpx2.AsyncClient(transport=httpx2.MockTransport(fail))
        deliverer = Deliverer(store, "https://example.com/", [SECRET], 3, client)
        async with session(database_url) as connection:
            await connection.execute("UPDATE webhook_event SET next_time = clock_timestamp()")
        assert not await deliverer.deliver_once()
        assert deliverer.failed == 3
        await deliverer.close()
    assert len(await rows(database_url)) == 3


async def test_metrics_while_the_receiver_is_down(
    settings: Settings, receiver: Receiver, database_url: str
) -> None:
    """Failed attempts, events that were given up, and the age of the oldest event are counted."""
    receiver.status = 500
    await insert_events(database_url, 2)
    async with session(database_url) as connection:
        await connection.execute(
            "UPDATE webhook_event SET time = time - CASE name WHEN 'n1' THEN interval '99 days'"
            " ELSE interval '2 hours' END"
        )
    async with serving_as(settings) as server:

        def counted() -> bool:
            found = read(server)
            return (
                found.get("latchkey_webhook_deliveries_total", result="failed") >= 2
                and found.get("latchkey_webhook_deliveries_total", result="abandoned") == 1
                and found.get("latchkey_webhook_events") >= 1
                and found.get("latchkey_webhook_oldest_event_seconds") >= 7_200
            )

        await eventually(counted, "the failures are counted")


async def insert_events(database_url: str, number: int) -> None:
    async with session(database_url) as connection:
        await connection.execute(
            """
            INSERT INTO webhook_event (type, time, account_id, token_id, name, caller)
            SELECT 'created', clock_timestamp(), 'acme', 'tok_' || n, 'n' || n, ''
              FROM generate_series(1, $1) n
            """,
            number,
        )


async def test_workers_share_the_events(
    receiver: Receiver, store: EventStore, database_url: str
) -> None:
    """Of several workers, one delivers each event, with a bounded number of requests each."""
    number = 3 * EVENTS_MAX
    await insert_events(database_url, number)
    receiver.gate = asyncio.Event()
    deliverers = [Deliverer(store, receiver.url, [SECRET], 3) for _ in range(2)]
    tasks = [asyncio.create_task(each.deliver_once()) for each in deliverers]
    await eventually(lambda: receiver.running == 2 * CONCURRENCY, "both send")
    receiver.gate.set()
    assert await asyncio.gather(*tasks) == [True, True]
    assert await deliverers[0].deliver_once()
    assert receiver.running_max == 2 * CONCURRENCY
    assert len({event["data"]["token_id"] for event in receiver.events}) == number
    assert receiver.requests == number
    assert await rows(database_url) == []
    for each in deliverers:
        await each.close()


async def test_events_of_a_dead_worker_are_delivered_by_another(
    receiver: Receiver, store: EventStore, database_url: str
) -> None:
    """A claim ends by itself. Until then, nobody else sends the event."""
    await insert_events(database_url, 1)
    assert len(await store.claim(10, 60.0)) == 1
    assert await store.claim(10, 60.0) == []
    async with session(database_url) as connection:
        await connection.execute(
            "UPDATE webhook_event SET next_time = next_time - interval '61 seconds'"
        )
    deliverer = Deliverer(store, receiver.url, [SECRET], 3)
    await deliverer.deliver_once()
    assert receiver.types() == ["token.created"]
    await deliverer.close()


async def insert_tokens(database_url: str, **expiries: tuple[datetime, datetime | None]) -> None:
    """Insert tokens by name, each with the times of its creation and expiry."""
    async with session(database_url) as connection:
        for name, (created, expires) in expiries.items():
            await connection.execute(
                """
                INSERT INTO token (id, account_id, name, name_key, scope, create_time, expire_time,
                                   hint)
                VALUES ('tok_' || $1, 'acme', $1, $1, 1, $2, $3, '')
                """,
                name,
                created,
                expires,
            )


async def announced(
    store: EventStore, database_url: str, now: datetime, limit: int = 2
) -> set[str]:
    """Announce expiries in small pages; return the names, and remove the events."""
    cursor: ExpiryCursor | None = None
    while True:
        cursor = await store.announce_expiring(ALL, [7, 1], now, cursor, limit)
        if cursor is None:
            break
    found = await rows(database_url)
    assert {kind for kind, _ in found} <= {"expiring"}
    names = [name for _, name in found]
    assert len(names) == len(set(names))
    async with session(database_url) as connection:
        await connection.execute("DELETE FROM webhook_event")
    return set(names)


async def test_expiries_are_announced_once_for_each_threshold(
    store: EventStore, database_url: str
) -> None:
    """A token is announced 7 days and 1 day before its expiry, and again if the expiry is moved.
    Tokens whose whole life is shorter than a threshold, that have expired, or that are deleted, are
    not announced for it."""
    old, day = NOW - timedelta(days=90), timedelta(days=1)
    await insert_tokens(
        database_url,
        far=(old, NOW + 8 * day),
        near=(old, NOW + 6 * day),
        nearer=(old, NOW + day / 2),
        young=(NOW - day, NOW + 2 * day),
        fleeting=(NOW, NOW + day / 2),
        over=(old, NOW - day),
        never=(old, None),
        gone=(old, NOW + 6 * day),
    )
    async with session(database_url) as connection:
        await connection.execute("UPDATE token SET delete_time = now() WHERE name = 'gone'")
        assert await announced(store, database_url, NOW) == {"near", "nearer"}
        assert await announced(store, database_url, NOW) == set()
        assert await announced(store, database_url, NOW + 1.5 * day) == {"far", "young"}
        await connection.execute(
            "UPDATE token SET expire_time = expire_time + interval '1 hour' WHERE name = 'near'"
        )
        assert await announced(store, database_url, NOW + 1.5 * day) == {"near"}
        assert await announced(store, database_url, NOW + 5.5 * day) == {"near"}
        await connection.execute(
            "UPDATE token SET expire_time = expire_time + interval '90 days' WHERE name = 'near'"
        )
        assert await announced(store, database_url, NOW + 6 * day) == set()
        assert await announced(store, database_url, NOW + 92 * day) == {"near"}
        assert await store.purge_notices(NOW + 92 * day, 10) == 3
        left = await connection.fetch("SELECT token_id FROM expiry_notice")
    assert [row[0] for row in left] == ["tok_near"]


async def test_workers_that_announce_at_once(store: EventStore, database_url: str) -> None:
    """If two workers look at the same tokens at the same time, each token has one event."""
    old = NOW - timedelta(days=90)
    names = [f"t{number}" for number in range(50)]
    await insert_tokens(database_url, **{n: (old, NOW + timedelta(days=6)) for n in names})
    await asyncio.gather(*(store.announce_expiring(ALL, [7, 1], NOW, None, 100) for _ in range(8)))
    assert sorted(name for _, name in await rows(database_url)) == sorted(names)


async def test_turns(store: EventStore) -> None:
    """Of several workers that ask, one has the turn, until its time is over."""
    turns = await asyncio.gather(*(store.take_turn("task", 60.0) for _ in range(5)))
    assert sorted(turns) == [False] * 4 + [True]
    assert await store.take_turn("other", 0.0)
    assert await store.take_turn("other", 0.0)


async def test_count_of_expiring_tokens(store: EventStore, database_url: str) -> None:
    """The count for each number of days has the live tokens that expire within it."""
    day = timedelta(days=1)
    await insert_tokens(
        database_url,
        over=(NOW - day, NOW),
        soon=(NOW, NOW + day / 2),
        week=(NOW, NOW + 7 * day),
        month=(NOW, NOW + 30 * day),
        later=(NOW, NOW + 31 * day),
        never=(NOW, None),
    )
    assert await store.count_expiring((1, 7, 30), NOW) == {1: 1, 7: 2, 30: 3}

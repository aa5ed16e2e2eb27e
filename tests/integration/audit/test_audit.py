"""The audit table: each change and its entry commit together, entries are append-only and
rate-limited, and contain no secrets."""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import grpc
import pytest
from latchkey_proto.v1 import audit_service_pb2 as audit_pb
from latchkey_proto.v1 import audit_service_pb2_grpc as audit_pb_grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc
from latchkey_service.audit import audit_log
from latchkey_service.audit.audit_log import AuditContext
from latchkey_service.audit.audit_table import AuditTable, Filter, NewEntry
from latchkey_service.errors import AlreadyExists
from latchkey_service.postgres import connections, sessions
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.secret_format import Digest
from latchkey_service.settings.settings import Settings
from latchkey_service.tokens.token_store import TokenStore
from latchkey_service.tokens.verdict import Scope, TokenRecord

from tests.helpers.callers import ACCOUNT, credential, policy_text
from tests.helpers.calls import is_serving, outcome
from tests.helpers.databases import backends, session
from tests.helpers.domain import audit_context
from tests.helpers.servers import serving, serving_as
from tests.helpers.waiting import eventually

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
TOKENS = "/latchkey.v1.TokenService/"
UNAUTHENTICATED, DENIED = 16, 7
Metadata = tuple[tuple[str, str], ...]


@pytest.fixture
def settings(settings: Settings, scratch: Path) -> Settings:
    """Settings with a policy."""
    path = scratch / f"audit-{os.urandom(4).hex()}.toml"
    path.write_text(policy_text())
    return settings.model_copy(update={"policy": path})


@pytest.fixture
async def own_channel(own_address: str) -> AsyncIterator[grpc.aio.Channel]:
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(own_address, options=options) as channel:
        yield channel


def bearer(name: str) -> Metadata:
    return (("authorization", f"Bearer {credential(name)}"),)


async def entries(
    channel: grpc.aio.Channel, who: str = "operator", **wanted: Any
) -> list[audit_pb.AuditEntry]:
    """Return all matching entries, page by page."""
    stub: Any = audit_pb_grpc.AuditServiceStub(channel)
    found, page_token = [], ""
    while True:
        request = audit_pb.AuditServiceListRequest(page_token=page_token, **wanted)
        page = await stub.List(request, timeout=5, metadata=bearer(who))
        found += page.entries
        page_token = page.next_page_token
        if not page_token:
            return found


async def test_every_management_call_has_an_entry(
    own_channel: grpc.aio.Channel, database_url: str
) -> None:
    """Create, Get, List and Delete record the caller, the method, the token, the origin and the
    outcome, denied calls included. Verifies leave no entry."""
    stub = pb_grpc.TokenServiceStub(own_channel)
    manager: Any = {"timeout": 5, "metadata": (*bearer("manager"), ("x-request-id", "abc-1"))}
    create = pb.CreateRequest(account_id=ACCOUNT, name="first", scope=pb.SCOPE_READ)
    created = await stub.Create(create, **manager)
    token_id = created.token.id
    again = await outcome(stub.Create(create, **manager))
    assert again.code is grpc.StatusCode.ALREADY_EXISTS
    await stub.Get(pb.GetRequest(account_id=ACCOUNT, id=token_id), **manager)
    await stub.List(pb.ListRequest(account_id=ACCOUNT), **manager)
    gone = pb.DeleteRequest(account_id=ACCOUNT, id=token_id)
    await stub.Delete(gone, **manager)
    await stub.Delete(gone, **manager)
    for metadata in ((), bearer("verifier"), bearer("acmes-verifier")):
        assert not (await outcome(stub.Delete(gone, timeout=5, metadata=metadata))).ok
    other = pb.DeleteRequest(account_id="globex", id=token_id)
    assert not (await outcome(stub.Delete(other, timeout=5, metadata=bearer("acmes-manager")))).ok
    question = pb.VerifyRequest(secret=created.secret)
    await stub.Verify(question, timeout=5, metadata=bearer("verifier"))

    async def all_there() -> Any:
        found = [e for e in await entries(own_channel) if e.method.startswith(TOKENS)]
        assert len(found) == 10, found
        return found

    found = list(reversed(await eventually(all_there, "all entries are there")))
    found.sort(key=lambda entry: entry.time.ToDatetime())
    told = [
        (e.caller, e.method.removeprefix(TOKENS), e.account_id, e.token_id, e.code, e.reason)
        for e in found
    ]
    assert sorted(told) == sorted(
        [
            ("manager", "Create", ACCOUNT, token_id, 0, ""),
            ("manager", "Create", ACCOUNT, "", 6, "TOKEN_NAME_TAKEN"),
            ("manager", "Get", ACCOUNT, token_id, 0, ""),
            ("manager", "List", ACCOUNT, "", 0, ""),
            ("manager", "Delete", ACCOUNT, token_id, 0, ""),
            ("manager", "Delete", ACCOUNT, token_id, 0, ""),
            ("", "Delete", ACCOUNT, token_id, UNAUTHENTICATED, "CALLER_ANONYMOUS"),
            ("verifier", "Delete", ACCOUNT, token_id, DENIED, "METHOD_DENIED"),
            ("acmes-verifier", "Delete", ACCOUNT, token_id, DENIED, "METHOD_DENIED"),
            ("acmes-manager", "Delete", "globex", token_id, DENIED, "ACCOUNT_DENIED"),
        ]
    )
    for entry in found:
        assert entry.peer.startswith("ipv4:127.0.0.1:")
        assert entry.calls == 1
        assert (entry.request_id == "abc-1") is (entry.caller == "manager")
        assert (entry.request_id == entry.call_id) is (entry.caller != "manager")
    # A caller can use one id for all calls, but not the service.
    assert len({entry.call_id for entry in found}) == 10
    async with session(database_url) as connection:
        stored = str(await connection.fetch("SELECT audit::text FROM audit"))
    assert created.secret not in stored
    assert "first" not in stored
    assert credential("manager") not in stored


async def test_reading_the_audit_log_is_recorded(own_channel: grpc.aio.Channel) -> None:
    """A caller that reads the audit log, or tries to, leaves an entry with what it asked for."""
    token_id = "tok_" + "3" * 26
    await entries(own_channel, "acmes-operator", account_id=ACCOUNT, token_id=token_id)
    stub: Any = audit_pb_grpc.AuditServiceStub(own_channel)
    request = audit_pb.AuditServiceListRequest(account_id="globex")
    assert not (await outcome(stub.List(request, timeout=5, metadata=bearer("manager")))).ok

    async def found() -> Any:
        return [
            (e.caller, e.account_id, e.token_id, e.code)
            for e in await entries(own_channel, method="/latchkey.v1.AuditService/List")
            if e.caller != "operator"
        ]

    expected = [("manager", "globex", "", DENIED), ("acmes-operator", ACCOUNT, token_id, 0)]

    async def both_there() -> bool:
        return sorted(await found()) == sorted(expected)

    await eventually(both_there, "both calls have an entry")


async def test_policies_are_recorded(settings: Settings) -> None:
    """A worker records the policy with which it starts, and each one that replaces it."""
    assert settings.policy is not None
    text = settings.policy.read_text()
    replacement = f"{text}\n# changed"
    async with serving_as(settings) as server:
        await server.replace_policy(replacement)
        async with grpc.aio.insecure_channel(server.address) as channel:

            async def reasons() -> list[str]:
                return [
                    e.reason for e in await entries(channel, method="/latchkey.v1.Policy/InForce")
                ]

            digests = [sha256(one.encode()).hexdigest() for one in (replacement, text)]

            async def both_there() -> bool:
                return await reasons() == [f"sha256:{digest}" for digest in digests]

            await eventually(both_there, "both policies have an entry")


async def test_only_trusted_callers_name_people(settings: Settings) -> None:
    """An entry contains the person that a caller with `reports_people` names, in any script. Names
    from other callers are ignored, as are invalid ones. Reads and changes record it alike."""
    assert settings.policy is not None
    text = settings.policy.read_text()
    assert "[callers.manager]\n" in text
    settings.policy.write_text(
        text.replace("[callers.manager]\n", "[callers.manager]\nreports_people = true\n")
    )
    async with (
        serving(settings) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = pb_grpc.TokenServiceStub(channel)
        for number, (caller, said) in enumerate(
            [
                ("manager", (quote("Zoë Müller <zoe@example.org>"),)),
                ("manager", ("a", "b")),
                ("manager", ("%ff",)),
                ("manager", ("a%0Ab",)),
                ("manager", ("x" * 129,)),
                ("manager", (credential("manager"),)),
                ("acmes-manager", ("zoe",)),
            ]
        ):
            metadata = (*bearer(caller), *(("x-latchkey-person", value) for value in said))
            create = pb.CreateRequest(account_id=ACCOUNT, name=str(number), scope=pb.SCOPE_READ)
            call: Any = {"timeout": 5, "metadata": metadata}
            token = (await stub.Create(create, **call)).token
            await stub.Get(pb.GetRequest(account_id=ACCOUNT, id=token.id), **call)

        async def all_there() -> Any:
            found = await entries(channel, account_id=ACCOUNT)
            found = [entry for entry in found if entry.caller != "operator"]
            assert len(found) == 14
            return found

        found = await eventually(all_there, "all entries are there")
        names = Counter(entry.person for entry in found)
        assert names == {"Zoë Müller <zoe@example.org>": 2, "": 12}


async def test_calls_are_recorded_until_the_last_answer(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that a worker answers right before it stops are in the table while the stop waits for
    an open call."""
    # So long that the entry has most likely not been written when the stop begins.
    monkeypatch.setattr(audit_log, "FLUSH_SECONDS", 1.0)
    # The test decides how long the stop waits for the call.
    monkeypatch.setitem(sessions.SETTINGS, "lock_timeout", "60s")
    monkeypatch.setattr(connections, "STATEMENT_TIMEOUT_SECONDS", 60.0)
    # The stop waits for the call until the test has seen the entry.
    settings = settings.model_copy(update={"grace_seconds": 30.0})
    assert settings.database_url is not None
    url = settings.database_url.get_secret_value()
    manager: Any = {"timeout": 30, "metadata": bearer("manager")}
    async with (
        contextlib.AsyncExitStack() as channels,
        contextlib.AsyncExitStack() as server,
        session(url) as connection,
        session(url) as looking,
    ):
        address = await server.enter_async_context(serving(settings))
        channel = await channels.enter_async_context(grpc.aio.insecure_channel(address))
        await eventually(lambda: is_serving(channel), "health is up")
        stub: Any = pb_grpc.TokenServiceStub(channel)
        create = pb.CreateRequest(account_id=ACCOUNT, name="first", scope=pb.SCOPE_READ)
        created = await stub.Create(create, **manager)
        async with connection.transaction():
            await connection.execute("SELECT FROM token FOR UPDATE")
            gone = pb.DeleteRequest(account_id=ACCOUNT, id=created.token.id)
            deletion = asyncio.ensure_future(outcome(stub.Delete(gone, **manager)))

            async def waits() -> bool:
                return any(row["wait_event_type"] == "Lock" for row in await backends(url))

            await eventually(waits, "the deletion is at work")
            await stub.Get(pb.GetRequest(account_id=ACCOUNT, id=created.token.id), **manager)
            stopping = asyncio.ensure_future(server.aclose())

            async def is_written() -> Any:
                return await looking.fetchval("SELECT count(*) FROM audit WHERE method LIKE '%Get'")

            await eventually(is_written, "the call is written down")
            assert not deletion.done()
        await stopping
        await deletion


async def test_filters_and_pages(own_channel: grpc.aio.Channel, database_url: str) -> None:
    """Each filter returns exactly the matching entries. Pages neither repeat nor omit an entry, and
    a page token is valid only for the filters that it was issued with."""
    async with session(database_url) as connection:
        await connection.executemany(
            """
            INSERT INTO audit (time, caller, method, account_id, token_id, peer, request_id, code)
            VALUES ($1, $2, $3, $4, $5, '', '', $6)
            """,
            [
                (
                    # Several entries with the same time.
                    NOW + timedelta(seconds=number // 3),
                    ("a", "b")[number % 2],
                    TOKENS + ("Create", "Get", "List", "Delete")[number % 4],
                    ("acme", "globex", "")[number % 3],
                    "tok_" + str(number % 5) * 26,
                    (0, 7, 16, 5)[number // 2 % 4],
                )
                for number in range(120)
            ],
        )

    def stamp(seconds: int) -> Any:
        from google.protobuf.timestamp_pb2 import Timestamp

        message = Timestamp()
        message.FromDatetime(NOW + timedelta(seconds=seconds))
        return message

    # Without the entries that the test's own calls make.
    before = {"end_time": stamp(1_000)}
    everything = await entries(own_channel, page_size=7, **before)
    assert len(everything) == 120
    assert len({entry.id for entry in everything}) == 120
    times = [entry.time.ToDatetime() for entry in everything]
    assert times == sorted(times, reverse=True)

    checks: list[tuple[dict[str, Any], Any]] = [
        ({"account_id": "acme"}, lambda e: e.account_id == "acme"),
        ({"token_id": "tok_" + "3" * 26}, lambda e: e.token_id == "tok_" + "3" * 26),
        ({"caller": "b"}, lambda e: e.caller == "b"),
        ({"method": "Delete"}, lambda e: e.method == TOKENS + "Delete"),
        ({"method": TOKENS + "Get"}, lambda e: e.method == TOKENS + "Get"),
        ({"outcome": audit_pb.OUTCOME_OK}, lambda e: e.code == 0),
        ({"outcome": audit_pb.OUTCOME_DENIED}, lambda e: e.code in (7, 16)),
        ({"outcome": audit_pb.OUTCOME_FAILED}, lambda e: e.code == 5),
        ({"start_time": stamp(10)}, lambda e: e.time.seconds >= stamp(10).seconds),
        ({"end_time": stamp(10)}, lambda e: e.time.seconds < stamp(10).seconds),
        (
            {"caller": "a", "account_id": "acme", "start_time": stamp(5), "end_time": stamp(30)},
            lambda e: (
                (e.caller, e.account_id) == ("a", "acme")
                and stamp(5).seconds <= e.time.seconds < stamp(30).seconds
            ),
        ),
        ({"caller": "nobody"}, lambda e: False),
    ]
    for wanted, matches in checks:
        found = await entries(own_channel, page_size=4, **(before | wanted))
        assert found == [entry for entry in everything if matches(entry)], wanted
        for entry in found:
            if "outcome" in wanted:
                assert entry.outcome == wanted["outcome"]
    stub: Any = audit_pb_grpc.AuditServiceStub(own_channel)

    async def code(**wanted: Any) -> grpc.StatusCode:
        request = audit_pb.AuditServiceListRequest(**wanted)
        return (await outcome(stub.List(request, timeout=5, metadata=bearer("operator")))).code

    request = audit_pb.AuditServiceListRequest(page_size=4, caller="a")
    page = await stub.List(request, timeout=5, metadata=bearer("operator"))
    token = page.next_page_token
    assert await code(caller="a", page_token=token) is grpc.StatusCode.OK
    bad: list[dict[str, Any]] = [
        {"caller": "b", "page_token": token},
        {"page_token": token},
        {"caller": "a", "page_token": token[:-1]},
        {"caller": "a", "page_token": token[:-1] + ("A" if token[-1] != "A" else "B")},
        {"caller": "a", "page_token": "x" * 10_000},
        {"page_size": -1},
        {"outcome": 9},
        {"method": "Verify"},
        {"method": "/x/Delete"},
        {"caller": "a\0"},
        {"account_id": "x" * 129},
        {"start_time": {"seconds": 10**15}},
    ]
    for wanted in bad:
        assert await code(**wanted) is grpc.StatusCode.INVALID_ARGUMENT, wanted
    own = await entries(own_channel, "acmes-operator", account_id="acme", **before)
    assert own == [entry for entry in everything if entry.account_id == "acme"]


async def test_append_only(database_url: str) -> None:
    """No statement by accident changes an entry or deletes a recent one."""
    pool = await Pool.open(Connector(database_url))
    table = AuditTable(pool)
    now = datetime.now(UTC)

    def entry(days: float) -> NewEntry:
        at = now - timedelta(days=days)
        return NewEntry(at, "a", TOKENS + "Get", "", "", "", "", 0, "", 1)

    await table.insert([entry(days) for days in (0, 0.5, 2, 3, 4)])
    async with session(database_url) as connection:
        for statement in (
            "UPDATE audit SET caller = 'b'",
            "DELETE FROM audit",
            "TRUNCATE audit",
            "SET latchkey.audit_retention = 'on'; DELETE FROM audit",
            "SET latchkey.audit_retention = 'on'; UPDATE audit SET caller = 'b'",
            "SET latchkey.audit_retention = 'on'; TRUNCATE audit",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
                await connection.execute(statement)
            await connection.execute("RESET latchkey.audit_retention")
    assert len((await table.list(Filter(), None, 10))[0]) == 5
    await pool.close()


def record(name: str) -> TokenRecord:
    token_id = f"tok_{name:0>26}"
    return TokenRecord(token_id, ACCOUNT, name, Scope.READ, NOW, None, "lk_…")


async def test_a_change_and_its_entry_commit_together(store: TokenStore, database_url: str) -> None:
    """If the entry cannot be written, the change is not made; if the change cannot be made, it
    leaves no entry."""
    await store.register_pepper("pepper")
    by = audit_context("Create")
    await store.insert_token(record("a"), "a", Digest(b"a" * 32, "pepper"), by)
    by = audit_context("Create")
    with pytest.raises(AlreadyExists):
        await store.insert_token(record("b"), "a", Digest(b"b" * 32, "pepper"), by)
    async with session(database_url) as connection:

        async def counts() -> tuple[int, int, int]:
            row: Any = await connection.fetchrow(
                "SELECT (SELECT count(*) FROM token WHERE delete_time IS NULL),"
                " (SELECT count(*) FROM audit), (SELECT revision FROM head)"
            )
            return (row[0], row[1], row[2])

        assert await counts() == (1, 1, 0)
        await connection.execute("ALTER TABLE audit ADD CHECK (caller <> 'unwritable') NOT VALID")
        unwritable = AuditContext("unwritable", TOKENS + "Delete", "", "", "", "")
        with pytest.raises(asyncpg.CheckViolationError):
            await store.delete_token(ACCOUNT, record("a").id, unwritable)
        with pytest.raises(asyncpg.CheckViolationError):
            await store.insert_token(record("c"), "c", Digest(b"c" * 32, "pepper"), unwritable)
        assert await counts() == (1, 1, 0)
        by = audit_context("Delete")
        assert await store.delete_token(ACCOUNT, record("a").id, by) is not None
        assert await counts() == (0, 2, 1)
        # A repeated call: nothing changes, so the store writes no entry.
        by = audit_context("Delete")
        assert await store.delete_token(ACCOUNT, record("a").id, by) is None
        assert await counts() == (0, 2, 1)

"""The chain of the audit log: which changes of the tables a check finds."""

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from latchkey_service.audit import audit_sealer
from latchkey_service.audit.audit_chain import ChainKeys, Head, batch_digest
from latchkey_service.audit.audit_check import Report, check
from latchkey_service.audit.audit_sealer import AuditSealer
from latchkey_service.audit.audit_table import AuditTable, NewEntry
from latchkey_service.audit.chain_table import ChainReader, ChainTable
from latchkey_service.postgres.connections import Connector, Pool
from latchkey_service.secret_format import Keyring, Pepper

from tests.helpers.captured_log import Lines
from tests.helpers.databases import session

OLD, NEW, STRANGERS = (Pepper(os.urandom(32)) for _ in range(3))
KEYS = ChainKeys(Keyring([OLD]))
NOW = datetime.now(UTC)


def entry(days: float = 0, caller: str = "shop") -> NewEntry:
    at = NOW - timedelta(days=days)
    return NewEntry(at, caller, "/latchkey.v1.TokenService/Get", "acme", "", "p", "r", 0, "", 1)


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    pool = await Pool.open(Connector(database_url))
    yield pool
    await pool.close()


def sealer_on(pool: Pool, keys: ChainKeys = KEYS) -> AuditSealer:
    return AuditSealer(ChainTable(pool), keys, lambda: 0.0, lambda: 0.0)


async def checked(
    database_url: str, keys: ChainKeys = KEYS, noted: Head | None = None, now: datetime = NOW
) -> Report:
    async with session(database_url) as connection:
        return await check(ChainReader(connection), keys, now, noted)


async def three_batches(pool: Pool) -> AuditSealer:
    """Make batches of two entries each, with the ids 1 to 6."""
    sealer = sealer_on(pool)
    for _ in range(3):
        await AuditTable(pool).insert([entry(), entry()._replace(trace_id="a" * 32)])
        await sealer.seal()
    return sealer


async def test_many_workers_seal_every_entry_once(
    pool: Pool, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While several workers write entries and seal at once, each entry is in exactly one batch."""
    monkeypatch.setattr(audit_sealer, "BATCH_MAX", 7)
    table = AuditTable(pool)
    sealers = [sealer_on(pool) for _ in range(4)]

    async def write() -> None:
        for _ in range(20):
            await table.insert([entry()] * 3)

    async def seal(sealer: AuditSealer) -> None:
        for _ in range(20):
            await sealer.seal()

    await asyncio.gather(*(write() for _ in range(3)), *(seal(sealer) for sealer in sealers))
    await sealers[0].seal()
    report = await checked(database_url)
    assert report.problems == []
    assert (report.entries, report.unsealed) == (180, 0)
    assert report.head == sealers[0].head
    async with session(database_url) as connection:
        ids = await connection.fetchval(
            "SELECT count(DISTINCT id) FROM audit_chain, unnest(entry_ids) id"
        )
    assert ids == 180


async def tamper(database_url: str, statement: str, *arguments: Any) -> None:
    """Run a statement as an owner of the tables who has switched their triggers off."""
    async with session(database_url) as connection:
        for table in ("audit", "audit_chain"):
            await connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
        await connection.execute(statement, *arguments)
        for table in ("audit", "audit_chain"):
            await connection.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER")


ADDED = (
    "INSERT INTO audit (caller, method, account_id, token_id, peer, request_id)"
    " VALUES ('x', 'm', '', '', '', '');"
)
MOVED = (
    "DELETE FROM audit WHERE id IN (1, 2); UPDATE audit_start SET number = 1,"
    " pepper_id = (SELECT pepper_id FROM audit_chain WHERE number = 1),"
    " seal = (SELECT seal FROM audit_chain WHERE number = 1)"
)
TAMPERING = {
    "an entry is changed": (
        "UPDATE audit SET caller = 'x' WHERE id = 3",
        "batch 2: its entries (3, 4) or those before were changed",
    ),
    "a trace id is changed": (
        "UPDATE audit SET trace_id = repeat('b', 32) WHERE id = 4",
        "batch 2: its entries (3, 4) or those before were changed",
    ),
    "a trace id is removed": (
        "UPDATE audit SET trace_id = '' WHERE id = 4",
        "batch 2: its entries (3, 4) or those before were changed",
    ),
    "a trace id is added": (
        "UPDATE audit SET trace_id = repeat('a', 32) WHERE id = 3",
        "batch 2: its entries (3, 4) or those before were changed",
    ),
    "an entry is removed": (
        "DELETE FROM audit WHERE id = 3",
        "batch 2: these entries are gone: 3",
    ),
    "an entry is added": (
        ADDED,
        "these entries are in no batch: 7",
    ),
    "an entry is added to a batch": (
        f"{ADDED} UPDATE audit_chain SET entry_ids = '{{3,4,7}}' WHERE number = 2",  # noqa: S608
        "batch 2: its entries (3, 4, 7) or those before were changed",
    ),
    "a batch and its entries are removed": (
        "DELETE FROM audit WHERE id IN (3, 4); DELETE FROM audit_chain WHERE number = 2",
        "the batches 2 to 2 and their entries are gone",
    ),
    "the first batch and its entries are removed": (
        "DELETE FROM audit WHERE id IN (1, 2); DELETE FROM audit_chain WHERE number = 1",
        "the batches 1 to 1 and their entries are gone",
    ),
    "the start is moved": (
        MOVED,
        "entries at the beginning were removed, but not by the service",
    ),
    "a seal is changed": (
        "UPDATE audit_chain SET seal = '\\x00' WHERE number = 2",
        "batch 2: its seal is wrong",
    ),
    "the last seal is changed": (
        "UPDATE audit_chain SET seal = '\\x00' WHERE number = 3",
        "batch 3: its seal is wrong",
    ),
    "the last seals are somebody else's": (
        "UPDATE audit_chain SET pepper_id = 'x' WHERE number > 1",
        "no seal of a pepper in the pepper file proves the batches after 1",
    ),
    "an entry is removed before it is sealed": (
        "INSERT INTO audit_unsealed VALUES (99)",
        "these entries were removed before they were sealed: 99",
    ),
}


@pytest.mark.parametrize("name", TAMPERING)
async def test_a_check_finds(pool: Pool, database_url: str, name: str) -> None:
    """Whoever may write anything to the database, but has no pepper, changes or removes no entry
    that is sealed without a trace."""
    await three_batches(pool)
    assert (await checked(database_url)).problems == []
    statement, problem = TAMPERING[name]
    await tamper(database_url, statement)
    assert problem in (await checked(database_url)).problems


async def test_a_removed_end_differs_from_what_was_noted(pool: Pool, database_url: str) -> None:
    """The tables cannot show that the newest batches were removed. A batch that was noted earlier
    shows it, and so does a worker that has seen it."""
    sealer = await three_batches(pool)
    noted = sealer.head
    assert (await checked(database_url, noted=noted)).problems == []
    await tamper(
        database_url, "DELETE FROM audit WHERE id > 4; DELETE FROM audit_chain WHERE number > 2"
    )
    assert (await checked(database_url)).problems == []
    gone = ["batch 3, which was noted, is gone"]
    assert (await checked(database_url, noted=noted)).problems == gone
    lines = sealer._log = Lines()  # type: ignore[assignment]  # a stand-in
    await sealer.seal()
    assert [line["event"] for line in lines] == ["sealed audit entries are missing"]
    assert sealer.regressions == 1
    # A new batch of the same number has another digest.
    await AuditTable(pool).insert([entry()])
    await sealer.seal()
    differs = ["batch 3 differs from the one that was noted"]
    assert (await checked(database_url, noted=noted)).problems == differs
    assert sealer.regressions == 1


async def test_the_service_proves_no_forged_history(pool: Pool, database_url: str) -> None:
    """If somebody changes an entry and computes all digests again, the service's next seal does not
    cover what they wrote."""
    sealer = await three_batches(pool)
    await tamper(database_url, "UPDATE audit SET caller = 'x' WHERE id = 5")
    async with session(database_url) as connection:
        reader = ChainReader(connection)
        _, before, last = await reader.batches(0, 10)
        digest = batch_digest(before.head, await reader.entries(last.entry_ids))
    await tamper(database_url, "UPDATE audit_chain SET digest = $1 WHERE number = 3", digest)
    await AuditTable(pool).insert([entry()])
    lines = sealer._log = Lines()  # type: ignore[assignment]  # a stand-in
    await sealer.seal()
    assert "newest audit batch is not genuine" in [line["event"] for line in lines]
    assert sealer.regressions == 1
    assert (await checked(database_url)).problems == [
        "batch 3: its seal is wrong",
        "batch 4: its entries (7) or those before were changed",
    ]


async def test_retention_removes_whole_batches(pool: Pool, database_url: str) -> None:
    """Retention removes the entries of batches that are old as a whole. What is left passes the
    check, even when retention runs again, and nobody else can remove entries that way."""
    table, sealer = AuditTable(pool), sealer_on(pool)
    for days in (9.0, 8.0, 2.0, 0.5, 0.0):
        await table.insert([entry(days), entry(days)])
        await sealer.seal()
    assert await sealer.purge(NOW - timedelta(days=8.5), 1) == 2
    assert await sealer.purge(NOW - timedelta(days=8.5), 100) == 0
    report = await checked(database_url)
    assert (report.problems, report.start.number, report.entries) == ([], 1, 8)
    assert await sealer.purge(NOW - timedelta(days=1.5), 2) == 2
    assert await sealer.purge(NOW - timedelta(days=1.5), 2) == 2
    report = await checked(database_url)
    assert (report.problems, report.start.number, report.entries) == ([], 3, 4)
    noted = Head(1, bytes(32))
    removed = ["batch 1, which was noted, has been removed by retention"]
    assert (await checked(database_url, noted=noted)).problems == removed
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="one day at least"):
        await sealer.purge(NOW, 100)
    assert (await checked(database_url)).problems == []


async def test_a_removal_without_the_pepper_shows(pool: Pool, database_url: str) -> None:
    """Whoever calls the function of retention without the pepper leaves a trace."""
    await AuditTable(pool).insert([entry(9), entry(9)])
    await sealer_on(pool).seal()
    await AuditTable(pool).insert([entry()])
    await sealer_on(pool).seal()
    async with session(database_url) as connection:
        before = NOW - timedelta(days=2)
        await connection.execute(
            "SELECT audit_prune($1, 1, $2, $3)", before, KEYS.newest_id, bytes(32)
        )
    problem = "entries at the beginning were removed, but not by the service"
    assert (await checked(database_url)).problems == [problem]


async def test_peppers_rotate(pool: Pool, database_url: str) -> None:
    """A new pepper seals what an older one sealed, so the older one can be removed. Without either,
    nothing is proven."""
    await three_batches(pool)
    both, new = ChainKeys(Keyring([NEW, OLD])), ChainKeys(Keyring([NEW]))
    await sealer_on(pool, both).seal()
    for keys in (both, new):
        report = await checked(database_url, keys)
        assert (report.problems, report.batches, report.entries) == ([], 4, 6)
    await sealer_on(pool, new).seal()
    assert (await checked(database_url, new)).batches == 4
    unknown = await checked(database_url, ChainKeys(Keyring([STRANGERS])))
    assert unknown.problems == ["no seal of a pepper in the pepper file proves the batches after 0"]


async def test_entries_that_nobody_seals_are_reported(pool: Pool, database_url: str) -> None:
    """A check counts the entries that are not sealed yet, and reports them after a few minutes."""
    await AuditTable(pool).insert([entry()])
    report = await checked(database_url)
    assert (report.problems, report.unsealed) == ([], 1)
    (problem,) = (await checked(database_url, now=NOW + timedelta(hours=1))).problems
    assert problem.startswith("1 entries are not sealed")


async def test_every_field_is_covered(pool: Pool, database_url: str) -> None:
    """A change of any column of an entry shows."""
    await three_batches(pool)
    async with session(database_url) as connection:
        await connection.execute("ALTER TABLE audit DISABLE TRIGGER USER")
        columns: Any = await connection.fetch(
            "SELECT attname, atttypid::regtype::text FROM pg_attribute"
            " WHERE attrelid = 'audit'::regclass AND attnum > 0 AND attname <> 'id'"
        )
        assert len(columns) == 14
        for name, kind in columns:
            # The id of a trace has exactly 32 digits.
            more = 32 if name == "trace_id" else 1
            other = {
                "text": f"{name} || repeat('a', {more})",
                "timestamp with time zone": f"{name} + interval '1 microsecond'",
            }.get(kind, f"{name} + 1")
            await connection.execute(f"UPDATE audit SET {name} = {other} WHERE id = 3")  # noqa: S608
            assert (await checked(database_url)).problems, name
            back = {
                "text": f"left({name}, -{more})",
                "timestamp with time zone": f"{name} - interval '1 microsecond'",
            }.get(kind, f"{name} - 1")
            await connection.execute(f"UPDATE audit SET {name} = {back} WHERE id = 3")  # noqa: S608
            assert (await checked(database_url)).problems == [], name

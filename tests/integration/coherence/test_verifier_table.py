"""The SQL of verifiers' rows and of the log, on a real Postgres."""

from collections.abc import AsyncIterator

import pytest
from latchkey_coherence.verdict_cache import NOWHERE, Position
from latchkey_service.coherence.verifier_reports import SiblingReport
from latchkey_service.coherence.verifier_table import Identity, OwnRow, VerifierTable, read_rows
from latchkey_service.errors import StoreUnavailable
from latchkey_service.postgres.connections import Connector, Pool

from tests.helpers.database_history import NO_CLIENTS, advance, head_of, named
from tests.helpers.databases import session


@pytest.fixture
async def row(database_url: str) -> AsyncIterator[OwnRow]:
    """The row of a process, not registered yet."""
    connection = await Connector(database_url).connect()
    yield OwnRow(connection, Identity("ver_a", "x", 1, "0", 3.0))
    connection.terminate()


async def test_a_late_registration_changes_nothing(row: OwnRow, database_url: str) -> None:
    """A registration that was abandoned, and that reaches the database after a later one, neither
    takes over the row nor acknowledges anything in its name."""
    first = await row.register(2, acknowledge=True)
    assert (first.position.revision, first.acknowledged) == (0, 0)
    assert first.position.mark
    head = await advance(database_url, "tok_1")
    with pytest.raises(StoreUnavailable):
        await row.register(1, acknowledge=True)
    assert [r.acknowledged_revision for r in await row.all_rows()] == [0]
    renewed, _ = await row.renew(2, head, 0, NO_CLIENTS)
    assert renewed
    # While clients may still answer from their caches, the row acknowledges nothing.
    again = await row.register(3, acknowledge=False)
    assert (again.position, again.acknowledged) == (head, 0)
    assert (await row.register(4, acknowledge=True)).acknowledged == head.revision


async def test_a_locked_dead_row_blocks_nothing(row: OwnRow, database_url: str) -> None:
    """A locked row of a dead process is skipped until the next check."""
    await row.register(1, acknowledge=True)
    (dead,) = await row.all_rows()
    async with session(database_url) as other:
        async with other.transaction():
            await other.execute("SELECT FROM verifier FOR UPDATE")
            assert not await row.remove_dead(dead)
        assert await row.remove_dead(dead)


async def test_a_renewal_may_leave_out_the_siblings(row: OwnRow, database_url: str) -> None:
    """A renewal without a list of siblings keeps the list of the row, and an empty list empties
    it."""
    pool = await Pool.open(Connector(database_url))
    table = VerifierTable(pool)
    sibling = SiblingReport("ver_sibling", 7, 0.0, 3, 2, 1, [], 5, 0.0)
    try:
        position = (await row.register(1, acknowledge=True)).position
        for listed, found in (([sibling], 2), (None, 2), ([], 1), (None, 1)):
            await row.renew(1, position, 0, NO_CLIENTS._replace(siblings=listed))
            assert len((await table.status()).verifiers) == found
    finally:
        await pool.close()


async def test_siblings_have_acknowledged_what_their_row_has(
    row: OwnRow, database_url: str
) -> None:
    """The status shows no sibling behind its row, although the list of siblings is older than what
    the row acknowledges, and shows what a sibling has acknowledged before its row."""
    pool = await Pool.open(Connector(database_url))
    table = VerifierTable(pool)
    sibling = SiblingReport("ver_sibling", 7, 0.0, 3, 2, 1, [], 5, 0.0)
    try:
        position = (await row.register(1, acknowledge=True)).position
        for acknowledged, listed, found in ((4, [sibling], [4, 5]), (9, None, [9, 9])):
            await row.renew(1, position, acknowledged, NO_CLIENTS._replace(siblings=listed))
            verifiers = (await table.status()).verifiers
            assert [each.acknowledged_revision for each in verifiers] == found
    finally:
        await pool.close()


async def test_a_sibling_with_a_row_counts_once(row: OwnRow, database_url: str) -> None:
    """The row of a lead no longer counts a sibling that has its own row, and the status names each
    process once. Another sibling still counts, and so does the lead. A sibling that has gone on to
    the next lead does not count again."""
    pool = await Pool.open(Connector(database_url))
    table = VerifierTable(pool)
    listed = [SiblingReport(f"ver_sibling{n}", n, 0.0, 3, 2, 1, [], 5, 0.0) for n in (1, 2)]
    connection = await Connector(database_url).connect()
    sibling = OwnRow(connection, Identity("ver_sibling1", "host", 1, "test", 3.0))
    try:
        position = (await row.register(1, acknowledge=True)).position
        report = NO_CLIENTS._replace(processes=3, siblings=listed)
        await row.renew(1, position, 0, report)
        (lead,) = await row.all_rows()
        await sibling.recount(lead.id, 1)
        assert [r.processes for r in await row.all_rows()] == [3]
        await sibling.register(1, acknowledge=False)
        await sibling.recount(lead.id, 2)
        assert sorted(r.processes for r in await row.all_rows()) == [1, 3]
        await sibling.recount(lead.id, 1)
        assert {r.id: r.processes for r in await row.all_rows()} == {lead.id: 2, "ver_sibling1": 1}
        named = [each.id for each in (await table.status()).verifiers]
        assert sorted(named) == sorted([lead.id, "ver_sibling1", "ver_sibling2"])
        # It is at the next lead of its host.
        await sibling.remove(1)
        await sibling.recount(lead.id, 1)
        assert [r.processes for r in await row.all_rows()] == [2]
    finally:
        connection.terminate()
        await pool.close()


async def test_pruning_keeps_what_a_reader_needs(row: OwnRow, database_url: str) -> None:
    """Pruning removes exactly the entries that every verifier has acknowledged. A reader that has
    applied all of them continues; for a reader that has applied fewer, its position is unknown."""
    pool = await Pool.open(Connector(database_url))
    table = VerifierTable(pool)
    try:
        await row.register(1, acknowledge=True)
        log = [await advance(database_url, f"tok_{number}") for number in range(1, 6)]
        assert await table.prune_log(0.0, 1_000) == 0
        await row.renew(1, log[2], log[2].revision, NO_CLIENTS)
        assert await table.prune_log(3600.0, 1_000) == 0
        assert await table.prune_log(0.0, 1_000) == 3
        late, level = await row.read_log(log[1]), await row.read_log(log[2])
        assert (late.known, late.head, late.changes) == (False, log[4], ())
        assert (level.known, level.head, named(level)) == (True, log[4], ["tok_4", "tok_5"])
        assert [change.position for change in level.changes] == log[3:]
    finally:
        await pool.close()


async def test_every_revision_has_a_fresh_mark(row: OwnRow, database_url: str) -> None:
    """No two revisions share a mark, none is 0, and the log has the same marks as head."""
    first = (await row.register(1, acknowledge=True)).position
    positions = [await advance(database_url, f"tok_{number}") for number in range(50)]
    marks = {position.mark for position in (first, *positions)}
    assert len(marks) == 51
    assert all(0 < mark < 2**64 for mark in marks)
    # Postgres stores them signed, so about half of them are negative there.
    assert any(mark >= 2**63 for mark in marks)
    assert any(mark < 2**63 for mark in marks)
    log = await row.read_log(first)
    assert [change.position for change in log.changes] == positions
    assert log.head == positions[-1]


async def test_one_revision_can_name_many_tokens(row: OwnRow, database_url: str) -> None:
    """Tokens that one revision names arrive as one change."""
    first = (await row.register(1, acknowledge=True)).position
    both = await advance(database_url, "tok_1", "tok_2")
    (change,) = (await row.read_log(first)).changes
    assert change.position == both
    assert sorted(change.token_ids) == ["tok_1", "tok_2"]


@pytest.mark.parametrize("stranger", ["mark", "revision", "nowhere"])
async def test_a_position_of_another_history_renews_nothing(
    row: OwnRow, database_url: str, stranger: str
) -> None:
    """Postgres neither renews nor acknowledges for a position outside its history, and returns no
    changes for it."""
    await row.register(1, acknowledge=True)
    first = await advance(database_url, "tok_1")
    await advance(database_url, "tok_2")
    (before,) = await row.all_rows()
    position = {
        "mark": Position(first.revision, first.mark ^ 1),
        "revision": Position(first.revision + 7, first.mark),
        "nowhere": NOWHERE,
    }[stranger]
    renewed, log = await row.renew(1, position, 2, NO_CLIENTS)
    assert (renewed, log.known, log.changes) == (False, False, ())
    assert await row.all_rows() == [before]
    assert not (await row.read_log(position)).known
    # The same call with the position that the history does hold.
    renewed, log = await row.renew(1, first, 1, NO_CLIENTS)
    assert (renewed, log.known, named(log)) == (True, True, ["tok_2"])
    (after,) = await row.all_rows()
    assert (after.renewal, after.acknowledged_revision) == (before.renewal + 1, 1)


async def test_a_missing_row_and_a_missing_history_differ(row: OwnRow, database_url: str) -> None:
    """Without its row a process renews nothing, but still receives the log after its position."""
    position = (await row.register(1, acknowledge=True)).position
    await advance(database_url, "tok_1")
    await row.remove(1)
    renewed, log = await row.renew(1, position, 0, NO_CLIENTS)
    assert (renewed, log.known, named(log)) == (False, True, ["tok_1"])


async def test_the_timeline_and_the_cluster_are_known(row: OwnRow, database_url: str) -> None:
    """Registration, renewal and log reads report the server that they reached, in the same way."""
    registration = await row.register(1, acknowledge=True)
    server = registration.server
    assert server.timeline == "00000001"
    assert server.identifier is not None
    assert server.identifier.isdigit()
    assert (await row.read_log(registration.position)).server == server
    _, log = await row.renew(1, registration.position, 0, NO_CLIENTS)
    assert log.server == server


async def test_rows_say_which_positions_the_history_holds(row: OwnRow, database_url: str) -> None:
    """A Delete finds out whether the rows that it reads are on the history of its revision."""
    await row.register(1, acknowledge=True)
    first = await advance(database_url, "tok_1")
    head = await advance(database_url, "tok_2")
    wrong = Position(head.revision, head.mark ^ 1)
    connection = await Connector(database_url).connect()
    rows = await read_rows(connection, [first, wrong, head])
    assert rows.known == {first, head}
    assert [verifier.id for verifier in rows.verifiers] == ["ver_a"]
    assert await head_of(database_url) == head
    connection.terminate()

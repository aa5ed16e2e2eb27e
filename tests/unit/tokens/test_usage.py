"""Which uses of tokens are counted, with which limits, and when they are written."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from latchkey_service.coherence.watch_events import ReportedUse
from latchkey_service.errors import StoreUnavailable
from latchkey_service.tokens import usage_writer
from latchkey_service.tokens.usage import (
    COUNT_MAX,
    DAYS_MAX,
    USES_PER_SECOND_MAX,
    PendingUses,
    Use,
)
from latchkey_service.tokens.usage_writer import UsageWriter
from latchkey_service.tokens.verdict import CachedToken, Scope

from tests.helpers.waiting import WAIT_SECONDS, eventually

SECRET = "lk" + "_" + "0" * 53 + "abcd"
OTHER_SECRET = "lk" + "_" + "0" * 53 + "wxyz"
HINT, OTHER_HINT = "lk_…abcd", "lk_…wxyz"


def cached(token_id: str = "t1") -> CachedToken:  # noqa: S107 - no password
    return CachedToken(
        token_id=token_id,
        account_id="acme",
        scope=Scope.READ,
        expires=1e18,
        token=b"",
        deleted=False,
        keep_until=1e18,
    )


def pending(entries_max: int = 100) -> PendingUses:
    return PendingUses(lambda: None, entries_max)


def reported(**fields: Any) -> ReportedUse:
    values: dict[str, Any] = {
        "token_id": "t1",
        "hint": HINT,
        "uses": 1,
        "first_age_seconds": 2.0,
        "last_age_seconds": 1.0,
    }
    return ReportedUse(**(values | fields))


def test_uses_are_counted_by_secret_and_caller() -> None:
    """Uses add up for each secret and caller, with the times of the first and the last one."""
    uses, record, other = pending(), cached(), cached()
    for now, caller in ((10.0, "shop"), (11.0, "web"), (12.0, "shop"), (13.0, "shop")):
        uses.count(record, SECRET, caller, now)
    uses.count(other, OTHER_SECRET, "shop", 14.0)
    assert uses.take(100) == [
        Use("t1", HINT, "shop", 10.0, 13.0, 3),
        Use("t1", HINT, "web", 11.0, 11.0, 1),
        Use("t1", OTHER_HINT, "shop", 14.0, 14.0, 1),
    ]
    assert uses.take(100) == []


def test_a_use_after_take_is_a_new_entry() -> None:
    """Uses that follow `take` are in the next batch, even for a record that was used before."""
    uses, record = pending(), cached()
    uses.count(record, SECRET, "shop", 10.0)
    assert len(uses.take(100)) == 1
    uses.count(record, SECRET, "shop", 20.0)
    assert uses.take(100) == [Use("t1", HINT, "shop", 20.0, 20.0, 1)]


def test_two_records_of_one_secret_add_up() -> None:
    """A record that was read and not cached does not divert the uses of the cached one."""
    uses, kept, passing = pending(), cached(), cached()
    uses.count(kept, SECRET, "shop", 1.0)
    uses.count(passing, SECRET, "shop", 2.0)
    assert [use.uses for use in uses.take(10)] == [2]
    uses.count(kept, SECRET, "shop", 3.0)
    assert [use.uses for use in uses.take(10)] == [1]


def test_no_use_is_lost_or_counted_twice() -> None:
    """The batches contain every use once, whatever the order of uses, callers, and takes."""
    randomness = random.Random(7)  # noqa: S311 - a test's fixed sequence
    uses, expected, taken = pending(), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    records = [cached(f"t{number}") for number in range(5)]
    older = [cached(f"t{number}") for number in range(5)]
    for step in range(5_000):
        index = randomness.randrange(5)
        if randomness.random() < 0.1:
            # Read again, while the older record stays in use for a while.
            older[index], records[index] = records[index], cached(f"t{index}")
        caller = randomness.choice(["shop", "web"])
        if randomness.random() < 0.3:
            uses.report(caller, [reported(token_id=f"t{index}", uses=3)], float(step))
            expected[f"t{index}", caller] += 3
        else:
            record = randomness.choice((records, older))[index]
            uses.count(record, SECRET, caller, float(step))
            expected[f"t{index}", caller] += 1
        if randomness.random() < 0.05:
            for use in uses.take(randomness.randrange(1, 12)):
                taken[use.token_id, use.caller] += use.uses
    for use in uses.take(100):
        taken[use.token_id, use.caller] += use.uses
    assert taken == expected


def test_batches_are_sorted() -> None:
    """Servers lock rows in the same order, so that they do not deadlock."""
    uses = pending()
    for number in (3, 1, 2):
        uses.count(cached(f"t{number}"), SECRET, "shop", 1.0)
    assert [use.token_id for use in uses.take(2)] == ["t1", "t3"]
    assert [use.token_id for use in uses.take(2)] == ["t2"]


def test_a_full_buffer_drops_new_entries_only() -> None:
    """The memory is bounded: entries that exist go on counting, and the others are reported as
    dropped. Writing is requested long before that."""
    requests: list[int] = []
    uses = PendingUses(lambda: requests.append(len(uses)), 8)
    records = [cached(f"t{number}") for number in range(20)]
    for record in records:
        uses.count(record, SECRET, "shop", 1.0)
    uses.count(records[0], SECRET, "shop", 2.0)
    assert (len(uses), requests, uses.take_dropped(), uses.take_dropped()) == (8, [2], 12, 0)
    assert sum(use.uses for use in uses.take(100)) == 9
    uses.count(records[-1], SECRET, "shop", 3.0)
    assert len(uses) == 1


def test_callers_share_the_room_for_reports() -> None:
    """A caller takes half of the room for reports that the callers before it have left, so each
    further one finds some. A quarter is left for verifies of this process."""
    uses = pending(24)

    def report(caller: str) -> int:
        before = len(uses)
        made_up = [reported(token_id=f"x{number}") for number in range(50)]
        uses.report(caller, made_up, 10.0)
        return len(uses) - before

    taken = [report(caller) for caller in ("first", "second", "third", "fourth", "first")]
    assert taken == [9, 5, 2, 1, 0]
    for number in range(6):
        uses.count(cached(f"t{number}"), SECRET, "shop", 10.0)
    assert (len(uses), uses.dropped) == (9 + 5 + 2 + 1 + 6, 41 + 45 + 48 + 49 + 41)


def test_taken_reports_give_back_their_room() -> None:
    """A caller's share is that of its entries that wait, even while the buffer never empties."""
    uses = pending(11)
    uses.count(cached("t1"), SECRET, "shop", 10.0)
    for _ in range(10):
        uses.report("web", [reported(token_id=f"x{number}") for number in range(9)], 10.0)
        assert len(uses) == 5
        # The oldest first, so one of this process waits again each time.
        taken = uses.take(4)
        uses.count(cached("t1"), SECRET, "shop", 10.0)
        uses.take(1)
        uses.count(cached("t1"), SECRET, "shop", 10.0)
        assert len(taken) == 4
        assert len(uses) == 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (998.0, 999.0, 1)),
        ({"first_age_seconds": -5.0, "last_age_seconds": -5.0}, (1000.0, 1000.0, 1)),
        ({"first_age_seconds": 1.0, "last_age_seconds": 3.0}, (997.0, 997.0, 1)),
        ({"uses": -7}, (998.0, 999.0, 0)),
        ({"uses": 2**62}, (998.0, 999.0, 2 * USES_PER_SECOND_MAX)),
        (
            {"first_age_seconds": 1e18, "last_age_seconds": 1e18},
            (1000.0 - DAYS_MAX * 86_400, 1000.0 - DAYS_MAX * 86_400, 1),
        ),
    ],
)
def test_reports_cannot_claim_the_impossible(
    fields: dict[str, Any], expected: tuple[float, float, int]
) -> None:
    """A reported use is not in the future, not older than the counts, and not too frequent."""
    uses = pending()
    uses.report("shop", [reported(**fields)], 1000.0)
    assert uses.take(10) == [Use("t1", HINT, "shop", *expected)]


def test_repeated_reports_do_not_overflow() -> None:
    """However often a client reports the largest counts, the sum fits into the database."""
    uses = pending()
    for _ in range(1_000):
        uses.report("hostile", [reported(first_age_seconds=1e9, uses=2**62)] * 100, 1e9)
    (use,) = uses.take(10)
    assert use.uses == COUNT_MAX


@pytest.mark.parametrize("text", ["", "x" * 65, "a\0b", "tab\t", "\n"])
def test_reports_name_only_what_can_be_stored(text: str) -> None:
    """An id that Postgres could not store is ignored, and such a hint is dropped."""
    uses = pending()
    uses.report("shop", [reported(token_id=text)], 10.0)
    assert uses.take(10) == []
    uses.report("shop", [reported(hint=text)], 10.0)
    assert [use.hint for use in uses.take(10)] == [""]


class FakeTable:
    """Replaces the table: stores each number once, and fails when a test says so."""

    def __init__(self) -> None:
        self.written: dict[int, list[Use]] = {}
        self.attempts: list[int] = []
        self.failure: Exception | None = None
        self.commits_before_failing = False

    async def record(self, writer: str, number: int, uses: Sequence[Use]) -> None:
        self.attempts.append(number)
        if self.failure is None or self.commits_before_failing:
            self.written.setdefault(number, list(uses))
        if self.failure is not None:
            raise self.failure

    @property
    def uses(self) -> int:
        return sum(use.uses for uses in self.written.values() for use in uses)


def writer_on(table: Any) -> UsageWriter:
    return UsageWriter(table, "ver_1", lambda: 1000.0)


@pytest.mark.parametrize("committed", [False, True])
async def test_a_batch_is_repeated_under_its_number(committed: bool) -> None:
    """After a failure the same batch is written again under the same number, so it counts once
    whether or not the first attempt was committed."""
    table = FakeTable()
    writer, record = writer_on(table), cached()
    writer.pending.count(record, SECRET, "shop", 1.0)
    table.failure, table.commits_before_failing = StoreUnavailable("away"), committed
    assert not await writer.write_batch()
    writer.pending.count(record, SECRET, "shop", 2.0)
    table.failure = None
    assert await writer.write_batch()
    assert await writer.write_batch()
    assert not await writer.write_batch()
    assert table.attempts == [1, 1, 2]
    assert table.uses == 2


async def test_a_batch_that_can_never_be_written_is_dropped() -> None:
    """A batch that fails for a reason other than the database's absence does not block others."""
    table = FakeTable()
    writer = writer_on(table)
    writer.pending.count(cached("t1"), SECRET, "shop", 1.0)
    table.failure = RuntimeError("a bug")
    assert await writer.write_batch()
    table.failure = None
    writer.pending.count(cached("t2"), SECRET, "shop", 1.0)
    await writer.write_batch()
    assert [use.token_id for uses in table.written.values() for use in uses] == ["t2"]


async def test_close_writes_everything() -> None:
    """A clean stop writes a batch whose outcome is unknown, and all uses that wait."""
    table = FakeTable()
    writer = writer_on(table)
    writer.pending.count(cached("t0"), SECRET, "shop", 1.0)
    table.failure = StoreUnavailable("away")
    await writer.write_batch()
    table.failure = None
    for number in range(1, usage_writer.BATCH_MAX + 5):
        writer.pending.count(cached(f"t{number}"), SECRET, "shop", 1.0)
    await writer.close()
    assert table.uses == usage_writer.BATCH_MAX + 5


async def test_close_ends_without_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop takes a bounded time while the database is unreachable."""
    monkeypatch.setattr(usage_writer, "CLOSE_SECONDS", 0.05)
    table = FakeTable()
    table.failure = StoreUnavailable("away")
    writer = writer_on(table)
    writer.pending.count(cached(), SECRET, "shop", 1.0)
    async with asyncio.timeout(WAIT_SECONDS):
        await writer.close()
    assert not table.written


async def test_a_filling_buffer_is_written_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the buffer fills up, the writer does not wait for its time."""
    table = FakeTable()
    writer = writer_on(table)
    with monkeypatch.context() as patch:
        # Only until this writer waits: servers that other tests share would wait as long.
        patch.setattr(usage_writer, "WRITE_SECONDS", 3_600.0)
        running = asyncio.create_task(writer.run())
        await asyncio.sleep(0)
    try:
        writer.pending.on_filling()
        writer.pending.count(cached(), SECRET, "shop", 1.0)
        await eventually(lambda: table.written, "the batch to be written")
    finally:
        running.cancel()

"""What imported secrets, and made-up ones, cost: look-ups, and what is remembered."""

import asyncio
import math
from collections.abc import Sequence

import pytest
from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.errors import Overloaded
from latchkey_service.tokens.batched_lookup import Found, LeasedLookup
from latchkey_service.tokens.imported import ABSENT_MAX, ABSENT_SECONDS, PENDING_MAX, Imported
from latchkey_service.tokens.verdict import Scope, Verdict
from latchkey_service.tokens.verifier import Question

from tests.helpers.positions import at
from tests.unit.coherence.scene import PRIMARY
from tests.unit.tokens.test_verifier_cache import KEYRING, Bench, Database
from tests.unit.tokens.test_verifier_cache import SECRET as OURS

SECRET = "sk_" + "x" * 40


class Imports(Bench):
    """A verifier whose database lacks the secret until `present` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.present = False
        self.token, self.database.record = self.database.record, None

    async def ask(self, secret: str = SECRET, caller: str = "shop") -> Verdict:
        self.database.record = self.token if self.present else None
        question = Question(secret, int(Scope.READ))
        return (await self.verifier.verify(question, None, caller)).verdict


async def test_repeated_absent_secret_costs_one_read() -> None:
    """A secret that the database does not have is UNKNOWN without a read for a few seconds, alone
    and in a batch."""
    bench = Imports()
    assert [await bench.ask() for _ in range(3)] == [Verdict.UNKNOWN] * 3
    question = Question(SECRET, int(Scope.READ))
    (answer,) = await bench.verifier.verify_batch([question], None, "shop")
    assert answer.verdict is Verdict.UNKNOWN
    assert bench.database.reads == 1
    bench.scene.now += ABSENT_SECONDS
    bench.scene.renew()
    assert await bench.ask() is Verdict.UNKNOWN
    assert bench.database.reads == 2
    assert bench.imported.results == {"absent": 2, "remembered": 3}


async def test_nothing_is_remembered_with_the_cache_off() -> None:
    """With LATCHKEY_CACHE=off, each verify of an absent secret reads the database."""
    bench = Imports()
    bench.cache.entries_max = 0
    assert [await bench.ask() for _ in range(3)] == [Verdict.UNKNOWN] * 3
    assert bench.database.reads == 3


async def test_import_ends_what_was_remembered() -> None:
    """An import takes a revision. Once it is applied, the secret is read again, and accepted."""
    bench = Imports()
    assert await bench.ask() is Verdict.UNKNOWN
    bench.present = True
    assert await bench.ask() is Verdict.UNKNOWN
    bench.scene.apply((at(6), "another token"))
    bench.database.snapshot = Snapshot(at(6), PRIMARY.timeline)
    assert await bench.ask() is Verdict.VALID


async def test_read_overtaken_by_an_import_is_not_remembered() -> None:
    """A read whose snapshot is older than the applied position may have missed an import."""
    bench = Imports()
    find_all = bench.database.find_all

    async def overtaken(digests: Sequence[bytes], deadline: float) -> list[Found]:
        found = await find_all(digests, deadline)
        bench.scene.apply((at(6), "t9"))
        return found

    bench.database.find_all = overtaken  # type: ignore[method-assign]  # at the worst moment
    assert await bench.ask() is Verdict.UNKNOWN
    bench.database.find_all = find_all  # type: ignore[method-assign]  # as before
    bench.database.snapshot = Snapshot(at(6), PRIMARY.timeline)
    bench.present = True
    assert await bench.ask() is Verdict.VALID
    assert bench.database.reads == 2


async def test_nothing_is_remembered_without_a_lease() -> None:
    """Without a lease, what was remembered does not answer."""
    bench = Imports()
    assert await bench.ask() is Verdict.UNKNOWN
    bench.scene.now = bench.state.lease_ends
    imported = bench.imported.parse(SECRET)
    assert imported is not None
    assert not bench.imported.is_absent(imported)


async def test_memory_of_absent_secrets_is_bounded() -> None:
    """A flood of made-up secrets evicts the oldest ones."""
    bench = Imports()
    await bench.ask()
    for number in range(ABSENT_MAX // 1_000):
        questions = [Question(f"sk_{number:08}{n:08}", int(Scope.READ)) for n in range(1_000)]
        await bench.verifier.verify_batch(questions, None, "shop")
    assert len(bench.imported._absent) == ABSENT_MAX
    reads = bench.database.reads
    await bench.ask()
    assert bench.database.reads == reads + 1


async def test_caller_cannot_fill_the_queue() -> None:
    """A caller may have only so many imported secrets in the queue. Others are not affected, and
    neither are secrets of other kinds."""
    bench = Imports()
    answered = asyncio.Event()
    find_all = bench.database.find_all

    async def stuck(digests: Sequence[bytes], deadline: float) -> list[Found]:
        await answered.wait()
        return await find_all(digests, deadline)

    bench.database.find_all = stuck  # type: ignore[method-assign]  # Postgres is slow
    flood = [
        asyncio.create_task(bench.ask(f"sk_{number:020}", "flooding"))
        for number in range(PENDING_MAX)
    ]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await bench.ask("sk_" + "y" * 40, "flooding")
    assert bench.imported.results["rejected"] == 1
    other = asyncio.create_task(bench.ask("sk_" + "z" * 40, "other"))
    await asyncio.sleep(0)
    answered.set()
    assert set(await asyncio.gather(*flood, other)) == {Verdict.UNKNOWN}
    assert await bench.ask("sk_" + "y" * 40, "flooding") is Verdict.UNKNOWN


async def test_digests_count_not_secrets() -> None:
    """With several peppers, a caller may have fewer secrets in the queue: what fills it is the
    digests, of which a secret has one for each pepper."""
    bench = Imports()
    answered = asyncio.Event()
    find_all = bench.database.find_all

    async def stuck(digests: Sequence[bytes], deadline: float) -> list[Found]:
        await answered.wait()
        return await find_all(digests, deadline)

    bench.database.find_all = stuck  # type: ignore[method-assign]  # Postgres is slow
    many = [Imported(tuple(bytes([n % 256, p] + [0] * 30) for p in range(6))) for n in range(200)]
    first, second = (
        asyncio.create_task(bench.imported.find(many, "flooding", math.inf)) for _ in range(2)
    )
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await second
    answered.set()
    assert len(await first) == len(many)


async def test_stuck_look_ups_of_imported_secrets_delay_no_others() -> None:
    """Imported secrets have a separate queue: while it is stuck, other secrets are answered,
    cold ones too, alone and with others in the same turn of the event loop."""
    bench = Imports()
    slow, answered = Database(), asyncio.Event()
    bench.imported._lookup = LeasedLookup(slow, bench.reads)  # type: ignore[arg-type]  # a stand-in
    find_all = slow.find_all

    async def stuck(digests: Sequence[bytes], deadline: float) -> list[Found]:
        await answered.wait()
        return await find_all(digests, deadline)

    slow.find_all = stuck  # type: ignore[method-assign]  # Postgres is slow there
    slow.record = None
    waiting = asyncio.create_task(bench.ask())
    await asyncio.sleep(0)
    bench.present = True
    assert await bench.ask(OURS) is Verdict.VALID
    assert not waiting.done()
    answered.set()
    assert await waiting is Verdict.UNKNOWN


def test_accepted_secrets() -> None:
    """Only secrets with an accepted prefix, of the right length and alphabet, are imported ones."""
    for secret in ("sk_" + "x" * 13, "sk_" + "x" * 125, "sk_a+b/c=d~e.f-g_h"):
        assert KEYRING.imported_digests_of(secret) is not None
    for secret in (
        *("sk_" + "x" * 12, "sk_" + "x" * 126, "pk_" + "x" * 40, "sk_" + "x" * 20 + "\n"),
        *("sk_" + "é" * 20, "sk_ " + "x" * 20, "", "sk_"),
    ):
        assert KEYRING.imported_digests_of(secret) is None

"""What the server's verifier caches, for how long, and which reads it answers with."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from latchkey_coherence.rate import RateLimit
from latchkey_coherence.verdict_cache import Position, VerdictCache
from latchkey_service.coherence.reads import LeasedReads
from latchkey_service.coherence.snapshot import Snapshot
from latchkey_service.coherence.verifier_state import VerifierState
from latchkey_service.errors import CacheStartedOver, StoreUnavailable
from latchkey_service.secret_format import Keyring, Pepper
from latchkey_service.tokens.batched_lookup import READS_MAX, Found, LeasedLookup
from latchkey_service.tokens.imported import ImportedSecrets
from latchkey_service.tokens.rate_draws import Drawn
from latchkey_service.tokens.rate_table import Want
from latchkey_service.tokens.seal import Sealer, SealGuard
from latchkey_service.tokens.token_rates import TokenRates
from latchkey_service.tokens.verdict import CachedToken, Scope, SecretRecord, TokenRecord, Verdict
from latchkey_service.tokens.verifier import Question, Verifier

from tests.helpers.positions import at
from tests.unit.coherence.scene import PRIMARY, Scene

CACHE_SECONDS = 2.0
LIMIT = RateLimit(120, 60, 5)
KEYRING = Keyring([Pepper(b"p" * 32)], ("sk_",))
SECRET = KEYRING.mint("lk", lambda size: bytes(range(size))).secret.reveal()
TOKEN = TokenRecord("t1", "acme", "ci", Scope.READ, datetime(2026, 1, 1, tzinfo=UTC), None, "hint")


class Database:
    """Replaces look-ups: answers with the token, read wherever a test says."""

    def __init__(self) -> None:
        self.snapshot = Snapshot(at(5), PRIMARY.timeline)
        self.record: TokenRecord | None = TOKEN
        self.reads = 0
        self.disconnected = 0

    async def find_all(self, digests: Sequence[bytes], deadline: float) -> list[Found]:
        self.reads += 1
        return [
            Found(self.record, self.record and secret_of(self.record, digest), self.snapshot)
            for digest in digests
        ]


def secret_of(token: TokenRecord, digest: bytes) -> SecretRecord:
    """The only secret of `token`, with the right seal."""
    secret = SecretRecord(digest, KEYRING.peppers[0].id, None, None, False, None)
    return secret._replace(seal=Sealer(KEYRING.peppers).seal(token, secret))


class FakeRenewer:
    """Replaces the lease renewer: a test says what the log contains once it is read."""

    def __init__(self) -> None:
        self.brings: list[tuple[Position, str]] = []
        self.scene = Scene(at(5))
        self.woken = 0

    async def read_log_to(self, revision: int, deadline: float) -> bool:
        if self.brings:
            self.scene.apply(*self.brings)
        return self.scene.state.cache.position.revision >= revision

    def wake(self) -> None:
        self.woken += 1


class Buckets:
    """Replaces draws: issues `calls` of a token, and then says when there are more."""

    def __init__(self) -> None:
        self.calls = 0
        self.ends = math.inf
        self.asked: list[Want] = []

    async def draw(self, wants: Sequence[Want], deadline: float) -> list[Drawn]:
        self.asked += wants
        drawn = []
        for want in wants:
            taken = min(want.needed, self.calls)
            self.calls -= taken
            drawn.append(Drawn(True, LIMIT, taken, 0, 0.5, self.ends))
        return drawn


class Bench:
    """A verifier with its cache, and fakes for everything around it."""

    def __init__(self, draw: float = 0.0) -> None:
        self.renewer = FakeRenewer()
        self.database = Database()
        self.draws = Buckets()
        self.scene = self.renewer.scene
        self.state: VerifierState[CachedToken] = self.scene.state
        self.cache: VerdictCache[CachedToken] = self.state.cache

        def disconnect() -> None:
            self.database.disconnected += 1

        self.reads = reads = LeasedReads(
            self.renewer,  # type: ignore[arg-type]  # all that reads use of it
            self.state,
            lambda: self.scene.now,
            disconnect,
        )
        self.imported = ImportedSecrets(
            KEYRING,
            LeasedLookup(self.database, reads),  # type: ignore[arg-type]  # all that it uses of it
            self.state,
            lambda: self.scene.now,
        )
        self.verifier = Verifier(
            KEYRING,
            self.database,  # type: ignore[arg-type]  # all that a verify uses of it
            reads,
            self.state,
            lambda record: record.id.encode(),
            lambda: self.scene.now,
            lambda: 0.0,
            cache_seconds=CACHE_SECONDS,
            randomness=lambda: draw,
            guard=SealGuard(KEYRING, lambda: self.scene.now),
            rates=TokenRates(self.draws, lambda: self.scene.now),  # type: ignore[arg-type]  # all that it uses
            imported=self.imported,
        )

    async def verify(self) -> Verdict:
        return (await self.verifier.verify(Question(SECRET, int(Scope.READ)), None)).verdict

    def verify_cached(self) -> Any:
        return self.verifier.verify_cached(SECRET, int(Scope.READ))


@pytest.mark.parametrize(("draw", "seconds"), [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0)])
async def test_nothing_is_cached_for_longer_than_allowed(draw: float, seconds: float) -> None:
    """An entry answers for between half of LATCHKEY_CACHE_SECONDS and all of it, under a lease that
    is renewed. Then the token is read and cached again."""
    bench = Bench(draw)
    assert await bench.verify() is Verdict.VALID
    bench.scene.now += seconds - 0.001
    bench.scene.renew()
    assert bench.verify_cached().verdict is Verdict.VALID
    bench.scene.now += 0.001
    assert bench.scene.now < bench.state.lease_ends
    assert bench.verify_cached() is None
    assert await bench.verify() is Verdict.VALID
    assert bench.verify_cached().verdict is Verdict.VALID
    assert len(bench.cache) == 1


async def test_the_cache_does_not_answer_without_a_lease() -> None:
    """The cache does not answer without a lease, however fresh the entry is."""
    bench = Bench(1.0)
    await bench.verify()
    bench.state.lease_ends = bench.scene.now
    assert bench.verify_cached() is None


async def test_a_cached_answer_carries_the_applied_position() -> None:
    """No revision up to that position has changed the token, so a client may cache it from
    there."""
    bench = Bench(1.0)
    await bench.verify()
    bench.scene.apply((at(6), "another"))
    assert bench.verify_cached().position == at(6)


@pytest.mark.parametrize(
    ("position", "timeline"),
    [
        (at(5, 2), PRIMARY.timeline),
        (at(4), PRIMARY.timeline),
        (Position(5, 0), PRIMARY.timeline),
        (at(5), "00000002"),
        (at(5), None),
        (at(6, 2), PRIMARY.timeline),
    ],
)
async def test_a_read_from_elsewhere_is_refused(position: Position, timeline: str | None) -> None:
    """The read neither answers nor enters the cache. Its connection is closed, and the lease is
    checked, because the lease may be the side that is astray."""
    bench = Bench()
    bench.database.snapshot = Snapshot(position, timeline)
    with pytest.raises(StoreUnavailable):
        await bench.verify()
    assert len(bench.cache) == 0
    assert bench.database.disconnected == 1
    assert bench.renewer.woken == 1


async def test_an_unknown_token_needs_a_believed_read_too() -> None:
    """A deposed primary must not cause the verdict UNKNOWN either."""
    bench = Bench()
    bench.database.record = None
    assert await bench.verify() is Verdict.UNKNOWN
    bench.database.snapshot = Snapshot(at(5, 2), PRIMARY.timeline)
    with pytest.raises(StoreUnavailable):
        await bench.verify()


@pytest.mark.parametrize("history", [1, 2])
async def test_a_read_that_is_ahead_waits_for_the_log(history: int) -> None:
    """The read answers once the log has its position, and is refused if the log has another mark
    there."""
    bench = Bench()
    bench.database.snapshot = Snapshot(at(6), PRIMARY.timeline)
    bench.renewer.brings = [(at(6, history), "another")]
    if history == 1:
        assert await bench.verify() is Verdict.VALID
        assert bench.verify_cached() is not None
    else:
        with pytest.raises(StoreUnavailable):
            await bench.verify()
        assert len(bench.cache) == 0


async def test_a_read_overtaken_by_an_invalidation_is_answered_but_not_cached() -> None:
    """The verify began before the invalidation was applied, so it may answer. The cache must not
    store the token, because nothing would remove it again."""
    bench = Bench()
    find_all = bench.database.find_all

    async def overtaken(digests: Sequence[bytes], deadline: float) -> list[Found]:
        found = await find_all(digests, deadline)
        bench.scene.apply((at(6), "t1"))
        return found

    bench.database.find_all = overtaken  # type: ignore[method-assign]  # at the worst moment
    assert await bench.verify() is Verdict.VALID
    assert len(bench.cache) == 0


async def test_a_lease_lost_during_the_read_permits_no_answer() -> None:
    """A read that was sent under a lease on a history that no longer exists is sent again, a
    bounded number of times. It closes no connection, because the connection is not at fault."""
    bench = Bench()
    find_all = bench.database.find_all
    losses = 1

    async def overtaken(digests: Sequence[bytes], deadline: float) -> list[Found]:
        nonlocal losses
        found = await find_all(digests, deadline)
        losses -= 1
        if losses < 0:
            return found
        bench.state.lose()
        bench.state.register(at(5), 5, PRIMARY, 0.0)
        bench.scene.renew()
        return found

    bench.database.find_all = overtaken  # type: ignore[method-assign]  # at the worst moment
    assert await bench.verify() is Verdict.VALID
    assert bench.database.reads == 2
    losses = 1_000
    bench.cache.reset(bench.cache.position)
    with pytest.raises(CacheStartedOver):
        await bench.verify()
    assert bench.database.reads == 2 + READS_MAX
    assert len(bench.cache) == 0
    assert bench.database.disconnected == 0


async def test_limited_token_spends_a_call_for_each_verify() -> None:
    """Without calls, a verify waits for a draw. While the bucket is empty, this process refuses
    without asking. Then it asks again."""
    bench = Bench()
    bench.database.record = TOKEN._replace(rate_limit=LIMIT)
    bench.draws.calls = 2
    assert await bench.verify() is Verdict.VALID
    assert bench.verify_cached() is None
    assert await bench.verify() is Verdict.VALID
    assert await bench.verify() is Verdict.RATE_LIMITED
    refused = bench.verify_cached()
    assert (refused.verdict, refused.retry_seconds) == (Verdict.RATE_LIMITED, pytest.approx(0.5))
    assert [want.needed for want in bench.draws.asked] == [1, 1, 1]
    bench.scene.now += 0.5
    assert bench.verify_cached() is None
    bench.draws.calls = 1
    assert await bench.verify() is Verdict.VALID


async def test_limit_comes_after_every_other_verdict() -> None:
    """A verify that is refused for another reason neither spends a call nor asks for one."""
    bench = Bench()
    bench.database.record = TOKEN._replace(rate_limit=LIMIT)
    question = Question(SECRET, int(Scope.WRITE))
    answer = await bench.verifier.verify(question, None)
    assert answer.verdict is Verdict.INSUFFICIENT_SCOPE
    cached = bench.verifier.verify_cached(SECRET, int(Scope.WRITE))
    assert cached is not None
    assert cached.verdict is Verdict.INSUFFICIENT_SCOPE
    assert not bench.draws.asked


async def test_changed_limit_does_not_spend_earlier_calls() -> None:
    """Calls that were issued under another limit are not spent after the token is read again."""
    bench = Bench()
    record = bench.database.record = TOKEN._replace(rate_limit=LIMIT)
    bench.draws.calls = 1
    assert await bench.verify() is Verdict.VALID
    (entry,) = bench.cache.entries.values()
    assert entry.share is not None
    entry.share.add(5, math.inf)
    bench.database.record = record._replace(rate_limit=LIMIT._replace(burst=4))
    bench.scene.apply((at(6), "t1"))
    bench.database.snapshot = bench.database.snapshot._replace(position=at(6))
    assert await bench.verify() is Verdict.RATE_LIMITED

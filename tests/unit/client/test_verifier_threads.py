"""`Verifier.verify_nowait` in a thread while the event loop's thread changes the cache."""

import math
from collections.abc import Callable
from datetime import UTC, datetime

import latchkey
import pytest
from latchkey import Scope, Token, Verdict, Verification
from latchkey._entry import CacheEntry
from latchkey._shape import checksum
from latchkey._subscription import Grant, Invalidation, Request, Reset, Stream
from latchkey_coherence.verdict_cache import NOWHERE

from tests.helpers.positions import at

BODY = "lk" + "_" + "0" * 51
SECRET = BODY + checksum(BODY)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The verifier's clock. It shows its last element."""
    times = [100.0]
    monkeypatch.setattr("latchkey.verifier.boottime", lambda: times[-1])
    return times


def warm(verifier: latchkey.Verifier) -> Stream:
    """Open a stream with a grant of two seconds from 100.0 on, and cache a token."""
    stream = verifier._subscription.open(100.0)
    assert stream.take(100.0) == Request(NOWHERE, number=1)
    stream.receive(Reset(at(5)), 100.0)
    assert stream.take(100.0) == Request(at(5))
    stream.receive(Grant(at(5), 1, 2.0), 100.0)
    token = Token(
        id="t1",
        account_id="a",
        name="n",
        scope=Scope.READ,
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
    )
    revision, mark = at(5)
    answer = Verification(verdict=Verdict.VALID, token=token, revision=revision, mark=mark)
    verifier._store(SECRET, None, answer)
    assert verifier.verify_nowait(SECRET) is not None
    return stream


class Overtaken(dict[bytes, CacheEntry]):
    """The cache's entries, with a thread switch at the worst moment: during a look-up."""

    def __init__(self, find: Callable[[bytes], CacheEntry]) -> None:
        super().__init__()
        self._slowly = find

    def __getitem__(self, key: bytes) -> CacheEntry:
        return self._slowly(key)


@pytest.mark.parametrize("overtaken", ["before the look-up", "after the look-up"])
def test_an_overtaken_thread_does_not_use_the_new_lease(clock: list[float], overtaken: str) -> None:
    """An entry that was found under one lease is not returned under the next one.

    The first lease ends, so a Delete no longer waits for it and returns. Then a verify starts.
    While it runs, the event loop applies the deletion and extends the lease.
    """
    verifier = latchkey.Verifier("nowhere:1")
    stream = warm(verifier)
    find = verifier._entries.__getitem__

    def slow(key: bytes) -> CacheEntry:
        entry = find(key) if overtaken == "after the look-up" else None
        assert stream.take(clock[-1]) == Request(at(5), number=2)
        stream.receive(Invalidation(at(6), ("t1",)), clock[-1])
        stream.receive(Grant(at(6), 2, 2.0), clock[-1])
        return entry or find(key)

    clock.append(102.5)
    verifier._entries = Overtaken(slow)
    assert verifier.verify_nowait(SECRET) is None
    assert verifier._lease.end > clock[-1]


def test_the_clock_is_read_last(clock: list[float]) -> None:
    """A thread that pauses after the look-up does not answer if its lease has ended."""
    verifier = latchkey.Verifier("nowhere:1")
    warm(verifier)
    find = verifier._entries.__getitem__

    def slow(key: bytes) -> CacheEntry:
        entry = find(key)
        clock.append(102.5)
        return entry

    verifier._entries = Overtaken(slow)
    assert verifier.verify_nowait(SECRET) is None


def test_a_new_verifier_has_no_lease() -> None:
    """Without a grant, a verifier gives no cached answer."""
    verifier = latchkey.Verifier("nowhere:1")
    assert verifier._lease.end == -math.inf
    stats = verifier.stats()
    assert (stats.watching, stats.lease_remaining_seconds) == (False, 0.0)


@pytest.mark.parametrize("draw", [0.5, 1.0])
def test_answers_are_cached_for_a_limited_time(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, draw: float
) -> None:
    """Whatever the leases, an entry expires after half to all of `cache_seconds`, and is then
    cached again."""
    monkeypatch.setattr("latchkey.verifier.random.uniform", lambda low, high: draw)
    verifier = latchkey.Verifier("nowhere:1", cache_seconds=1.0)
    warm(verifier)
    clock.append(100.0 + draw - 0.001)
    assert verifier.verify_nowait(SECRET) is not None
    clock.append(100.0 + draw)
    assert verifier.verify_nowait(SECRET) is None
    assert verifier._lease.end > clock[-1]


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_cache_time_is_positive(seconds: float) -> None:
    """`cache_entries=0` is the way to cache nothing."""
    with pytest.raises(latchkey.InvalidArgument, match="cache_seconds"):
        latchkey.Verifier("nowhere:1", cache_seconds=seconds)

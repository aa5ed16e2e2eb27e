"""Which uses of cached answers a client reports, and when, and after which failures."""

import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import latchkey
import pytest
from latchkey import Scope, Token, Verdict, Verification, _uses
from latchkey._entry import CacheEntry, cache_entry
from latchkey._shape import checksum
from latchkey._subscription import Grant, Request, Reset, Stream, UsesReceived
from latchkey._uses import REPORT_SECONDS_MAX, USES_IN_REPORT_MAX, UseLog, UseReport, hint_of
from latchkey_coherence.verdict_cache import NOWHERE

from tests.helpers.positions import at

BODY = "lk" + "_" + "0" * 51
SECRET = BODY + checksum(BODY)
HINT = "lk_…" + SECRET[-4:]


def entry_of(token_id: str, verdict: Verdict = Verdict.VALID) -> CacheEntry:
    token = Token(
        id=token_id,
        account_id="a",
        name="n",
        scope=Scope.READ,
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
    )
    entry = cache_entry(Verification(verdict=verdict, token=token), None, 1e18)
    assert entry is not None
    return entry


def use(log: UseLog, entry: CacheEntry, now: float, secret: str = SECRET) -> None:
    """Use an entry as `verify_nowait` does."""
    entry.uses += 1
    entry.last_use = now
    if entry.idle:
        log.begin(entry, secret, now)


def uses_in(report: UseReport | None) -> dict[str, tuple[int, float, float]]:
    """The uses in a report by token: count, first age and last age."""
    assert report is not None
    return {use.token_id: (use.count, use.first_age, use.last_age) for use in report.uses}


def log_of() -> UseLog:
    return UseLog(lambda: 1.0)


def test_uses_add_up_between_reports() -> None:
    """A report contains each use since the previous one, as a count and two ages."""
    log, entry = log_of(), entry_of("t1")
    assert log.due() is None
    for now in (100.0, 101.0, 103.0):
        use(log, entry, now)
    report = log.take(104.0)
    assert uses_in(report) == {"t1": (3, 4.0, 1.0)}
    assert report is not None
    assert report.uses[0].hint == HINT
    assert (log.due(), log.take(104.0)) == (None, None)
    use(log, entry, 105.0)
    # One report at a time.
    assert (log.due(), log.take(200.0)) == (None, None)
    log.confirm(report.number, 106.0)
    assert log.due() == 106.0 + REPORT_SECONDS_MAX
    assert log.take(106.0) is None
    assert uses_in(log.take(110.0)) == {"t1": (1, 5.0, 5.0)}


def test_a_confirmed_client_without_uses_is_silent() -> None:
    """Without uses, nothing is due."""
    log, entry = log_of(), entry_of("t1")
    use(log, entry, 100.0)
    report = log.take(100.0)
    assert report is not None
    log.confirm(report.number, 100.0)
    assert (log.due(), log.take(1_000.0), log.take_last(1_000.0, 1_000.0)) == (None, None, None)


def test_a_lost_report_is_repeated_without_counts() -> None:
    """After a stream breaks, times are reported again, and counts only if they are new. So no use
    counts twice, and no time is lost."""
    log, entry = log_of(), entry_of("t1")
    use(log, entry, 100.0)
    use(log, entry, 101.0)
    first = log.take(102.0)
    assert first is not None
    log.lose()
    assert uses_in(log.take(103.0)) == {"t1": (0, 3.0, 2.0)}
    log.lose()
    use(log, entry, 104.0)
    assert uses_in(log.take(105.0)) == {"t1": (1, 5.0, 1.0)}


def test_secrets_and_entries_of_one_token() -> None:
    """Two entries of one secret add up, and two secrets of one token stay separate."""
    log = log_of()
    other = BODY[:-1] + "1" + checksum(BODY[:-1] + "1")
    for entry, secret in ((entry_of("t1"), SECRET), (entry_of("t1"), SECRET)):
        use(log, entry, 100.0, secret)
    use(log, entry_of("t1"), 100.0, other)
    report = log.take(100.0)
    assert report is not None
    assert {(use.hint, use.count) for use in report.uses} == {(HINT, 2), (hint_of(other), 1)}


def test_many_uses_take_several_reports() -> None:
    """A report contains at most 1,000 uses. The next one follows as soon as it is confirmed."""
    log = log_of()
    for number in range(USES_IN_REPORT_MAX + 5):
        use(log, entry_of(f"t{number}"), 100.0)
    report = log.take(100.0)
    assert report is not None
    assert len(report.uses) == USES_IN_REPORT_MAX
    log.confirm(report.number, 100.5)
    assert len(uses_in(log.take(100.5))) == 5


def test_a_full_log_catches_up_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is bounded. Entries that found no room are counted at a later use."""
    monkeypatch.setattr(_uses, "USED_MAX", 2)
    log = log_of()
    entries = [entry_of(f"t{number}") for number in range(3)]
    for entry in entries:
        use(log, entry, 100.0)
    report = log.take(100.0)
    assert set(uses_in(report)) == {"t0", "t1"}
    assert report is not None
    log.confirm(report.number, 100.0)
    use(log, entries[2], 101.0)
    assert uses_in(log.take(110.0))["t2"][0] == 2


def test_a_filling_log_is_reported_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many used entries do not wait for the usual time."""
    monkeypatch.setattr(_uses, "USED_MAX", 40)
    log = log_of()
    use(log, entry_of("t0"), 100.0)
    report = log.take(100.0)
    assert report is not None
    log.confirm(report.number, 100.0)
    for number in range(10):
        use(log, entry_of(f"t{number}"), 100.1)
    assert len(uses_in(log.take(100.1))) == 10


def test_threads_lose_no_use() -> None:
    """While threads use an entry, every use is in exactly one report."""
    log, entry, total = log_of(), entry_of("t1"), Counter[str]()
    rounds, threads = 20_000, 3

    def work() -> None:
        for _ in range(rounds):
            use(log, entry, 100.0)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()

    def collect() -> None:
        report = log.take_last(100.0, 100.0)
        for one in () if report is None else report.uses:
            total[one.token_id] += one.count

    while any(worker.is_alive() for worker in workers):
        collect()
    collect()
    assert total["t1"] == rounds * threads


# Streams.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The verifier's clock. It shows its last element."""
    times = [100.0]
    monkeypatch.setattr("latchkey.verifier.boottime", lambda: times[-1])
    return times


def watching(verifier: latchkey.Verifier, now: float) -> Stream:
    """Open a stream with a grant of two seconds."""
    subscription = verifier._subscription
    stream = subscription.open(now)
    asked = stream.take(now)
    assert asked is not None
    if subscription.cache.position == NOWHERE:
        stream.receive(Reset(at(5)), now)
        assert stream.take(now) == Request(at(5))
    stream.receive(Grant(at(5), asked.number, 2.0), now)
    return stream


def store(verifier: latchkey.Verifier, verdict: Verdict = Verdict.VALID, **fields: Any) -> None:
    """Cache the service's answer about a token with the scope READ, unless `fields` has others."""
    values: dict[str, Any] = {"scope": Scope.READ} | fields
    token = Token(
        id="t1",
        account_id="a",
        name="n",
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
        **values,
    )
    answer = Verification(verdict=verdict, token=token, revision=5, mark=at(5).mark)
    verifier._store(SECRET, None, answer)


def test_only_valid_answers_from_the_cache_are_reported(clock: list[float]) -> None:
    """A cached VALID is a use. INSUFFICIENT_SCOPE, DELETED and MALFORMED are not."""
    verifier = latchkey.Verifier("nowhere:1")
    stream = watching(verifier, 100.0)
    store(verifier)
    for scope, verdict in (
        (Scope.WRITE, Verdict.INSUFFICIENT_SCOPE),
        (Scope.READ, Verdict.VALID),
        (None, Verdict.VALID),
    ):
        answer = verifier.verify_nowait(SECRET, scope)
        assert answer is not None
        assert answer.verdict is verdict
    assert verifier.verify_nowait("nonsense") is not None
    request = stream.take(100.0)
    assert request is not None
    assert uses_in(request.report) == {"t1": (2, 0.0, 0.0)}
    assert (request.applied, request.number, request.released) == (at(5), 0, False)
    other = latchkey.Verifier("nowhere:1")
    stream = watching(other, 100.0)
    store(other, Verdict.DELETED)
    assert other.verify_nowait(SECRET) is not None
    assert stream.take(100.0) is None


def test_answers_about_networks_and_permissions(clock: list[float]) -> None:
    """Of the answers that depend on the client's address or on permissions, only VALID is a use,
    for each scope. DISABLED is not a use, whatever is asked."""
    verifier = latchkey.Verifier("nowhere:1")
    stream = watching(verifier, 100.0)
    store(
        verifier,
        Verdict.ADDRESS_NOT_ALLOWED,
        scope=Scope.WRITE,
        allowed_networks=("192.0.2.0/24",),
        permissions=("orders:read",),
    )
    inside, outside = "192.0.2.1", "198.51.100.1"
    uses = 0
    for scope in (None, Scope.READ, Scope.WRITE):
        for address, permissions, verdict in (
            ("", (), Verdict.ADDRESS_NOT_ALLOWED),
            (outside, (), Verdict.ADDRESS_NOT_ALLOWED),
            (inside, ("orders:write",), Verdict.INSUFFICIENT_PERMISSIONS),
            (inside, ("orders:read",), Verdict.VALID),
            (inside, (), Verdict.VALID),
        ):
            answer = verifier.verify_nowait(
                SECRET, scope, client_address=address, permissions=permissions
            )
            assert answer is not None
            assert answer.verdict is verdict
            uses += verdict is Verdict.VALID
    assert uses_in(getattr(stream.take(100.0), "report", None)) == {"t1": (uses, 0.0, 0.0)}
    assert verifier.stats().hits == 15
    other = latchkey.Verifier("nowhere:1")
    stream = watching(other, 100.0)
    store(other, Verdict.DISABLED)
    for permissions in ((), ("orders:read",)):
        answer = other.verify_nowait(SECRET, permissions=permissions)
        assert answer is not None
        assert answer.verdict is Verdict.DISABLED
    assert stream.take(100.0) is None


def test_a_release_follows_the_last_report(clock: list[float]) -> None:
    """A client that stops sends the uses that it still has, then the release. A stream that the
    server ends with OK has delivered them."""
    verifier = latchkey.Verifier("nowhere:1")
    stream = watching(verifier, 100.0)
    store(verifier)
    verifier.verify_nowait(SECRET)
    # On its way when the client stops.
    assert uses_in(getattr(stream.take(100.0), "report", None)) == {"t1": (1, 0.0, 0.0)}
    verifier.verify_nowait(SECRET)
    verifier._subscription.release()
    assert stream.due() is not None
    last = stream.take(100.0)
    assert last is not None
    assert uses_in(last.report) == {"t1": (1, 0.0, 0.0)}
    assert stream.take(100.0) == Request(at(5), released=True)
    assert stream.take(100.0) is None
    stream.ended(cleanly=True, now=100.0)
    log = verifier._subscription.uses
    assert (log.due(), log.take_last(100.0, 100.0)) == (None, None)


def test_the_release_does_not_wait_for_endless_reports(clock: list[float]) -> None:
    """Reports of a client that stops delay its release by a bounded time."""
    verifier = latchkey.Verifier("nowhere:1")
    stream = watching(verifier, 100.0)
    for number in range(3 * USES_IN_REPORT_MAX):
        use(verifier._subscription.uses, entry_of(f"t{number}"), 100.0)
    verifier._subscription.release()
    assert getattr(stream.take(100.0), "report", None) is not None
    late = 100.0 + _uses.HAND_ON_SECONDS + 0.01
    assert stream.take(late) == Request(at(5), released=True)


@pytest.mark.parametrize("ends", ["breaks", "is released"])
def test_the_next_stream_reports_what_the_last_one_did_not(clock: list[float], ends: str) -> None:
    """A report on a stream that breaks is repeated without counts. One on a stream that the client
    left, and that the server ended with OK, is not repeated."""
    verifier = latchkey.Verifier("nowhere:1")
    first = watching(verifier, 100.0)
    store(verifier)
    verifier.verify_nowait(SECRET)
    assert uses_in(getattr(first.take(100.0), "report", None)) == {"t1": (1, 0.0, 0.0)}
    if ends == "breaks":
        first.ended(cleanly=False, now=100.5)
    second = watching(verifier, 101.0)
    if ends == "is released":
        # One report at a time, whichever stream it is on.
        assert second.take(101.0) is None
        assert first.take(101.0) == Request(at(5), released=True)
        first.ended(cleanly=True, now=101.0)
        assert second.take(101.0) is None
    else:
        assert uses_in(getattr(second.take(101.0), "report", None)) == {"t1": (0, 1.0, 1.0)}


def test_a_stream_without_a_grant_reports_nothing(clock: list[float]) -> None:
    """Uses go to the server that grants."""
    verifier = latchkey.Verifier("nowhere:1")
    stream = watching(verifier, 100.0)
    store(verifier)
    verifier.verify_nowait(SECRET)
    other = verifier._subscription.open(100.0)
    assert other.take(100.0) == Request(at(5), number=1)
    assert other.take(100.0) is None
    other.receive(UsesReceived(7), 100.0)
    assert stream.take(100.0) is not None


def test_a_confirmation_counts_only_for_what_was_sent(clock: list[float]) -> None:
    """A server that confirms a number that the client has not sent loses no uses."""
    verifier = latchkey.Verifier("nowhere:1")
    stream = watching(verifier, 100.0)
    store(verifier)
    stream.receive(UsesReceived(2**62), 100.0)
    verifier.verify_nowait(SECRET)
    request = stream.take(100.0)
    assert request is not None
    assert request.report is not None
    stream.receive(UsesReceived(2**62), 100.0)
    verifier.verify_nowait(SECRET)
    later: Callable[[], Request | None] = lambda: stream.take(109.0)  # noqa: E731 - read twice
    asked, reported = later(), later()
    assert asked is not None
    assert asked.number
    assert uses_in(getattr(reported, "report", None)) == {"t1": (1, 9.0, 9.0)}

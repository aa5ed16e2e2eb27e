"""The shares of a client: when it asks for more, what it spends, and what it refuses by itself."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import latchkey
import pytest
from latchkey import RateLimit, Scope, Token, Verdict, Verification, _shares, verifier
from latchkey._entry import cache_entry
from latchkey._shape import checksum
from latchkey._shares import ASK_SECONDS, ShareLog, ShareQuestion, SharesReceived, core_limit
from latchkey._subscription import Grant, Request, Reset, Stream, UsesReceived
from latchkey_coherence import rate
from latchkey_coherence.verdict_cache import NOWHERE

from tests.helpers.positions import at

FAST = rate.RateLimit(400, 1, 100)
SLOW = rate.RateLimit(100, 60, 20)
LIMIT = RateLimit(400, timedelta(seconds=1), 100)
BODY = "lk" + "_" + "0" * 51
SECRET = BODY + checksum(BODY)


def accept(log: ShareLog, share: rate.Share, times: int = 1) -> None:
    """Accept verifies that the service answered."""
    share.count(times)
    log.note(share)


def log_with_demand(now: float = 100.0) -> tuple[ShareLog, rate.Share]:
    """A log whose next question is due half a second later, for ten calls."""
    log = ShareLog()
    share = log.of("t1", FAST)
    accept(log, share)
    assert log.take(now) is None, "the interval of the first use is not known"
    accept(log, share, 10)
    return log, share


def test_question_asks_for_what_was_used() -> None:
    """One question at a time, at most four in a second, while there is demand."""
    log, share = log_with_demand()
    assert log.due() == 100.0 + ASK_SECONDS
    assert log.take(100.2) is None
    assert log.take(100.5) == ShareQuestion(1, (("t1", 10),))
    accept(log, share, 10)
    assert (log.due(), log.take(200.0)) == (None, None)
    log.receive(SharesReceived(1, (("t1", 6, FAST),), 1.0))
    assert log.due() == 100.5 + ASK_SECONDS
    assert log.take(100.75) == ShareQuestion(2, (("t1", 4),)), "six are left"
    log.receive(SharesReceived(2, (), 1.0))
    assert log.due() is None, "nothing was used since"


def test_slow_limits_are_never_asked_for() -> None:
    """Each call of a slow limit asks the service, so that none is lost here."""
    log = ShareLog()
    share = log.of("t1", SLOW)
    accept(log, share, 50)
    assert log.due() is None


def test_answers_that_do_not_count() -> None:
    """Only the answer to the open question counts, for tokens that are known with that limit."""
    log, share = log_with_demand()
    log.receive(SharesReceived(1, (("t1", 5, FAST),), 1.0))
    assert log.take(100.5) == ShareQuestion(1, (("t1", 10),))
    log.receive(SharesReceived(2, (("t1", 5, FAST),), 1.0))
    log.receive(SharesReceived(1, (("t1", 5, SLOW), ("t9", 5, FAST), ("t1", 1, FAST)), 1.0))
    log.receive(SharesReceived(1, (("t1", 5, FAST),), 1.0))
    assert [share.spend(100.6), share.spend(100.6)] == [True, False]


def test_lost_question_is_given_up() -> None:
    """After the stream of a question has ended, another stream asks again, with a new number."""
    log, share = log_with_demand()
    assert log.take(100.5) == ShareQuestion(1, (("t1", 10),))
    log.lose(7)
    assert log.due() is None, "another stream's question was lost before"
    log.lose(1)
    accept(log, share, 5)
    assert log.take(101.0) == ShareQuestion(2, (("t1", 5),))
    log.receive(SharesReceived(1, (("t1", 5, FAST),), 1.0))
    assert not share.spend(101.0)


def test_question_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question has as many tokens as a server accepts. The rest follows in the next one."""
    monkeypatch.setattr(_shares, "WANTED_MAX", 2)
    monkeypatch.setattr(_shares, "NOTED_MAX", 3)
    log = ShareLog()
    shares = [log.of(f"t{number}", FAST) for number in range(4)]
    for share in shares:
        share.ask(99.0)
        accept(log, share, 2)
    assert log.take(99.5) == ShareQuestion(1, (("t0", 2), ("t1", 2)))
    log.receive(SharesReceived(1, (), 1.0))
    assert log.take(99.75) == ShareQuestion(2, (("t2", 1),))
    log.receive(SharesReceived(2, (), 1.0))
    assert log.due() is None, "the list was full when the last one was used"
    accept(log, shares[3])
    assert log.due() is not None


@pytest.mark.parametrize(
    ("limit", "known"),
    [
        (LIMIT, True),
        (RateLimit(1, timedelta(hours=1), 1), True),
        (RateLimit(0, timedelta(seconds=1), 1), False),
        (RateLimit(1, timedelta(seconds=1), 0), False),
        (RateLimit(1, timedelta(milliseconds=1_500), 1), False),
        (RateLimit(1, timedelta(0), 1), False),
        (RateLimit(1, timedelta(seconds=-1), 1), False),
    ],
)
def test_limits_that_this_version_cannot_compute_with(limit: RateLimit, known: bool) -> None:
    """An answer about a token with such a limit is not kept, so each verify asks the service."""
    assert (core_limit(limit) is not None) is known
    answer = Verification(verdict=Verdict.VALID, token=token_with(limit))
    assert (cache_entry(answer, None, 1e18) is not None) is known


def token_with(limit: RateLimit | None) -> Token:
    return Token(
        id="t1",
        account_id="a",
        name="n",
        scope=Scope.READ,
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
        rate_limit=limit,
    )


class Bench:
    """A verifier under a grant, whose messages a test exchanges by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(verifier, "boottime", lambda: self.now)
        self.verifier = latchkey.Verifier("nowhere:1")
        self.stream: Stream = self.verifier._subscription.open(self.now)
        self.take()
        self.stream.receive(Reset(at(5)), self.now)
        self.take()
        self.stream.receive(Grant(at(5), 1, 30.0), self.now)

    def take(self) -> list[Request]:
        taken = []
        while (request := self.stream.take(self.now)) is not None:
            taken.append(request)
            if request.report is not None:
                self.stream.receive(UsesReceived(request.report.number), self.now)
        return taken

    def answer(self, verdict: Verdict = Verdict.VALID, **fields: Any) -> None:
        """The service answers a verify."""
        token = token_with(LIMIT)
        found = Verification(verdict=verdict, token=token, revision=5, mark=at(5).mark, **fields)
        self.verifier._store(SECRET, Scope.READ, found)

    def verify(self, **question: Any) -> Verification | None:
        return self.verifier.verify_nowait(SECRET, Scope.READ, **question)

    def verdict(self) -> Verdict | None:
        answer = self.verify()
        return None if answer is None else answer.verdict

    def shares(self, calls: int) -> None:
        """Let the client ask for shares, and give it some."""
        self.answer()
        self.take()
        self.now += 0.5
        self.answer()
        (asked,) = [request.shares for request in self.take() if request.shares is not None]
        limit = core_limit(LIMIT)
        assert limit is not None
        self.stream.receive(SharesReceived(asked.number, (("t1", calls, limit),), 1.0), self.now)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_verifies_spend_the_share(bench: Bench) -> None:
    """A verify is VALID as long as there are calls. Then the service is asked. Both are counted as
    uses, or not, as for any token."""
    bench.answer()
    assert bench.verify() is None, "the client has no call yet"
    bench.shares(3)
    assert [bench.verdict() for _ in range(4)] == [Verdict.VALID] * 3 + [None]
    assert bench.verifier.stats().hits == 3


def test_refusal_is_answered_from_the_cache_until_its_time(bench: Bench) -> None:
    """The answer contains the remaining time and the token. It is not a use."""
    bench.answer(Verdict.RATE_LIMITED, retry_after=timedelta(seconds=2))
    bench.now += 0.5
    refused = bench.verify()
    assert refused is not None
    assert (refused.verdict, refused.allowed) == (Verdict.RATE_LIMITED, False)
    assert refused.retry_after == timedelta(seconds=1.5)
    assert refused.token is not None
    assert bench.verifier._subscription.uses.total() == 0
    bench.now += 1.5
    assert bench.verify() is None


def test_calls_are_spent_before_a_refusal_counts(bench: Bench) -> None:
    """A client that has calls spends them although the service has refused another verify."""
    bench.shares(1)
    bench.answer(Verdict.RATE_LIMITED, retry_after=timedelta(seconds=2))
    assert [bench.verdict(), bench.verdict()] == [Verdict.VALID, Verdict.RATE_LIMITED]


def test_secrets_of_a_token_share_its_calls(bench: Bench) -> None:
    """After a Rotate, both secrets spend the calls of one share."""
    bench.shares(1)
    body = "lk" + "_" + "1" * 51
    other = body + checksum(body)
    found = Verification(
        verdict=Verdict.VALID, token=token_with(LIMIT), revision=5, mark=at(5).mark
    )
    bench.verifier._store(other, None, found)
    assert bench.verifier.verify_nowait(other) is not None
    assert bench.verify() is None


def test_shares_end_with_the_lease(bench: Bench) -> None:
    """Without a lease, the service is asked, whatever share there is. A retired stream asks for
    nothing."""
    bench.shares(5)
    bench.verifier._subscription.release()
    assert bench.verify() is None
    bench.answer()
    assert [request.shares for request in bench.take()] == [None]


def test_old_server_that_never_answers(bench: Bench) -> None:
    """A client of a server that does not know shares asks once, and then for each verify."""
    bench.answer()
    bench.take()
    for _ in range(5):
        bench.now += 0.5
        bench.answer()
        bench.take()
    assert bench.verifier._subscription.shares._number == 1
    assert bench.verify() is None


def test_threads_spend_each_call_once(bench: Bench) -> None:
    """verify_nowait may be called in any thread, and spends no call twice."""
    bench.shares(2_000)
    accepted: list[int] = []

    def run() -> None:
        accepted.append(sum(bench.verify() is not None for _ in range(1_000)))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sum(accepted) == 2_000


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("100/minute", RateLimit(100, timedelta(minutes=1))),
        (" 5/second, burst 20 ", RateLimit(5, timedelta(seconds=1), 20)),
        ("5/hour burst 2", RateLimit(5, timedelta(hours=1), 2)),
    ],
)
def test_limits_as_text(text: str, limit: RateLimit) -> None:
    """A limit can be written as text, and is shown as it is written."""
    assert RateLimit.parse(text) == limit
    assert RateLimit.parse(str(limit)) == limit


@pytest.mark.parametrize("text", ["", "5", "5/day", "/minute", "-5/minute", "5/minute,", "٥/hour"])
def test_invalid_limits_are_rejected(text: str) -> None:
    """Anything else is an error."""
    with pytest.raises(ValueError, match="100/minute"):
        RateLimit.parse(text)


def test_share_of_a_dropped_token_is_dropped(bench: Bench) -> None:
    """A client keeps no share of tokens that are neither cached nor in demand."""
    bench.shares(5)
    assert len(bench.verifier._subscription.shares._shares._by_token) == 1
    bench.verifier._cache.reset(NOWHERE)
    bench.now += ASK_SECONDS
    bench.take()
    assert len(bench.verifier._subscription.shares._shares._by_token) == 0

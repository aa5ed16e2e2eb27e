"""Runs conformance cases against the Python client's core, with an explicit clock.

It uses the real classes (`Verifier`, `Subscription`, `Stream`, `VerdictCache`). It replaces their
connections to the outside: the clock, the randomness and the event loop.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from functools import partial
from unittest import mock

import latchkey
import pytest
from latchkey import Scope, Verdict, Verification, _subscription, verifier
from latchkey._shape import checksum
from latchkey._shares import SharesReceived
from latchkey._subscription import Event, Request, Stream, Subscription, UsesReceived
from latchkey._uses import UseReport
from latchkey_coherence import rate

from tests.conformance import cases
from tests.conformance.cases import Case, position_of

__all__ = ["play"]

# Tolerance for differences in floating-point arithmetic between languages.
TOLERANCE_SECONDS = 1e-6
# A client that sends more messages than this at one moment would never stop.
SENDS_MAX = 10


class Player:
    """One client. `share` (0 to 1) replaces the client's random numbers."""

    def __init__(self, case: Case, share: float) -> None:
        self.now = 0.0
        self.case = case
        self.streams: dict[str, Stream] = {}
        self.numbers: dict[str, int] = {}
        self.asked: dict[str, int] = {}
        # Count, first and last use by token.
        self.reported: dict[str, tuple[int, float, float]] = {}
        self.muted: set[Stream] = set()
        # The last question for shares on each stream, and the calls in all questions.
        self.questions: dict[Stream, int] = {}
        self.wanted: Counter[str] = Counter()
        self.verifier = latchkey.Verifier(
            "nowhere:1", cache_entries=case.cache_entries, cache_seconds=case.cache_seconds
        )
        self.subscription: Subscription = self.verifier._subscription
        self.subscription._randomness = lambda: share

    def play(self) -> None:
        for index, step in enumerate(self.case.steps):
            try:
                assert step.at >= self.now, "the clock runs backwards"
                self.now = step.at
                self.act(step)
                self.check_sends(step.sends)
                self.check(step.expect)
            except AssertionError as error:
                raise AssertionError(
                    f"{self.case.name}, step {index} ({step.do} at {step.at}): {error}"
                ) from error

    def act(self, step: cases.Step) -> None:
        match step:
            case cases.Open():
                assert step.stream not in self.streams, f"stream {step.stream} is open"
                self.streams[step.stream] = self.subscription.open(self.now)
            case cases.Receive():
                stream = self.streams[step.stream]
                stream.receive(self.event_of(step.event, stream), self.now)
            case cases.Break():
                self.streams.pop(step.stream).ended(cleanly=False, now=self.now)
            case cases.Mute():
                self.muted.add(self.streams[step.stream])
            case cases.Answer():
                self.answer(step)
            case cases.Verify():
                answer = self.verifier.verify_nowait(
                    secret_of(step.token_id),
                    scope_of(step.asked_scope),
                    client_address=step.client_address,
                    permissions=step.permissions,
                )
                found = None if answer is None else answer.verdict.name
                assert found == step.from_memory, f"answered {found}, not {step.from_memory}"
            case cases.Present():
                answer = self.verifier.verify_nowait(step.text)
                found = None if answer is None else answer.verdict.name
                expected = "MALFORMED" if step.refuses else None
                assert found == expected, f"answered {found}, not {expected}"
            case cases.Release():
                self.subscription.release()
            case cases.Wait():
                pass

    def event_of(self, event: cases.Event, stream: Stream) -> Event | None:
        match event:
            case cases.Invalidation():
                return _subscription.Invalidation(
                    position_of(event.position), tuple(event.token_ids)
                )
            case cases.Grant():
                number = 0 if event.number is None else self.numbers[event.number]
                return _subscription.Grant(
                    position_of(event.position),
                    number + event.offset,
                    event.seconds,
                    tuple(event.imported_prefixes),
                )
            case cases.Reset():
                return _subscription.Reset(position_of(event.position))
            case cases.Closing():
                return _subscription.Closing()
            case cases.Shares():
                number = self.questions.get(stream, 0)
                limit = rate.RateLimit(*event.rate_limit.model_dump().values())
                return SharesReceived(
                    number + event.offset,
                    tuple((token_id, calls, limit) for token_id, calls in event.calls.items()),
                    event.seconds,
                )
            case cases.Unknown():
                return None

    def answer(self, step: cases.Answer) -> None:
        secret, position = secret_of(step.token_id), position_of(step.position)
        token = None
        if step.verdict != "UNKNOWN":
            token = latchkey.Token(
                id=step.token_id,
                account_id="a",
                name="n",
                scope=Scope[step.token_scope],
                create_time=datetime(2026, 1, 1, tzinfo=UTC),
                allowed_networks=tuple(step.token_networks),
                permissions=tuple(step.token_permissions),
                rate_limit=limit_of(step.token_rate_limit),
            )
        answer = Verification(
            verdict=Verdict[step.verdict],
            token=token,
            revision=position.revision,
            mark=position.mark,
            retry_after=None if step.retry_after is None else timedelta(seconds=step.retry_after),
        )
        cache = self.subscription.cache
        before = set(map(id, cache.entries.values()))
        self.verifier._store(
            secret, scope_of(step.asked_scope), answer, step.client_address, step.permissions
        )
        kept = any(id(entry) not in before for entry in cache.entries.values())
        assert kept == step.keeps, f"kept: {kept}"

    def check_sends(self, expected: list[cases.Send]) -> None:
        sent = {name: self.taken(stream) for name, stream in self.streams.items()}
        for send in expected:
            assert sent.get(send.stream), f"not sent: {send}"
            request = sent[send.stream].pop(0)
            applied = position_of(send.applied)
            assert request.applied == applied, f"{send.stream} confirms {request.applied}"
            assert request.released == send.released, f"released: {request.released}"
            if send.asks is None:
                assert request.number == 0, f"{send.stream} requests a grant"
            elif send.asks in self.numbers:
                assert request.number == self.numbers[send.asks]
            else:
                assert request.number > self.asked.get(send.stream, 0), "requests no new grant"
                self.numbers[send.asks] = self.asked[send.stream] = request.number
        left = {name: requests for name, requests in sent.items() if requests}
        assert not left, f"sent unexpectedly: {left}"

    def taken(self, stream: Stream) -> list[Request]:
        requests: list[Request] = []
        while (request := stream.take(self.now)) is not None:
            if request.shares is not None:
                self.questions[stream] = request.shares.number
                self.wanted.update(dict(request.shares.wanted))
            elif request.report is None:
                requests.append(request)
            else:
                assert not any(earlier.released for earlier in requests), "reports after a release"
                self.receive_report(stream, request.report)
            assert len(requests) <= SENDS_MAX, "does not stop sending"
        return requests

    def receive_report(self, stream: Stream, report: UseReport) -> None:
        """Add a report to what the client has reported, and confirm it."""
        for use in report.uses:
            first, last = self.now - use.first_age, self.now - use.last_age
            count, *times = self.reported.get(use.token_id, (0, first, last))
            self.reported[use.token_id] = (
                count + use.count,
                min(first, *times),
                max(last, *times),
            )
        if stream not in self.muted:
            stream.receive(UsesReceived(report.number), self.now)

    def check(self, expect: cases.Expect) -> None:
        checked = expect.model_fields_set
        cache = self.subscription.cache
        if "lease_ends" in checked:
            end = self.subscription.lease.end
            if expect.lease_ends is None:
                assert end <= self.now, f"there is a lease until {end}"
            else:
                assert math.isclose(end, expect.lease_ends, abs_tol=TOLERANCE_SECONDS, rel_tol=0), (
                    f"the lease ends at {end}, not {expect.lease_ends}"
                )
        if expect.applied is not None:
            applied = position_of(expect.applied)
            assert cache.position == applied, f"has applied {cache.position}"
        if expect.remembers is not None:
            held = sorted({entry.token_id for entry in cache.entries.values()})
            assert held == sorted(expect.remembers), f"remembers {held}"
        if expect.leave is not None:
            leave = sorted(name for name, stream in self.streams.items() if stream.closing)
            assert leave == sorted(expect.leave), f"leaves {leave}"
        if expect.reported is not None:
            assert self.reported.keys() == expect.reported.keys(), f"reported {self.reported}"
            for token_id, uses in expect.reported.items():
                found = self.reported[token_id]
                assert found[0] == uses.count, f"reported {found[0]} uses"
                assert found[1:] == pytest.approx((uses.first, uses.last), abs=1e-3, rel=0)
        if expect.asks_at_most is not None:
            assert self.wanted.keys() == expect.asks_at_most.keys(), f"asked for {self.wanted}"
            for token_id, calls in expect.asks_at_most.items():
                assert 1 <= self.wanted[token_id] <= calls, f"asked for {self.wanted[token_id]}"
        for name, at in (expect.give_up_at or {}).items():
            late_at = self.streams[name].late_at
            same = late_at == at or (
                late_at is not None
                and at is not None
                and math.isclose(late_at, at, abs_tol=TOLERANCE_SECONDS, rel_tol=0)
            )
            assert same, f"{name} is late at {late_at}, not {at}"


def play(case: Case, share: float) -> None:
    """Play one case. Raises AssertionError if the client deviates from it."""
    player: Player | None = None

    def clock() -> float:
        return 0.0 if player is None else player.now

    with (
        mock.patch.object(verifier, "boottime", clock),
        mock.patch.object(random, "uniform", partial(_drawn, share)),
    ):
        player = Player(case, share)
        player.play()


def _drawn(share: float, low: float, high: float) -> float:
    return low + (high - low) * share


def secret_of(token_id: str) -> str:
    body = "lk" + "_" + token_id.rjust(51, "0")
    return body + checksum(body)


def limit_of(limit: cases.RateLimit | None) -> latchkey.RateLimit | None:
    if limit is None:
        return None
    return latchkey.RateLimit(limit.count, timedelta(seconds=limit.period_seconds), limit.burst)


def scope_of(name: str | None) -> Scope | None:
    return None if name is None else Scope[name]

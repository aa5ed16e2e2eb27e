"""Keeps the uses of cached answers, until the server is responsible for it.

Only answers that are VALID are uses. `verify_nowait` counts them on the cache entry, in any thread.
The first use of an entry since the last report also puts the entry on a list here. `_subscription`
reports these uses on the stream whose grants count.

Times are never lost and no use is counted twice. If a stream breaks after a report was sent, and
before it was confirmed, the next stream repeats the times without the counts.

Owns no I/O. All times are seconds of `latchkey_coherence.lease.boottime`.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from latchkey._entry import CacheEntry

# Between two reports. Together with the time until the server has written them, a use is visible
# within the documented 15 s.
REPORT_SECONDS_MAX: Final = 4.0
# The time is random, so that the clients of a server do not all report at the same moment.
REPORT_SHARE_MIN: Final = 0.75
# The most uses that a server accepts in one report.
USES_IN_REPORT_MAX: Final = 1_000
# Used entries that wait to be reported. Most are also in the cache; the others, at about 300 bytes
# each, were evicted meanwhile. When the list is full, further entries are not counted.
USED_MAX: Final = 200_000
# At this share of it, uses are reported early.
EARLY_SHARE: Final = 0.25
# Part of `_watch.RELEASE_SECONDS`: a client that stops has to send its release as well.
HAND_ON_SECONDS: Final = 0.3


@dataclass(frozen=True, slots=True)
class Use:
    """The uses of one secret. Ages are seconds before the report."""

    token_id: str
    hint: str
    count: int
    first_age: float
    last_age: float


@dataclass(frozen=True, slots=True)
class UseReport:
    """A report, with a number that increases."""

    number: int
    uses: tuple[Use, ...]


_Key = tuple[str, str]
_HINT_PREFIX: Final = re.compile(r"[a-z]{2,10}_")


@dataclass(slots=True)
class _Span:
    """When a secret was used, and how often."""

    first: float
    last: float
    count: int


class UseLog:
    """The uses that were not reported yet. `begin` may be called in any thread."""

    def __init__(self, randomness: Callable[[], float]) -> None:
        self._randomness = randomness
        # Entries with unreported uses, the hints of their secrets, and the times of the first use.
        self._used: deque[tuple[CacheEntry, str, float]] = deque()
        # Uses in a report that was perhaps lost. Their counts are not repeated.
        self._unsure: dict[_Key, _Span] = {}
        # Reports that were sent, by number, and when to send the next one.
        self._sent: dict[int, dict[_Key, _Span]] = {}
        self._number = 0
        self._report_at = -math.inf
        # The uses of entries that are not on the list any more.
        self._counted = 0

    def total(self) -> int:
        """Return how often entries were used so far, whatever they answered.

        Slightly wrong while other threads use entries.
        """
        # Copied at once, because other threads may add to it, and each entry once.
        used = {id(entry): entry for entry, _, _ in tuple(self._used)}
        return self._counted + sum(entry.uses - entry.reported for entry in used.values())

    def begin(self, entry: CacheEntry, secret: str, now: float) -> None:
        """Note that an entry was used for the first time since the last report.

        The caller has counted the use before. So either `_drain` sees the use, or the caller sees
        that the entry is idle again. Two threads may note one entry at once, which does no harm.
        """
        if len(self._used) < USED_MAX:
            entry.idle = False
            self._used.append((entry, hint_of(secret), now))

    def due(self) -> float | None:
        """Return when to call `take`. None: nothing to report, or a report is not confirmed yet."""
        if self._sent or not (self._used or self._unsure):
            return None
        return -math.inf if len(self._used) >= USED_MAX * EARLY_SHARE else self._report_at

    def take(self, now: float) -> UseReport | None:
        """Return the next report, or None if none is due or there is nothing to report."""
        due = self.due()
        return None if due is None or now < due else self._next(now)

    def take_last(self, now: float, began: float) -> UseReport | None:
        """Return the next report of a client that stops, whether or not the last is confirmed.

        None: everything is reported, or the time since `began` is up.
        """
        return None if now - began > HAND_ON_SECONDS else self._next(now)

    def confirm(self, number: int, now: float) -> None:
        """Forget the reports up to `number`: the server is responsible for them."""
        confirmed = [sent for sent in self._sent if sent <= number]
        if not confirmed:
            return
        full = max(len(self._sent.pop(sent)) for sent in confirmed) >= USES_IN_REPORT_MAX
        if full:
            # There may be more uses than one report can hold.
            self._report_at = now
        else:
            self._wait(now)

    def lose(self) -> None:
        """Report the times of unconfirmed reports again: their stream has broken."""
        for spans in self._sent.values():
            for key, span in spans.items():
                _merge(self._unsure, key, span.first, span.last, 0)
        self._sent.clear()

    def _next(self, now: float) -> UseReport | None:
        spans: dict[_Key, _Span] = {}
        while self._unsure and len(spans) < USES_IN_REPORT_MAX:
            key, span = self._unsure.popitem()
            spans[key] = span
        for key, first, last, count in self._drain():
            _merge(spans, key, first, last, count)
            if len(spans) >= USES_IN_REPORT_MAX:
                break
        if not spans:
            return None
        self._number += 1
        self._sent[self._number] = spans
        uses = tuple(
            Use(*key, span.count, max(0.0, now - span.first), max(0.0, now - span.last))
            for key, span in spans.items()
        )
        return UseReport(self._number, uses)

    def _drain(self) -> Iterator[tuple[_Key, float, float, int]]:
        """Remove noted entries one by one, and yield their uses."""
        while self._used:
            entry, hint, first = self._used.popleft()
            # In this order: a use that is counted after the counter is read finds the entry idle.
            entry.idle = True
            uses = entry.uses
            count, entry.reported = uses - entry.reported, uses
            self._counted += count
            if count and not entry.final:
                yield (entry.token_id, hint), first, max(first, entry.last_use), count

    def _wait(self, now: float) -> None:
        share = REPORT_SHARE_MIN + (1.0 - REPORT_SHARE_MIN) * self._randomness()
        self._report_at = now + REPORT_SECONDS_MAX * share


def hint_of(secret: str) -> str:
    """Return the prefix and the last four characters of a secret, as the service does.

    A secret that was imported into the service may have no prefix.
    """
    prefix = _HINT_PREFIX.match(secret)
    return f"{prefix[0] if prefix else ''}…{secret[-4:]}"


def _merge(spans: dict[_Key, _Span], key: _Key, first: float, last: float, count: int) -> None:
    span = spans.get(key)
    if span is None:
        spans[key] = _Span(first, last, count)
        return
    span.first = min(span.first, first)
    span.last = max(span.last, last)
    span.count += count
